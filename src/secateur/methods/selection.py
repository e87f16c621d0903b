"""Methods that keep whole units by one score each, the same number in every space."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.ranking import relative
from secateur.cuts.stream import SHARED
from secateur.errors import refuse
from secateur.families import Layout, Sizes
from secateur.methods.base import Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.plans import Plan
from secateur.spaces import Kind, Space, all_spaces


class Selection(Method):
    """Keep the best units of every space of one kind."""

    draws_scores: ClassVar[bool] = True
    """Whether the distribution of the scores is worth a chart."""

    spaces: Kind = Field("ffn", description="what the units are; weights: single ones, with options of their own")

    allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="how many units stay in each block: as many in all, or what one ranking of all units leaves, "
        "scores relative to their block's mean (per-layer layout; ffn, experts, kv, heads)",
    )

    @property
    def cuts(self) -> Kind:
        return self.spaces

    def in_layout(self, layout: Layout) -> Self:
        if self.allocation == "global" and (layout == "native" or self.cuts in ("residual", "blocks")):
            asked, found = f"{self.name} with allocation=global", "stock classes give all blocks one size"
            if self.cuts in ("residual", "blocks"):
                refuse("bad-option", f"{asked} of {self.cuts}", "there is one space of it only", "leave allocation out")
            refuse("not-native", f"{asked} in the native layout", found, "--layout per-layer")
        return self

    def sizes(self, budget: Budget) -> Sizes:
        return self._solve(budget, self.cuts, dimensions_base(budget) if self.cuts == "residual" else None)

    def foresees(self, budget: Budget) -> bool:
        return self.allocation == "uniform" and (self.cuts != "blocks" or budget.sizes.alike)

    def unit_scores(self, study: Study, space: Space) -> Tensor:
        """One number per unit of a space, [size]."""
        raise NotImplementedError

    def decide(self, study: Study) -> Plan:
        before, spaces = study.budget.sizes, study.spaces(self.cuts)
        scores = {space.name: self.unit_scores(study, space) for space in spaces}
        if self.allocation == "global":
            keep = None if self.sparsity is None else 1 - self.sparsity
            after = study.budget.solve_ranked({self.cuts: relative(scores)}, keep)
        else:
            after = self.sizes(study.budget)
        kept = {}
        for space, left in zip(spaces, all_spaces(after, self.cuts), strict=True):
            count = after.directions(SHARED) if self.cuts == "residual" else left.size
            kept[space.name] = keep_best(scores[space.name], count)
        charts = score_charts(scores, kept) if self.draws_scores else ()
        if self.cuts == "residual":
            return with_dimensions(Plan(before, after, charts=charts), kept["residual"])
        if self.cuts == "blocks":
            after = before.kept_blocks([int(i) for i in kept["blocks"]])
        return Plan(before, after, kept, charts=charts)


def dimensions_base(budget: Budget) -> Sizes:
    """What dimensions of the stream are taken from: a head stays tied, unless the stream has to change its basis."""
    return budget.sizes if budget.architecture.family.norm == "rms" else budget.sizes.untied()


def with_dimensions(plan: Plan, kept: Tensor) -> Plan:
    """A plan in which some dimensions of the stream stay.

    Where the norms take the mean away, they are carried without it, in a basis, and one more dimension goes to that:
    there are ``plan.after.directions(SHARED)`` of them.
    """
    if not plan.before.mean_free:
        return replace(plan, kept={**plan.kept, "residual": kept})
    chosen = torch.eye(plan.before.residual, dtype=torch.float64)[:, kept]
    return replace(plan, bases={SHARED: chosen})
