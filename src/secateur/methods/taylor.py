"""Methods that cut groups of FFN neurons and heads by Taylor scores, in one or more steps of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.shares import cuttable
from secateur.errors import refuse
from secateur.families import Kind, Sizes
from secateur.methods.base import Derivative, Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.plans import Chart, Plan
from secateur.scores.taylor import SQUARES, Order, Reduction, unit_saliency
from secateur.spaces import all_spaces

_READERS = ("down", "out")


class TaylorGroups(Method):
    """A group is an FFN neuron with its rows and its column, or a key/value head with its query heads and columns."""

    data = "text"

    targets: Literal["ffn+kv", "ffn", "kv"] = Field(
        "ffn+kv", description="groups that go: FFN neurons, key/value heads, or those of both that the layout can cut"
    )
    taylor: Order = Field(
        "param_first",
        description="importance of a weight: of its row (vectorize), first order, second order (squared gradients of "
        "every window), both, or (ours) the first order of every window, so that signs do not cancel",
    )
    reduction: Reduction = Field("sum", description="how a group's matrices are put together; first: the gate, or k")

    def kinds(self, budget: Budget) -> list[Kind]:
        """Kinds of the groups that go."""
        wanted: dict[str, list[Kind]] = {"ffn": ["ffn"], "kv": ["kv", "heads"]}
        return cuttable(budget, [kind for name in self.targets.split("+") for kind in wanted[name]])


class Groups:
    """The groups that are still there, and what they scored last.

    Args:
        study: gives the gradients.
        method: says how they are scored.

    Attributes:
        kinds: of the groups.
        spaces: that hold them.
        alive: remaining units, ascending, by space.
        scores: by space; those of units that went are what they went with.
        influence: 1 - cos of every block at the last sweep, [blocks].
    """

    def __init__(self, study: Study, method: TaylorGroups) -> None:
        self._study, self._method = study, method
        sizes = study.budget.sizes
        self.kinds = method.kinds(study.budget)
        self.spaces = [space for kind in self.kinds for space in all_spaces(sizes, kind) if space.size]
        self.alive = {space.name: torch.arange(space.size) for space in self.spaces}
        self.scores = {space.name: torch.zeros(space.size, dtype=torch.float64) for space in self.spaces}
        self.influence = torch.zeros(len(sizes.blocks), dtype=torch.float64)

    def measure(self) -> None:
        """Score what is there by gradients of the network without what is not."""
        method, self.influence = self._method, torch.zeros_like(self.influence)
        wanted: tuple[Derivative, ...] = ("mean", "squares") if method.taylor in SQUARES else ("mean",)
        for found in self._study.trials.gradients(self.edits(), wanted):
            if found.place is None:
                continue
            view = self._study.view(found.place, None)
            self.influence[found.place] = found.influence[0]
            for space in (space for space in self.spaces if space.place == found.place):
                members, alive = view.members(space), self.alive[space.name]
                given = (found.mean, found.squares, method.taylor, method.reduction)
                scores = unit_saliency(members, space.size, *given).cpu()
                if not torch.isfinite(scores).all():
                    hint = "try --dtype float32, or look at the checkpoint"
                    refuse("not-finite", "the gradients", f"scores of {space.name} are not finite", hint)
                self.scores[space.name][alive] = scores[alive]

    def edits(self) -> dict[str, Tensor]:
        """The matrices that read units which are gone, zero there."""
        found: dict[str, Tensor] = {}
        for space in self.spaces:
            if len(self.alive[space.name]) < space.size:
                reader = self._study.view(space.place, _READERS).reader(space)
                mask = torch.zeros(space.size, dtype=torch.bool)
                mask[self.alive[space.name]] = True
                found[reader.name] = reader.values * mask.repeat_interleave(reader.span)
        return found

    def shrink(self, after: Sizes, part: float = 1.0) -> None:
        """Let the lowest go: all down to the sizes ``after``, or a part of the way."""
        sizes = {space.name: space.size for kind in self.kinds for space in all_spaces(after, kind)}
        for name, alive in self.alive.items():
            count = round(len(alive) - part * (len(alive) - sizes[name]))
            self.alive[name] = alive[keep_best(self.scores[name][alive], min(count, len(alive)))]

    def plan(self, after: Sizes, notes: Mapping[str, Any], charts: Sequence[Chart] = ()) -> Plan:
        """The decision: what is there."""
        found = (*charts, *score_charts(self.scores, self.alive))
        return Plan(self._study.budget.sizes, after, dict(self.alive), notes=notes, charts=found)
