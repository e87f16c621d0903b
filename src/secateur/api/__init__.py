"""The Python door."""

from secateur.api.exporting import export
from secateur.api.facts import evaluate, families, inspect, load, methods
from secateur.api.previewing import preview
from secateur.api.pruning import PruneResult, prune

__all__ = ["PruneResult", "evaluate", "export", "families", "inspect", "load", "methods", "preview", "prune"]
