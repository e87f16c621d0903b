"""Random units: the control that every table contains."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.methods.base import Study
from secateur.methods.selection import Selection
from secateur.spaces import Space


class Random(Selection):
    """Keep units drawn uniformly without replacement."""

    name = "random"
    title = "Random units (control)"
    seeded = True
    draws_scores = False

    def unit_scores(self, study: Study, space: Space) -> Tensor:
        return torch.rand(space.size, dtype=torch.float64, generator=study.generator)
