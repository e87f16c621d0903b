"""Methods that are several, run one after the other: whole units go first, then single weights of what is left."""

from __future__ import annotations

from typing import Literal

from secateur.budgets import Budget
from secateur.families import Sizes
from secateur.methods.base import Method


class Chain(Method):
    """The methods of ``chain``, every one for the target of all; one class says which, and has their options."""

    @property
    def data(self) -> Literal["none", "text"]:  # type: ignore[override]
        return "text" if any(step.data == "text" for step in self.chain) else "none"

    def _asked(self, budget: Budget) -> list[tuple[Method, Budget, Sizes]]:
        """Every step, what it is asked for, and the sizes that it leaves."""
        found: list[tuple[Method, Budget, Sizes]] = []
        for step in self.chain:
            here = budget.behind(found[-1][2]) if found else budget
            found.append((step, here, step.sizes(here)))
        return found

    def sizes(self, budget: Budget) -> Sizes:
        _, last, sizes = self._asked(budget)[-1]
        budget.gap = last.gap * budget.costs.params(last.sizes) / budget.costs.params(budget.sizes)
        return sizes

    def zeros(self, budget: Budget) -> int:
        return sum(step.zeros(here) for step, here, _ in self._asked(budget))

    def foresees(self, budget: Budget) -> bool:
        return all(step.foresees(here) for step, here, _ in self._asked(budget))
