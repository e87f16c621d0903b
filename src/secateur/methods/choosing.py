"""Which blocks stay, how wide the stream is, and what every other space keeps (ours, for ``joint``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.cuts.stream import SHARED
from secateur.errors import RequestError
from secateur.families import Sizes
from secateur.families.limits import refusals
from secateur.families.roles import TABLES
from secateur.methods.allocating import Allocation, Curves
from secateur.methods.base import Study
from secateur.methods.branch import Branch
from secateur.methods.narrowing import stream_curve, stream_widths
from secateur.plans import Plan

_PARTS = {"kv": "attention", "ffn": "ffn"}  # the branch at the end of a curve


@dataclass(frozen=True)
class Choice:
    """Sizes of the stream and of the depth, and what allocates the rest beside them.

    Attributes:
        allocation: of what the other spaces keep.
        lost: what the stream and the depth cost, in nats per token.
        bases: of the stream.
        edits: of the tables that write it.
    """

    allocation: Allocation
    lost: float = 0.0
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Mapping[str, Tensor] = field(default_factory=dict)

    def plan(self, part: float) -> Plan:
        """The sizes that meet the budget, or go ``part`` of the way there."""
        allocation = self.allocation
        before, after = allocation.budget.sizes, allocation.solve(part)
        notes = {
            "predicted_loss": round(self.lost + allocation.predicted(after), 4),
            "calibration": {name: round(factor, 4) for name, factor in allocation.curves.factors.items()},
        }
        whole = len(allocation.places) == len(before.blocks)
        kept = {} if whole else {"blocks": torch.tensor(allocation.places)}
        return Plan(before, after, kept, bases=self.bases, edits=self.edits, notes=notes)


@dataclass
class Choosing:
    """Chooses from curves what costs least.

    Attributes:
        study: the budget, the stream's statistics, the trials.
        curves: what the spaces lose with their sizes.
        values: whether value heads may lose dimensions.
        branches: whether whole branches (per-layer) or blocks (native) may go.
        trials: losses that may be measured.
    """

    study: Study
    curves: Curves
    values: bool
    branches: bool
    trials: int

    def first(self) -> Choice:
        """The cheapest choice. No branch goes on a second-order estimate alone: each is tried, then chosen anew."""
        lost: dict[str, float] = {}
        dense = None
        while True:
            self.curves = self.curves.measured(lost)
            choice = self._cheapest()
            room = max(0, self.trials - 1 - len(lost))
            untried = [name for name in _ends(choice.allocation) if name in self.curves.lost and name not in lost][
                :room
            ]
            if not untried:
                return choice
            dense = self.study.trials.settle() if dense is None else dense
            for number, name in enumerate(untried, 1):
                self.study.progress(number, len(untried), "trial")
                kind, _, block = name.partition(".")
                lost[name] = self.study.trials.loss(Branch(int(block), (_PARTS[kind],)).silent(self.study)) - dense

    def again(self, previous: Plan) -> Choice:
        """A later round: the stream and the depth are as they were, the curves corrected as they were."""
        self.curves = replace(self.curves, factors=previous.notes["calibration"])
        base = self.study.budget.sizes.kept_blocks(previous.blocks)
        base = replace(base, residual=previous.after.residual, tied=previous.after.tied)
        return Choice(self._allocation(base, previous.blocks), bases=previous.bases)

    def _allocation(self, base: Sizes, blocks: Sequence[int]) -> Allocation:
        return Allocation(self.study.budget, self.curves, self.values, self.branches, base, blocks)

    def _cheapest(self) -> Choice:
        """Of all numbers of blocks and widths of the stream those with which everything is expected to lose least."""
        sizes, summaries = self.study.budget.sizes, self.study.summaries
        directions, stream = stream_curve(self.study) if "stream" in summaries else (torch.zeros(0), None)
        best, least = None, float("inf")
        for base, blocks, lost in self._bases(stream):
            if lost >= least:
                continue
            allocation = self._allocation(base, blocks)
            with suppress(RequestError):  # the target lies elsewhere
                expected = lost + allocation.predicted(allocation.solve(1))
                if expected < least:
                    best, least = Choice(allocation, lost), expected
        if best is None:  # says what can be reached
            best = Choice(self._allocation(sizes, range(len(sizes.blocks))))
            best.allocation.solve(1)
        width = best.allocation.base.residual
        if width == sizes.residual:
            return best
        basis = directions[:, :width].contiguous()
        tables = self.study.view(None, TABLES).tensors
        edits = {name: table.double() @ basis @ basis.t() for name, table in tables.items()}
        return replace(best, bases={SHARED: basis}, edits=edits)

    def _bases(self, stream: Tensor | None) -> Iterator[tuple[Sizes, Sequence[int], float]]:
        """Sizes to start from, their blocks, and what is lost by then; a narrower stream has a head of its own."""
        budget = self.study.budget
        for blocks, lost in self._depths():
            base = budget.sizes.kept_blocks(blocks)
            yield base, blocks, lost
            if stream is None:
                continue
            for width in stream_widths(budget, base.untied()):
                yield replace(base.untied(), residual=width), blocks, lost + float(stream[width])

    def _depths(self) -> Iterator[tuple[list[int], float]]:
        """Which blocks stay without 0, 1, 2... of them, and what that costs; none goes in the per-layer layout."""
        budget = self.study.budget
        blocks, lost = list(range(len(budget.sizes.blocks))), 0.0
        yield blocks, lost
        if not self.branches or budget.layout != "native" or refusals(budget.architecture, "blocks", "native"):
            return
        for gone in sorted(blocks, key=self.curves.whole)[:-1]:
            blocks, lost = [block for block in blocks if block != gone], lost + self.curves.whole(gone)
            if not budget.problems(budget.sizes.kept_blocks(blocks)):
                yield blocks, lost


def _ends(allocation: Allocation) -> list[str]:
    """The curves whose end is chosen: those of the branches that will not be there any more."""
    left = dict(zip(allocation.places, allocation.solve(1).blocks, strict=True))
    places = range(len(allocation.budget.sizes.blocks))
    return [
        f"{kind}.{block}"
        for block in places
        for kind, branch in _PARTS.items()
        if block not in left or not left[block].has(branch)
    ]
