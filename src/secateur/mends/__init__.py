"""Closed-form repairs of the weights that survive a cut."""

from secateur.mends.least_squares import DAMPING, aim, refit

__all__ = ["DAMPING", "aim", "refit"]
