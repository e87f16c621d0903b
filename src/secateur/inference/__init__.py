"""Architectures without a family file: inferred from the stock class, believed only as far as a self-check holds."""

from secateur.inference.opening import family_text, inferred, open_checkpoint, read_checkpoint
from secateur.inference.verdict import Inferred, infer

__all__ = ["Inferred", "family_text", "infer", "inferred", "open_checkpoint", "read_checkpoint"]
