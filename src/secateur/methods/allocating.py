"""Sizes of all spaces from their loss-versus-size curves and one budget (ours, for ``joint``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.tradeoff import Table, cheapest, steps
from secateur.families import Sizes
from secateur.families.limits import refusals
from secateur.families.sizes import BlockSizes
from secateur.methods.branch import GONE

_VALUE_STEPS = 16  # of a head's dimensions
_NO_FFN = GONE["ffn"]
_NOTHING = 1e-12  # nats: the least that a whole branch is taken to lose
_FACTORS = (0.4, 10.0)  # below 1/e a calibrated curve would fall


@dataclass(frozen=True)
class Curves:
    """What the spaces lose with their sizes, in nats per token.

    Second order is right for small cuts; of a whole branch the loss can be measured. Between the two the correction
    grows with the loss: L becomes L f^(L / L_all), f being measured over predicted.

    Attributes:
        lost: ``ffn.I``, ``kv.I`` and ``value.I``: with so many units of block I gone; ``value.I`` for each group.
        factors: f of ``ffn.I`` and ``kv.I``, where it was measured.
    """

    lost: Mapping[str, Tensor]
    factors: Mapping[str, float] = field(default_factory=dict)

    def measured(self, losses: Mapping[str, float]) -> Curves:
        """The same, calibrated by losses without a whole branch."""
        low, high = _FACTORS
        predicted = {name: max(float(self.lost[name][-1]), _NOTHING) for name in losses}
        factors = {name: min(max(loss / predicted[name], low), high) for name, loss in losses.items()}
        return Curves(self.lost, factors)

    def _calibrated(self, name: str, lost: Tensor) -> Tensor:
        share = lost / self.lost[name][-1].clamp(min=_NOTHING)
        return lost * self.factors.get(name, 1.0) ** share

    def ffn(self, block: int) -> Tensor:
        """Of the FFN of a block, [neurons + 1]."""
        name = f"ffn.{block}"
        return self._calibrated(name, self.lost[name])

    def neurons(self, block: int, gone: int) -> float:
        """Of the FFN of a block without some neurons."""
        name = f"ffn.{block}"
        return float(self._calibrated(name, self.lost[name][gone]))

    def has_attention(self, block: int) -> bool:
        """Whether the attention of a block can be cut at all."""
        return f"kv.{block}" in self.lost

    def has_values(self, block: int) -> bool:
        """Whether the values of a block can be cut."""
        return f"value.{block}" in self.lost

    def attention(self, block: int, gone: int, kv: int, dropped: int) -> float:
        """Of the attention of a block without some groups, the others without some value dimensions."""
        if not self.has_attention(block):
            return 0.0
        name = f"kv.{block}"
        lost = self.lost[name][gone]
        if dropped:
            lost = lost + self.lost[f"value.{block}"][dropped] * kv
        return float(self._calibrated(name, lost))

    def whole(self, block: int) -> float:
        """Of a whole block."""
        return self.attention(block, -1, 0, 0) + self.neurons(block, -1)


class Allocation:
    """Chooses sizes under a budget.

    Args:
        budget: the request.
        curves: what is lost.
        values: whether value heads may lose dimensions.
        branches: whether whole branches may go.
        base: sizes to start from, with a narrower stream or fewer blocks; the dense ones when omitted.
        places: which dense blocks those of ``base`` are; all when omitted.
    """

    def __init__(
        self,
        budget: Budget,
        curves: Curves,
        values: bool,
        branches: bool,
        base: Sizes | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.budget, self.curves, self.base = budget, curves, base or budget.sizes
        self.places = range(len(self.base.blocks)) if places is None else places
        self.layered = budget.layout == "per-layer"
        self._cuts_kv = not refusals(budget.architecture, "kv", budget.layout)
        self._step = budget.step("ffn")
        self._values = values and self.layered and not budget.problems(self._with(0, value=max(1, self.base.head - 1)))
        self._gone = branches and self.layered

    def _with(self, index: int, **change: Any) -> Sizes:
        """The sizes to start from with one block changed."""
        blocks = (replace(block, **change) if i == index else block for i, block in enumerate(self.base.blocks))
        return replace(self.base, blocks=tuple(blocks))

    def solve(self, part: float) -> Sizes:
        """Sizes that meet the budget, or go ``part`` of the way there."""
        final = self.budget.solve_along(self._at, "all spaces together")
        if part == 1:
            return final
        costs = self.budget.costs
        return self._saving(part * (costs.params(self.base) - costs.params(final)))

    def predicted(self, sizes: Sizes) -> float:
        """What the curves say that sizes lose, in nats per token."""
        total = 0.0
        for place, before, after in zip(self.places, self.base.blocks, sizes.blocks, strict=True):
            total += self.curves.neurons(place, before.ffn - after.ffn)
            total += self._attention_cost(place, before, after.kv, after.value)
        return total

    def _attention_cost(self, place: int, before: BlockSizes, kv: int, value: int) -> float:
        return self.curves.attention(place, before.kv - kv, kv, self.base.head - value if value else 0)

    def _at(self, share: float) -> Sizes:
        return self._saving((1 - share) * self._most)

    def _saving(self, need: float) -> Sizes:
        return self._each(need) if self.layered else self._uniform(need)

    # -- blocks that differ ----------------------------------------------------------------------------------------

    @cached_property
    def _options(self) -> list[list[tuple[int, int]]]:
        """(groups, value dimensions) that the attention of each block may keep, all of them first."""
        head, curves = self.base.head, self.curves
        found = []
        for index, (place, block) in enumerate(zip(self.places, self.base.blocks, strict=True)):
            groups = range(block.kv, 0, -1) if curves.has_attention(place) and self._cuts_kv else [block.kv]
            step = max(1, head // _VALUE_STEPS)
            narrow = [0, *range(head - step, 0, -step)] if self._values and curves.has_values(place) else [0]
            found.append([(kv, value) for kv in groups for value in narrow])
            if (
                self._gone
                and index != self._attends
                and not self.budget.problems(self._with(index, **GONE["attention"]))
            ):
                found[-1].append((0, 0))
        return found

    @cached_property
    def _attends(self) -> int | None:
        """The block whose attention stays, without which no model works: of those that can stay alone the dearest."""
        blocks = self.base.blocks
        every = [replace(block, **GONE["attention"]) for block in blocks]
        dearest = sorted(
            (index for index, place in enumerate(self.places) if self.curves.has_attention(place)),
            key=lambda index: -self.curves.attention(self.places[index], -1, 0, 0),
        )
        for index in dearest:
            alone = (*every[:index], blocks[index], *every[index + 1 :])
            if not self.budget.problems(replace(self.base, blocks=alone)):
                return index
        return dearest[0] if dearest else None

    def _saved(self, index: int, **change: Any) -> int:
        """Parameters that a change of one block saves."""
        costs = self.budget.costs
        return costs.params(self.base) - costs.params(self._with(index, **change))

    @cached_property
    def _tables(self) -> list[Table]:
        """Of every block, that of its FFN and that of its attention."""
        tables = []
        for index, (place, block) in enumerate(zip(self.places, self.base.blocks, strict=True)):
            saving, curve = self._saved(index, ffn=block.ffn - 1), self.curves.ffn(place)
            widths = steps(curve[: len(curve) - self._step], self._step, saving)
            if self._gone and not block.shared and not self.budget.problems(self._with(index, **_NO_FFN)):
                widths = widths.more(float(curve[-1]), self._saved(index, **_NO_FFN))
            tables.append(widths)
            options = self._options[index]
            lost = [self._attention_cost(place, block, *option) for option in options]
            saved = [self._saved(index, kv=kv, value=value) for kv, value in options]
            tables.append(Table(torch.tensor(lost, dtype=torch.float64), torch.tensor(saved, dtype=torch.float64)))
        return tables

    def _each(self, need: float) -> Sizes:
        chosen = cheapest(self._tables, need)
        blocks = []
        for index, block in enumerate(self.base.blocks):
            kv, value = self._options[index][chosen[2 * index + 1]]
            ffn = block.ffn - self._step * chosen[2 * index]
            blocks.append(replace(block, kv=kv, value=value, **({"ffn": ffn} if ffn >= self._step else _NO_FFN)))
        return replace(self.base, blocks=tuple(blocks))

    # -- blocks that are all alike ---------------------------------------------------------------------------------

    def _uniform(self, need: float) -> Sizes:
        """The same sizes in every block: of every number of groups, the neurons take the rest."""
        sizes = self.base
        groups = range(sizes.size("kv"), 0, -1) if self._cuts_kv else [sizes.size("kv")]
        bases = (sizes.resized("kv", count) if count < sizes.size("kv") else sizes for count in groups)
        found = [filled for base in bases if (filled := self._filled(base, need)) is not None]
        return min(found, key=self.predicted, default=sizes)

    def _filled(self, base: Sizes, need: float) -> Sizes | None:
        """The FFN width with which sizes save what is needed; None where none does."""
        costs, full = self.budget.costs, base.size("ffn")
        dense = costs.params(self.base)
        rest = need - (dense - costs.params(base))
        saving = costs.params(base) - costs.params(base.resized("ffn", full - self._step))
        count = round(rest / saving)
        if count < 0 or full - count * self._step < self._step:
            return None
        found = base.resized("ffn", full - count * self._step) if count else base
        return None if self.budget.problems(found) else found

    @cached_property
    def _most(self) -> float:
        """The most parameters that can go."""
        costs, sizes = self.budget.costs, self.base
        if self.layered:
            return float(sum(float(table.savings.max()) for table in self._tables))
        least = sizes.resized("ffn", self._step)
        if self._cuts_kv:
            least = least.resized("kv", 1)
        return float(costs.params(sizes) - costs.params(least))
