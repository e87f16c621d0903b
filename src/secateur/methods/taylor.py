"""Methods that cut groups by Taylor scores, in one or more steps of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.shares import cuttable
from secateur.cuts.stream import SHARED
from secateur.errors import refuse
from secateur.families import Kind, Sizes
from secateur.families.roles import MATRICES, writes_stream
from secateur.methods.base import Derivative, Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.methods.selection import with_dimensions
from secateur.plans import Chart, Plan
from secateur.scores.taylor import SQUARES, Order, Reduction, reduced, unit_saliency
from secateur.spaces import Space, all_spaces

_READERS = ("down", "out")
_WRITERS = tuple(role for role in MATRICES if writes_stream(role))


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
    reduction: Reduction = Field(
        "sum", description="how a group's matrices are put together; first: the gate, k, or the embedding"
    )

    def kinds(self, budget: Budget) -> list[Kind]:
        """Kinds of the groups that go."""
        wanted: dict[str, list[Kind]] = {"ffn": ["ffn"], "kv": ["kv", "heads"]}
        return cuttable(budget, [kind for name in self.targets.split("+") for kind in wanted[name]])


class Groups:
    """The groups that are still there, and what they scored last.

    A group may also be a dimension of the residual stream, with all that reads and writes it.

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
        if "residual" in self.kinds:
            wanted = (*wanted, "tables")
        parts: dict[str, dict[str, Tensor]] = {space.name: {} for space in self.spaces}
        for found in self._study.trials.gradients(self.edits(), wanted):
            if found.place is not None:
                self.influence[found.place] = found.influence[0]
            here = [space for space in self.spaces if space.kind == "residual" or space.place == found.place]
            if not here:
                continue
            view = self._study.view(found.place, None)
            for space in here:
                members = [m for m in view.members(space) if m.tensor.name in found.mean]
                parts[space.name] |= unit_saliency(members, space.size, found.mean, found.squares, method.taylor)
        for space in self.spaces:
            scores, alive = reduced(parts[space.name], method.reduction).cpu(), self.alive[space.name]
            if not torch.isfinite(scores).all():
                hint = "try --dtype float32, or look at the checkpoint"
                refuse("not-finite", "the gradients", f"scores of {space.name} are not finite", hint)
            self.scores[space.name][alive] = scores[alive]

    def edits(self) -> dict[str, Tensor]:
        """The matrices that read units which are gone, or write dimensions of the stream that are, zero there."""
        found: dict[str, Tensor] = {}
        for space in self.spaces:
            if len(self.alive[space.name]) < space.size:
                mask = torch.zeros(space.size, dtype=torch.bool)
                mask[self.alive[space.name]] = True
                if space.kind == "residual":
                    found |= self._written(space, mask)
                else:
                    reader = self._study.view(space.place, _READERS).reader(space)
                    found[reader.name] = reader.values * mask.repeat_interleave(reader.span)
        return found

    def _written(self, space: Space, mask: Tensor) -> dict[str, Tensor]:
        """All that writes the stream, masked there."""
        found = {}
        for place in self._study.budget.architecture.places:
            for member in self._study.view(place, _WRITERS).members(space):
                rows = mask[:, None] if member.axis == 0 and member.values.ndim > 1 else mask
                found[member.tensor.name] = member.values * rows
        return found

    def shrink(self, after: Sizes, part: float = 1.0) -> None:
        """Let the lowest go: all down to the sizes ``after``, or a part of the way."""
        sizes = {space.name: space.size for kind in self.kinds for space in all_spaces(after, kind)}
        if "residual" in sizes:
            sizes["residual"] = after.directions(SHARED)
        for name, alive in self.alive.items():
            count = round(len(alive) - part * (len(alive) - sizes[name]))
            self.alive[name] = alive[keep_best(self.scores[name][alive], min(count, len(alive)))]

    def plan(self, after: Sizes, notes: Mapping[str, Any], charts: Sequence[Chart] = ()) -> Plan:
        """The decision: what is there."""
        found = (*charts, *score_charts(self.scores, self.alive))
        if "residual" in self.kinds:
            made = Plan(self._study.budget.sizes, after, notes=notes, charts=found)
            return with_dimensions(made, self.alive["residual"])
        return Plan(self._study.budget.sizes, after, dict(self.alive), notes=notes, charts=found)
