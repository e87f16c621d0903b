"""ECoFLaP: how much the loss moves when a block is shaken says what it keeps; inside, Wanda (arXiv:2310.02998)."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from secateur.budgets import densities
from secateur.methods.base import Study
from secateur.methods.wanda import Wanda
from secateur.spaces.weights import units_of


class Ecoflap(Wanda):
    """Coarse: zeroth-order importance of every unit by forward passes. Fine: Wanda behind the cuts so far."""

    name = "ecoflap"
    title = "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models"
    paper = "arXiv:2310.02998"
    seeded = True

    allocation: Literal["uniform"] = Field("uniform", description="of the matrices of a unit; their importance decides")
    unit: Literal["block", "matrix"] = Field("block", description="what has an importance: a block, or every matrix")
    draws: int = Field(4, ge=1, description="random directions in which each is shaken")
    step: PositiveFloat = Field(1e-2, description="length of a step over the root mean square of a matrix's weights")
    room: NonNegativeFloat = Field(0.1, le=1, description="how much sparser than the mean a unit may become")

    def counts(self, study: Study) -> dict[str, int]:
        if self.shape.fixed:
            return super().counts(study)
        shapes, total = self.shapes(study.budget.architecture), self.kept(study.budget)
        units = units_of(shapes, self.unit)
        sizes = densities.unit_sizes(shapes, units)
        study.trials.settle()
        scores = []
        for number, names in enumerate(units):
            study.progress(number + 1, len(units), "importance")
            scores.append(sum(self._shaken(study, names) for _ in range(self.draws)))
        least = max(0.0, total / sum(sizes) - self.room)
        # room below the mean for the least important one, as long as that leaves the exact total
        floors = [min(ceil(least * size), size) for size in sizes]
        return densities.by_unit(shapes, units, total, scores, floors)

    def _shaken(self, study: Study, names: list[str]) -> float:
        """|L(W + eps z) - L(W - eps z)| / 2 eps for one normal z: the size of the gradient, without one."""
        there: dict[str, Tensor] = {}
        back: dict[str, Tensor] = {}
        for name in names:
            matrix = study.budget.architecture.tensors[name]
            weight = study.block(matrix.block).tensors[name].float()
            shake = torch.randn(weight.shape, generator=study.generator) * self.step * weight.square().mean().sqrt()
            there[name], back[name] = weight + shake, weight - shake
        return abs(study.trials.loss(there) - study.trials.loss(back)) / (2 * self.step)
