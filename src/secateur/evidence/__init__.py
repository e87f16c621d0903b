"""Statistics gathered by running calibration data through the network."""

from secateur.evidence.moments import Influence, Moments

__all__ = ["Influence", "Moments"]
