"""SNIP and GraSP: what the loss, or its gradient, would feel if a weight went."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.families import place_name
from secateur.methods.base import Study
from secateur.methods.saliency import Saliency, places_of, stored_gradients
from secateur.plans import Edits
from secateur.plans.lazy import OneAtATime


class Snip(Saliency):
    """|w dL/dw|: how much the loss changes with a gate on the weight."""

    name = "snip"
    title = "SNIP: Single-shot Network Pruning based on Connection Sensitivity"
    paper = "arXiv:1810.02340"
    data = "text"

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        for place, found, names in places_of(study.trials.gradients(weights), weights):
            slopes = {name: (weights[name].to(found.mean[name]) * found.mean[name]).abs().float() for name in names}
            into.write(place_name(place), slopes)


class Grasp(Saliency):
    """w (H g): keep the weights without which the gradient would be smaller."""

    name = "grasp"
    title = "Picking Winning Tickets Before Training by Preserving Gradient Flow"
    paper = "arXiv:2002.07376"
    data = "text"

    step: PositiveFloat = Field(
        1e-2,
        description="step along the gradient that shows H g, over the length of all weights",
    )

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        (gradient,) = stored_gradients(study, study.trials, weights, "gradient", ("mean",))
        length = {
            n: float(sum(of[name].double().square().sum() for name in weights) ** 0.5)
            for n, of in (("w", weights), ("g", gradient))
        }
        reach = self.step * length["w"] / max(length["g"], 1e-300)
        sides: list[Edits] = []
        for sign, label in ((reach, "ahead"), (-reach, "behind")):
            moved = OneAtATime(list(weights), partial(_moved, weights, gradient, sign))
            sides += stored_gradients(study, study.trials, moved, label, ("mean",))
        ahead, behind = sides

        def score(name: str) -> Tensor:
            return weights[name].float() * ((ahead[name] - behind[name]) / (2 * reach))

        into.write_all(OneAtATime(list(weights), score))


def _moved(weights: Mapping[str, Tensor], along: Mapping[str, Tensor], reach: float, name: str) -> Tensor:
    return weights[name].float() + reach * along[name]
