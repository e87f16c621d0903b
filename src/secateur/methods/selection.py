"""Methods that keep whole units by one score each, the same number in every space."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Sizes
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Plan
from secateur.spaces import Kind, Space, all_spaces


class Selection(Method):
    """Keep the best units of every space of one kind."""

    spaces: Kind = Field("ffn", description="what the units are")

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
        before, after = study.budget.sizes, self.sizes(study.budget)
        kept = {}
        for space, left in zip(study.spaces(self.cuts), all_spaces(after, self.cuts), strict=True):
            # of a stream without a mean, one dimension goes to keeping it so
            count = left.size - (before.mean_free if self.cuts == "residual" else 0)
            kept[space.name] = keep_best(self.unit_scores(study, space), count)
        if self.cuts == "blocks":
            after = before.kept_blocks([int(i) for i in kept["blocks"]])
        return Plan(before, after, kept)
