"""SNIP and GraSP: what the loss, or its gradient, would feel if a weight went."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.families import place_name
from secateur.methods.base import Study
from secateur.methods.saliency import Saliency
from secateur.plans import Edits
from secateur.plans.lazy import OneAtATime


class Snip(Saliency):
    """|w dL/dw|: how much the loss changes with a gate on the weight."""

    name = "snip"
    title = "SNIP: Single-shot Network Pruning based on Connection Sensitivity"
    paper = "arXiv:1810.02340"
    data = "text"

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        for found in study.trials.gradients(weights):
            mean = {name: gradient for name, gradient in found.mean.items() if name in weights}
            if mean:
                into.write(place_name(found.place), {n: (weights[n].to(g) * g).abs().float() for n, g in mean.items()})


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
        assert study.store is not None
        gradient = self._gradients(study, weights, "gradient")
        length = {
            n: float(sum(of[name].double().square().sum() for name in weights) ** 0.5)
            for n, of in (("w", weights), ("g", gradient))
        }
        reach = self.step * length["w"] / max(length["g"], 1e-300)
        sides = []
        for sign, name in ((reach, "ahead"), (-reach, "behind")):
            moved = OneAtATime(list(weights), partial(_moved, weights, gradient, sign))
            sides.append(self._gradients(study, moved, name))
        by_place: dict[str, list[str]] = {}
        for name in weights:
            by_place.setdefault(".".join(name.split(".")[:2]), []).append(name)
        for place, names in by_place.items():
            change = {n: (sides[0][n] - sides[1][n]) / (2 * reach) for n in names}
            into.write(place, {n: weights[n].float() * change[n] for n in names})

    def _gradients(self, study: Study, weights: Mapping[str, Tensor], name: str) -> Edits:
        assert study.store is not None
        store = study.store(name)
        for found in study.trials.gradients(weights):
            mean = {n: gradient.float() for n, gradient in found.mean.items() if n in weights}
            if mean:
                store.write(place_name(found.place), mean)
        return store


def _moved(weights: Mapping[str, Tensor], along: Mapping[str, Tensor], reach: float, name: str) -> Tensor:
    return weights[name].float() + reach * along[name]
