"""Adapt-Pruner: many small steps, each cutting blocks by how much they still matter (arXiv:2502.03460).

The training between stages that the paper adds is ``secateur recover``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from secateur.budgets import Budget, Target
from secateur.budgets.shares import sizes_at_shares
from secateur.errors import refuse
from secateur.families import Kind, Layout, Sizes
from secateur.methods.base import Fraction, Study
from secateur.methods.taylor import Groups, TaylorGroups
from secateur.plans import Chart, Plan, points_of


class AdaptPruner(TaylorGroups):
    """Every block has a sparsity of its own that grows by 1/T a step, less where the block changes its input more."""

    name = "adapt_pruner"
    title = "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training"
    paper = "arXiv:2502.03460"

    steps: PositiveInt = Field(
        50, description="T: steps to remove everything; the cut stops within the step that meets the target"
    )
    amplitude: Annotated[float, Field(ge=0)] = Field(0.02, description="A: what importance takes off or adds in a step")
    cap: Fraction = Field(0.99, description="largest sparsity of a block; besides, every block keeps a step of units")

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native":
            found = "its sizes differ from block to block, and stock classes give all blocks one"
            refuse(
                "not-native", f"{self.name} in the native layout", found, "--layout per-layer, or --method llm_pruner"
            )
        return self

    def _at(self, budget: Budget, kinds: list[Kind], sparsity: Tensor) -> Sizes:
        return sizes_at_shares(budget, dict.fromkeys(kinds, (1 - sparsity).tolist()))

    def sizes(self, budget: Budget) -> Sizes:
        """The sizes if all blocks mattered alike; the decision comes to as many parameters, differently shared."""
        kinds, depth = self.kinds(budget), len(budget.sizes.blocks)
        if self.sparsity is not None:
            return self._at(budget, kinds, torch.full((depth,), self.sparsity))
        return budget.solve_along(
            lambda share: self._at(budget, kinds, torch.full((depth,), 1 - share)), " and ".join(kinds)
        )

    def decide(self, study: Study) -> Plan:
        budget, groups = study.budget, Groups(study, self)
        if self.sparsity is not None:
            target = Target("params", absolute=budget.costs.params(self.sizes(budget)))
            budget = replace(budget, targets=(target,))
        goal, found = torch.zeros(len(budget.sizes.blocks), dtype=torch.float64), False
        history: list[Tensor] = []
        while not found:
            study.progress(len(history) + 1, self.steps, "gradients")
            groups.measure()
            history.append(groups.influence)
            step = 1 / self.steps - self.amplitude * importance(groups.influence)
            before, goal = goal, (goal + step).clamp(0, self.cap).maximum(goal)  # what is gone does not come back
            after = self._at(budget, groups.kinds, goal)
            found = budget.met(after) or torch.equal(before, goal)
            if found:  # not all of the last step: as far as the target
                path = partial(self._between, budget, groups.kinds, before, goal)
                after = budget.solve_along(path, " and ".join(groups.kinds))
            groups.shrink(after)
        study.budget.gap = budget.gap
        notes = {"steps": len(history), "influence": [round(float(value), 6) for value in history[-1]]}
        return groups.plan(after, notes, _charts(history, goal))

    def _between(self, budget: Budget, kinds: list[Kind], start: Tensor, stop: Tensor, share: float) -> Sizes:
        return self._at(budget, kinds, stop + share * (start - stop))


def importance(influence: Tensor) -> Tensor:
    """How much blocks change their inputs, mean 0 and at most 1 in size (1 - cos and -cos differ by a constant)."""
    centred = influence - influence.mean()
    return centred / centred.abs().max().clamp(min=1e-30)


def _charts(history: list[Tensor], sparsity: Tensor) -> tuple[Chart, ...]:
    """How much blocks changed their inputs before the first and the last step, and the sparsity that led to."""
    lines = {"first step": points_of(history[0]), "last step": points_of(history[-1])}
    return (
        Chart("Change of the stream by block", "block", "1 - cosine", lines),
        Chart("Sparsity by block", "block", "share removed", {"sparsity": points_of(sparsity)}),
    )
