"""What a fine-tune added to its base: which entries of it are kept, what they are divided by, and what that costs."""
