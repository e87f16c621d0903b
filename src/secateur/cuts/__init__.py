"""Apply a plan to the tensors of one place."""

from secateur.cuts.apply import cut_architecture, cut_place

__all__ = ["cut_architecture", "cut_place"]
