"""D-Pruner: what a domain's loss needs, and what a weight is worth in general (arXiv:2405.06275; re-derived)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from secateur.families import place_name
from secateur.mends import DAMPING
from secateur.methods.base import Study
from secateur.methods.domains import Domain
from secateur.methods.ranked import summary_of
from secateur.methods.saliency import places_of
from secateur.plans import Edits
from secateur.scores.weights import obs_scores
from secateur.spaces import BlockView
from secateur.spaces.weights import input_key, matrices_of


class DPruner(Domain):
    """Second-order Taylor of the domain's loss, with a penalty on leaving weights that matter in general.

    The authors' code was never released. Their penalty, lambda E (w' - w)^2 with E the error of Optimal Brain Surgeon,
    has neither value nor gradient where w' = w: it acts through its curvature, or after a virtual step.
    """

    name = "d_pruner"
    title = "Pruning as a Domain-specific LLM Extractor"
    paper = "arXiv:2405.06275"

    allocation: Literal["uniform", "block", "global", "lamp"] = Field(
        "uniform", description="how much every matrix keeps: the same share, or what one ranking leaves"
    )
    penalty: Literal["curvature", "step", "none"] = Field(
        "curvature",
        description="how general importance acts: as curvature, on the gradient behind a virtual step, not",
    )
    strength: NonNegativeFloat = Field(
        1.0, description="lambda: of general importance; at 1 its term is on average as large as that of the slope"
    )
    rate: PositiveFloat = Field(0.1, description="length of the virtual step, times the scaled penalty")
    damping: PositiveFloat = Field(DAMPING, description="ridge of the general Hessian over the mean of its diagonal")

    @property
    def evidence(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"inputs.gram"})

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """General importance: what the output of a matrix loses without a weight, over the mean of the matrix."""
        found = {}
        for matrix in matrices_of(view.architecture, view.place, self.part):
            gram = evidence[f"{input_key(view.architecture, matrix)}.gram"]
            errors = obs_scores(view.tensors[matrix.name], gram, self.damping)
            found[matrix.name] = (errors / errors.mean().clamp(min=1e-300)).float()
        return found

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        found = study.trials_on("domain").gradients(weights, wanted=("mean", "squares"))
        for place, each, names in places_of(found, weights):
            scores = {}
            for name in names:
                general = summary_of(study, name)
                scores[name] = self.importance(weights[name], each.mean[name], each.squares[name], general)
            into.write(place_name(place), scores)

    def importance(self, weight: Tensor, gradient: Tensor, fisher: Tensor, general: Tensor) -> Tensor:
        """|g w - 1/2 F w^2| with the penalty in g and F, or in F alone.

        Args:
            general: importance of mean 1, [out, in].
        """
        wide, slope, curvature = weight.float(), gradient.float(), fisher.float()
        if self.penalty == "step":
            shrink = 1 - 2 * self.rate * self.strength * general
            slope, curvature = slope * shrink, curvature * shrink.square()
        elif self.penalty == "curvature":
            # as it stands, the curvature of a trained network is lost beside its slope: on average they are made equal
            level = (slope * wide).abs().mean() / (general * wide.square()).mean().clamp(min=1e-30) * self.strength
            curvature = curvature + 2 * level * general
        return (slope * wide - 0.5 * curvature * wide.square()).abs()
