"""Which channels of any network must go together, and cutting them."""
