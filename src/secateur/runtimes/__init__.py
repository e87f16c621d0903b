"""Other runtimes: write a checkpoint in their format, run it there, compare with plain transformers."""
