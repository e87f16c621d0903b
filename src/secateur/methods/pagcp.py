"""PAGCP (arXiv:2303.11923): layer by layer, as many channels as the losses of all tasks tolerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets.channels import Units, remaining
from secateur.budgets.channels import counted as counted_in
from secateur.budgets.nested import between
from secateur.budgets.targets import Target
from secateur.errors import refuse
from secateur.evidence.losses import measured
from secateur.graph.spaces import ChannelSpace
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod
from secateur.scores.channels import counted, slices

RATIOS: Final = tuple(step / 20 for step in range(1, 20))
_ALONE: Final = 0.3
"""Share of a space that is silenced to see what it saves."""
_NEAR: Final = 0.01
_TURNS: Final = 12


@dataclass
class Greedy:
    """What one pass over the spaces came to.

    Attributes:
        counts: units that go, by space, in the order in which the spaces were tried.
        value: of each, by how much the worst loss rose for what was saved.
        broke: the task whose loss forbade more, by space; empty where nothing did.
    """

    counts: dict[str, int] = field(default_factory=dict)
    value: dict[str, float] = field(default_factory=dict)
    broke: dict[str, str] = field(default_factory=dict)


class Pagcp(GraphMethod):
    """Take from one space after another what every task's loss allows; the allowance shrinks or grows geometrically."""

    name = "pagcp"
    title = "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs"
    paper = "arXiv:2303.11923"
    data = "labels"

    ranking: Literal["global"] = Field("global", description="spaces are cut one after the other, by the losses")
    start: PositiveFloat = Field(0.05, description="by how much the first space may raise a loss, as a share of it")
    limit: float = Field(5.0, gt=1, description="by how many times all spaces together may raise a loss")
    decay: bool = Field(True, description="whether the allowance changes from space to space as the limit says")
    scale: PositiveFloat | None = Field(
        None, description="what the allowances are multiplied by: found so that the target is met, or 1 as in the paper"
    )
    top: float = Field(
        1.0, gt=0, le=1, description="share of the spaces that are cut: those with the least loss per cost"
    )
    search: Literal["bisect", "all"] = Field(
        "bisect", description="ratios that are tried for a space: by bisection, or one after the other as in the paper"
    )
    size: Literal["l1", "l2"] = Field("l1", description="mean absolute value or mean square of a channel's weights")

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """The mean size of the weights that make a unit, summed over the tensors."""
        return {space.name: _sizes(study, space, self.size) for space in study.spaces}

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        search = _Search(self, study, counted_in(target), self.score(study))
        low, high = search.bracket()
        study.notes.update(scale=search.scale, broke=dict(high.broke), evaluations=search.evaluations)
        order = {name: search.order.index(name) + search.place(name) for name in search.scores}
        return choose(between(study.spaces, search.units(low.counts), search.units(high.counts), order), target)


class _Search:
    """Passes with allowances of several scales; losses that were measured once are remembered."""

    def __init__(self, method: Pagcp, study: ChannelStudy, target: Target, scores: Mapping[str, Tensor]) -> None:
        self._method, self._study, self._target, self.scores = method, study, target, scores
        self._lowest = {name: torch.argsort(each, stable=True).tolist() for name, each in scores.items()}
        self._known: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}
        self.evaluations, self.scale = 0, 1.0
        self._full = self._cost({})
        alone = {
            space.name: self._full - self._cost({space.name: round(_ALONE * space.size)}) for space in study.spaces
        }
        self.decay = decay_of(method.start, method.limit, len(alone)) if method.decay else 1.0
        self.order = sorted(alone, key=lambda name: alone[name], reverse=self.decay <= 1)

    def bracket(self) -> tuple[Greedy, Greedy]:
        """A pass that leaves too much and one that does not, near to each other where the scale is free."""
        wanted, scale = self._target.of(self._full), self._method.scale
        if wanted >= self._full:
            return Greedy(), Greedy()
        if scale is not None:
            self.scale, found = scale, self.run(scale)
            if (least := self._cost(found.counts)) > wanted + _NEAR * self._full:
                refuse(
                    "target-out-of-reach",
                    f"target {self._target}",
                    f"these allowances leave {least / self._full:.3f} of the {self._target.measure}",
                    "ask for that, or larger ones (options start, limit, scale)",
                )
            return Greedy(), found
        low, high = Greedy(), self.run(1.0)
        small, large = 0.0, 1.0
        for _ in range(_TURNS):
            if self._cost(high.counts) <= wanted:
                break
            low, small, large = high, large, large * 4
            high = self.run(large)
        for _ in range(_TURNS):
            if abs(self._cost(low.counts) - self._cost(high.counts)) <= _NEAR * self._full:
                break
            middle = (small * large) ** 0.5 if small else large / 4
            found = self.run(middle)
            small, large, low, high = (
                (middle, large, found, high) if self._cost(found.counts) > wanted else (small, middle, low, found)
            )
        self.scale = large
        return low, high

    def run(self, scale: float) -> Greedy:
        """One pass over the spaces in their order."""
        found, base = Greedy(), self.losses({})
        allowance = scale * self._method.start
        for name in self.order:
            size = self._study.graph.space(name).size
            most = size - max(1, int(np.ceil(self._method.floor * size)))
            counts = sorted({min(int(ratio * size), most) for ratio in RATIOS} - {0})
            trial = _Trial(self, found.counts, name, base, allowance)
            count = _most(counts, trial, self._method.search == "bisect")
            found.broke[name] = trial.broke[min(trial.broke)] if trial.broke else ""
            if count:
                before, after = self.losses(found.counts), self.losses({**found.counts, name: count})
                saved = self._cost(found.counts) - self._cost({**found.counts, name: count})
                rise = max(after[task] - before[task] for task in after)
                found.counts[name], found.value[name] = count, rise / max(saved, 1)
                base = {task: max(base[task], after[task]) for task in base}
            allowance *= self.decay
        best = sorted(found.value, key=found.value.__getitem__)
        for name in best[max(1, round(self._method.top * len(self.order))) :]:
            del found.counts[name]
        return found

    def place(self, name: str) -> Tensor:
        """Where every unit of a space stands in its order, from 0 to 1."""
        size = len(self._lowest[name])
        found = torch.empty(size, dtype=torch.float64)
        found[self._lowest[name]] = torch.arange(size, dtype=torch.float64) / size
        return found

    def units(self, counts: Mapping[str, int]) -> Units:
        """The smallest units of some spaces."""
        return {name: sorted(self._lowest[name][:count]) for name, count in counts.items() if count}

    def _cost(self, counts: Mapping[str, int]) -> int:
        return remaining(self._study.graph, self._target.measure, self.units(counts))

    def losses(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Every task's loss without the smallest units of some spaces."""
        key = tuple(sorted(counts.items()))
        if key not in self._known:
            self.evaluations += 1
            host = self._study.silenced(self.units(counts)).host
            self._known[key] = measured(host, self._study.losses, self._study.data())
        return self._known[key]


@dataclass
class _Trial:
    """Whether a space may lose some units.

    Attributes:
        broke: the task that forbade it, by the number of units.
    """

    search: _Search
    present: Mapping[str, int]
    name: str
    base: Mapping[str, float]
    allowance: float
    broke: dict[int, str] = field(default_factory=dict)

    def __call__(self, count: int) -> bool:
        losses = self.search.losses({**self.present, self.name: count})
        rises = {task: loss / max(self.base[task], 1e-12) - 1 for task, loss in losses.items()}
        worst = max(rises, key=rises.__getitem__)
        if rises[worst] > self.allowance:
            self.broke[count] = worst
        return rises[worst] <= self.allowance


def decay_of(start: float, limit: float, count: int) -> float:
    """The factor from one allowance to the next so that, all used up, prod(1 + start * factor^i) is the limit."""

    def excess(factor: float) -> float:
        return float(np.log1p(start * factor ** np.arange(count)).sum() - np.log(limit))

    if count < 2:
        return 1.0
    low, high = 0.0, 1.0
    if excess(low) >= 0:
        return 0.0
    while excess(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def _most(counts: Sequence[int], bearable: Callable[[int], bool], bisect: bool) -> int:
    """The largest of some rising counts before one that cannot be borne; 0 where the first cannot."""
    if not bisect:
        best = 0
        for count in counts:
            if not bearable(count):
                break
            best = count
        return best
    low, high = -1, len(counts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bearable(counts[middle]) else (low, middle)
    return counts[low] if low >= 0 else 0


def _sizes(study: ChannelStudy, space: ChannelSpace, size: str) -> Tensor:
    """Mean absolute value or mean square of what makes each unit, summed over the tensors, [units]."""
    found = torch.zeros(space.size, dtype=torch.float64)
    for entry in counted(space, ("producer",)):
        value = study.tensor(entry.name)
        each = value.numel() // value.shape[entry.dim] * entry.index.shape[1]
        found += slices(entry, value.abs() if size == "l1" else value.square()) / each
    return found
