"""Statistics gathered by running calibration data through the network."""

from secateur.evidence.moments import CrossMoments, Influence, Moments

__all__ = ["CrossMoments", "Influence", "Moments"]
