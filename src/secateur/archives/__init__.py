"""Checkpoints in one file whose size is that of their equivalence class: bits-back coding of free rotations."""
