"""Spend a budget where it costs least: one choice from each of several tables of (cost, saving)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 80


@dataclass(frozen=True)
class Table:
    """Choices of one place; the first costs and saves nothing.

    Attributes:
        costs: [choices], what each loses.
        savings: [choices], what each saves.
        fine: whether the choices are small steps in order, with which a rest is filled up.
    """

    costs: Tensor
    savings: Tensor
    fine: bool = False

    def more(self, cost: float, saving: float) -> Table:
        """The table with one choice more."""
        costs, savings = self.costs.new_tensor([cost]), self.savings.new_tensor([saving])
        return Table(torch.cat([self.costs, costs]), torch.cat([self.savings, savings]), self.fine)


def cheapest(tables: Sequence[Table], need: float) -> list[int]:
    """One choice per table that together save what is needed at about the least cost.

    Every table takes what is best at one common price per unit saved (Lagrange; optimal on the tables' lower convex
    hulls); what is then missing is filled up with the cheapest single steps of the fine tables.

    Args:
        tables: what there is to choose from.
        need: what has to be saved, within half a step of the fine tables.
    """
    steepest = (t.costs.max() / t.savings[t.savings > 0].min() for t in tables if bool((t.savings > 0).any()))
    low, high = 0.0, max(map(float, steepest), default=0.0) + 1e-30
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if _saved(tables, _at(tables, price)) > need:
            high = price
        else:
            low = price
    chosen = _at(tables, low)
    saved = _saved(tables, chosen)
    queue: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        table, now = tables[index], chosen[index]
        if table.fine and now + 1 < len(table.costs):
            step = float(table.costs[now + 1] - table.costs[now])
            heapq.heappush(queue, (step / float(table.savings[now + 1] - table.savings[now]), index))

    for index in range(len(tables)):
        offer(index)
    while queue:
        _, index = heapq.heappop(queue)
        table, now = tables[index], chosen[index]
        step = float(table.savings[now + 1] - table.savings[now])
        if saved + step / 2 > need:
            continue
        chosen[index], saved = now + 1, saved + step
        offer(index)
    return chosen


def _at(tables: Sequence[Table], price: float) -> list[int]:
    return [int((table.costs - price * table.savings).argmin()) for table in tables]


def _saved(tables: Sequence[Table], chosen: Sequence[int]) -> float:
    return sum(float(table.savings[i]) for table, i in zip(tables, chosen, strict=True))


def steps(costs: Tensor, step: int, saving: float) -> Table:
    """A fine table of every ``step``-th point of a curve, each unit saving as much.

    Args:
        costs: [units + 1], what is lost when so many units are gone.
        step: units of one step.
        saving: what one unit saves.
    """
    points = torch.arange(0, len(costs), step)
    return Table(costs[points], points.double() * saving, True)
