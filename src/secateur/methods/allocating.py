"""Sizes of all spaces from their loss-versus-size curves and one budget (ours, for ``joint``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.tradeoff import Table, cheapest, steps
from secateur.families import Sizes
from secateur.families.limits import refusals
from secateur.families.sizes import BlockSizes

_VALUE_STEPS = 16  # of a head's dimensions


class Allocation:
    """Chooses sizes under a budget.

    Args:
        budget: the request.
        curves: ``ffn.I``, ``kv.I`` and ``value.I``: what is lost with so many units of block I gone, in nats.
        values: whether value heads may lose dimensions.
        branches: whether whole branches may go.
        base: sizes to start from, with a narrower stream; the dense ones when omitted.
    """

    def __init__(
        self,
        budget: Budget,
        curves: Mapping[str, Tensor],
        values: bool,
        branches: bool,
        base: Sizes | None = None,
    ) -> None:
        self.budget, self.curves, self.base = budget, curves, base or budget.sizes
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
        for index, (before, after) in enumerate(zip(self.base.blocks, sizes.blocks, strict=False)):
            total += float(self.curves[f"ffn.{index}"][before.ffn - after.ffn])
            total += self._attention_cost(index, before, after.kv, after.value)
        return total

    def _attention_cost(self, index: int, before: BlockSizes, kv: int, value: int) -> float:
        if f"kv.{index}" not in self.curves:
            return 0.0
        lost = float(self.curves[f"kv.{index}"][before.kv - kv])
        if value:
            lost += float(self.curves[f"value.{index}"][self.base.head - value]) * kv
        return lost

    def _at(self, share: float) -> Sizes:
        return self._saving((1 - share) * self._most)

    def _saving(self, need: float) -> Sizes:
        return self._each(need) if self.layered else self._uniform(need)

    # -- blocks that differ ----------------------------------------------------------------------------------------

    @cached_property
    def _options(self) -> list[list[tuple[int, int]]]:
        """(groups, value dimensions) that the attention of each block may keep, all of them first."""
        head = self.base.head
        found = []
        for index, block in enumerate(self.base.blocks):
            groups = range(block.kv, 0, -1) if f"kv.{index}" in self.curves and self._cuts_kv else [block.kv]
            step = max(1, head // _VALUE_STEPS)
            narrow = [0, *range(head - step, 0, -step)] if self._values and f"value.{index}" in self.curves else [0]
            found.append([(kv, value) for kv in groups for value in narrow])
            if self._gone and f"kv.{index}" in self.curves and not self.budget.problems(self._with(index, kv=0)):
                found[-1].append((0, 0))
        return found

    def _saved(self, index: int, **change: Any) -> int:
        """Parameters that a change of one block saves."""
        costs = self.budget.costs
        return costs.params(self.base) - costs.params(self._with(index, **change))

    @cached_property
    def _tables(self) -> list[Table]:
        """Of every block, that of its FFN and that of its attention."""
        tables = []
        for index, block in enumerate(self.base.blocks):
            saving = self._saved(index, ffn=block.ffn - 1)
            curve = self.curves[f"ffn.{index}"]
            tables.append(steps(curve[: len(curve) - self._step], self._step, saving))
            options = self._options[index]
            lost = [self._attention_cost(index, block, *option) for option in options]
            saved = [self._saved(index, kv=kv, value=value) for kv, value in options]
            tables.append(Table(torch.tensor(lost, dtype=torch.float64), torch.tensor(saved, dtype=torch.float64)))
        return tables

    def _each(self, need: float) -> Sizes:
        chosen = cheapest(self._tables, need)
        blocks = []
        for index, block in enumerate(self.base.blocks):
            kv, value = self._options[index][chosen[2 * index + 1]]
            blocks.append(replace(block, ffn=block.ffn - self._step * chosen[2 * index], kv=kv, value=value))
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
