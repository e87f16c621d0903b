"""Rate-distortion allocation: what a block does to the output when it alone is pruned says how much it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import densities
from secateur.budgets.knapsack import choose
from secateur.cuts.masks import masked
from secateur.methods.base import Study
from secateur.methods.magnitude import MagnitudeOfWeights
from secateur.spaces.weights import units_of


class RdDpAllocation(MagnitudeOfWeights):
    """Curves of output distortion over sparsity, one unit pruned at a time; the least sum within the budget."""

    name = "rd_dp_allocation"
    title = "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks"
    paper = "arXiv:2308.10438"
    data = "text"

    allocation: Literal["uniform"] = Field(
        "uniform", description="of the matrices of a unit; the curves decide the rest"
    )
    unit: Literal["block", "matrix"] = Field("block", description="what has a curve: every block, or every matrix")
    grid: int = Field(10, ge=2, le=100, description="points of a curve: sparsities in steps of 1 / grid")
    bins: int = Field(20_000, ge=100, description="steps of the budget in the dynamic programme")

    def counts(self, study: Study) -> dict[str, int]:
        if self.shape.fixed:
            return super().counts(study)
        shapes, total = self.shapes(study.budget.architecture), self.kept(study.budget)
        units = units_of(shapes, self.unit)
        sizes = densities.unit_sizes(shapes, units)
        costs = [[max(1, round((1 - j / self.grid) * size)) for j in range(self.grid + 1)] for size in sizes]
        study.trials.settle()
        curves = []
        for number, (names, points) in enumerate(zip(units, costs, strict=True)):
            study.progress(number + 1, len(units), "curves")
            unit = {name: shapes[name] for name in names}
            curves.append(_rising([0.0, *(self._distortion(study, unit, count) for count in points[1:])]))
        chosen = choose(costs, curves, total, self.bins)
        kept = [points[point] for points, point in zip(costs, chosen, strict=True)]
        # what rounding to bins left over goes where weights are kept already
        return densities.by_unit(shapes, units, total, kept, kept)

    def _distortion(self, study: Study, unit: Mapping[str, tuple[int, int]], count: int) -> float:
        """How far the predictions move with this unit alone pruned (the paper: the squared change of the output)."""
        edits: dict[str, Tensor] = {}
        for name, kept in densities.uniform(unit, count).items():
            matrix = study.budget.architecture.tensors[name]
            view = study.block(matrix.block)
            edits[name] = masked(view.tensors[name], self.mask(self.weigh(view, matrix, {}), kept))
        return study.trials.divergence(edits)


def _rising(curve: list[float]) -> list[float]:
    """A curve that never falls, as noise would have it; infinities become large."""
    values = torch.tensor(curve, dtype=torch.float64).nan_to_num(nan=1e6, posinf=1e6)
    found: list[float] = values.cummax(0).values.tolist()
    return found
