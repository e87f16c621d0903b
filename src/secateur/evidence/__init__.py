"""Statistics gathered by running calibration data through the network."""

from secateur.evidence.gram import GramCollector

__all__ = ["GramCollector"]
