"""SPA, Structurally Prune Anything (arXiv:2403.18955): any criterion, gathered over all that goes with a channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.evidence.batches import samples
from secateur.evidence.flow import synaptic_flow
from secateur.evidence.gradients import Slope, Slopes
from secateur.evidence.signals import Signal, channel_signals
from secateur.graph.spaces import ChannelSpace
from secateur.methods.base import Data
from secateur.methods.channels import ChannelStudy
from secateur.methods.rescored import Rescored
from secateur.scores.channels import (
    Aggregation,
    Normaliser,
    aggregated,
    counted,
    distances,
    normalised,
    slices,
    unit_scores,
)

Criterion = Literal[
    "l1", "l2", "fpgm", "bn", "random", "taylor", "gate", "snip", "grasp", "synflow", "hessian", "activation"
]
_LABELS: Final = ("taylor", "gate", "snip", "grasp", "hessian")


class Spa(Rescored):
    """Delete the coupled channels whose weights are worth least."""

    name = "spa"
    title = "Structurally Prune Anything"
    paper = "arXiv:2403.18955"

    score_by: Criterion = Field(
        "l1",
        description="what an entry of a weight is worth: its absolute value, its square, the scale of its batch norm "
        "alone (all weights where there is none); what the loss says of it (taylor, gate, snip, grasp, hessian), what "
        "flows through it (synflow); how far its filter is from the others (fpgm); how large its signal is (activation)"
        "; or units at random",
    )
    aggregation: Aggregation = Field("mean", description="how the sums over a unit's slices become one")
    normaliser: Normaliser = Field(
        "mean", description="what of its space a score is divided by, or how else it is made comparable with others"
    )
    signal: Signal = Field("mean", description="activation: the mean size of a signal, or its variance")

    @property
    def data(self) -> Data:  # type: ignore[override]
        return "labels" if self.score_by in _LABELS else "inputs" if self.score_by == "activation" else super().data

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.score_by == "random"

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        if self.score_by == "random":
            return {s.name: torch.rand(s.size, generator=study.generator, dtype=torch.float64) for s in study.spaces}
        if self.score_by == "fpgm":
            return self._of_spaces(study, lambda space: _redundancy(study, space))
        if self.score_by == "activation":
            found = channel_signals(study.host, study.spaces, study.data(), self.signal)
            return self._of_spaces(study, found.__getitem__)
        if self.score_by == "gate":
            squares = _gates(study)
            return self._of_spaces(study, lambda space: [squares[space.name]])
        worth, roles = self._worth(study), ("norm",) if self.score_by == "bn" else ()
        return {
            space.name: unit_scores(space, worth, self.aggregation, self.normaliser, roles) for space in study.spaces
        }

    def _of_spaces(self, study: ChannelStudy, parts: Callable[[ChannelSpace], list[Tensor]]) -> dict[str, Tensor]:
        """Scores of parts that are not sums over slices; a space without any is left alone."""
        found = {space.name: parts(space) for space in study.spaces}
        return {
            name: normalised(aggregated(each, self.aggregation), self.normaliser)
            for name, each in found.items()
            if each
        }

    def _worth(self, study: ChannelStudy) -> Callable[[str], Tensor]:
        """What every entry of a parameter is worth."""
        if self.score_by in ("l1", "bn"):
            return lambda name: study.tensor(name).abs()
        if self.score_by == "l2":
            return lambda name: study.tensor(name).square()
        return worths(study, self.score_by).__getitem__


def worths(study: ChannelStudy, criterion: str) -> Mapping[str, Tensor]:
    """What every entry w of every parameter is worth, by slopes g of the loss.

    ``taylor``: (w g)^2 (arXiv:1906.10771), a mean over batches. ``snip``: |w E[g]| (arXiv:1810.02340). ``grasp``:
    w (H g), what stays of the slope's length (arXiv:2002.07376). ``hessian``: w^2 E[g^2] / 2, the diagonal of Gauss and
    Newton, E over samples. ``synflow``: |w| dR/d|w|.
    """
    if criterion == "synflow":
        return synaptic_flow(study.host, study.example)
    slope = Slope(study.host, study.loss)
    point = {name: value.detach().double() for name, value in slope.point.items()}
    if criterion == "taylor":
        return slope.mean(study.data(), lambda g: {name: (point[name] * each).square() for name, each in g.items()})
    if criterion == "hessian":
        squares = slope.mean(samples(study.data()), lambda g: {name: each.square() for name, each in g.items()})
        return {name: point[name].square() * each / 2 for name, each in squares.items()}
    mean = slope.mean(study.data())
    if criterion == "snip":
        return {name: (point[name] * each).abs() for name, each in mean.items()}
    return {name: point[name] * each for name, each in slope.along(mean, study.data()).items()}


def _gates(study: ChannelStudy) -> dict[str, Tensor]:
    """The square of the loss's slope by a gate on every unit, mean over samples (arXiv:1906.10771, sec. 3.1).

    What reads a unit is linear in it, so the slope by its gate is the sum of w g over all that reads it; where nothing
    does, over what makes it.
    """
    slope = Slope(study.host, study.loss)
    point = {name: value.detach() for name, value in slope.point.items()}

    def squares(found: Slopes) -> dict[str, Tensor]:
        return {
            space.name: torch.stack(
                [slices(entry, point[entry.name] * found[entry.name]) for entry in counted(space, ("consumer",))]
            )
            .sum(0)
            .square()
            for space in study.spaces
        }

    return slope.mean(samples(study.data()), squares)


def _redundancy(study: ChannelStudy, space: ChannelSpace) -> list[Tensor]:
    return [distances(entry, study.tensor(entry.name)) for entry in counted(space, ("producer",))]
