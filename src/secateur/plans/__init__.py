"""The immutable, serialisable decision: what is kept, in which basis, and the sizes that follow."""

from secateur.plans.chart import Chart, points_of
from secateur.plans.lazy import PlaceAtATime
from secateur.plans.plan import Artifact, Edits, FactorFiles, Masks, Mend, Overlay, Plan

__all__ = [
    "Artifact",
    "Chart",
    "Edits",
    "FactorFiles",
    "Masks",
    "Mend",
    "Overlay",
    "PlaceAtATime",
    "Plan",
    "points_of",
]
