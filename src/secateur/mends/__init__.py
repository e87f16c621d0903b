"""Closed-form repairs of the weights that survive a cut."""

from secateur.mends.least_squares import DAMPING, absorb, aim, centred, refit, silenced
from secateur.mends.low_rank import narrowed_values

__all__ = ["DAMPING", "absorb", "aim", "centred", "narrowed_values", "refit", "silenced"]
