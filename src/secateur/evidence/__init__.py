"""Statistics gathered by running calibration data through the network."""

from secateur.evidence.moments import CrossMoments, Influence, Moments
from secateur.evidence.routes import Routes
from secateur.evidence.samples import Samples
from secateur.evidence.totals import Later, Total

__all__ = ["CrossMoments", "Influence", "Later", "Moments", "Routes", "Samples", "Total"]
