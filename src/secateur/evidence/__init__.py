"""Statistics gathered by running calibration data through the network."""

from secateur.evidence.moments import CrossMoments, Influence, Moments
from secateur.evidence.routes import Routes
from secateur.evidence.samples import Samples

__all__ = ["CrossMoments", "Influence", "Moments", "Routes", "Samples"]
