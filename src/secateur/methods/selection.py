"""Methods that keep whole units by one score each, the same number in every space."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Sizes
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Plan
from secateur.spaces import Kind, Space


class Selection(Method):
    """Keep the best units of every space of one kind."""

    spaces: Literal["ffn", "kv", "residual", "blocks"] = Field("ffn", description="what the units are")

    @property
    def cuts(self) -> Kind:
        return self.spaces

    def sizes(self, budget: Budget) -> Sizes:
        keeps_tie = self.cuts != "residual" or budget.architecture.family.norm == "rms"
        return self._solve(budget, self.cuts, None if keeps_tie else budget.sizes.untied())

    def unit_scores(self, study: Study, space: Space) -> Tensor:
        """One number per unit of a space, [size]."""
        raise NotImplementedError

    def decide(self, study: Study) -> Plan:
        after = self.sizes(study.budget)
        count = after.uniform(self.cuts)
        assert count is not None
        if self.cuts == "residual" and study.budget.architecture.family.norm == "layer":
            count -= 1  # the spare dimension that keeps the stream free of a mean
        kept = {space.name: keep_best(self.unit_scores(study, space), count) for space in study.spaces(self.cuts)}
        return Plan(study.budget.sizes, after, kept)
