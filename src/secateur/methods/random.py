"""Random units: the control that every table contains."""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.families import CanonicalTensor
from secateur.methods.base import Study
from secateur.methods.elementwise import Elementwise
from secateur.methods.selection import Selection
from secateur.spaces import Space


class RandomWeights(Elementwise):
    """Keep single weights drawn uniformly without replacement."""

    name = "random"
    title = "Random weights (control)"
    seeded = True

    spaces: Literal["weights"] = Field("weights", description="what the units are")
    allocation: Literal["uniform", "uniform+", "erk"] = Field(
        "uniform", description="how much every matrix keeps: the same share, or by a rule of its shape alone"
    )

    def scores_of(self, study: Study, matrix: CanonicalTensor) -> Tensor:
        # a generator for each matrix, so that its mask does not depend on which were drawn before
        text = f"{study.generator.initial_seed()} {matrix.name}"
        own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        shape = study.budget.architecture.shapes[matrix.name]
        return torch.rand(shape, generator=torch.Generator().manual_seed(own))


class Random(Selection):
    """Keep units drawn uniformly without replacement."""

    name = "random"
    title = "Random units (control)"
    seeded = True
    draws_scores = False
    variants: ClassVar = {("spaces", "weights"): RandomWeights}

    def unit_scores(self, study: Study, space: Space) -> Tensor:
        return torch.rand(space.size, dtype=torch.float64, generator=study.generator)
