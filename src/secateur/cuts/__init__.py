"""Apply a plan to the tensors of one place."""

from secateur.cuts.apply import cut_place

__all__ = ["cut_place"]
