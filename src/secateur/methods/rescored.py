"""Methods that go to their target in steps, and score what is left before each."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from secateur.budgets.channels import Units
from secateur.budgets.targets import Target
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod


class Rescored(GraphMethod):
    """Base of these methods; what is gone once stays gone."""

    steps: int = Field(1, ge=1, description="how often what is left is scored anew on the way to the target")
    schedule: Literal["linear", "exponential"] = Field(
        "linear", description="whether every step takes as much as the others, or as large a share of what is left"
    )

    def way(self, step: int, target: Target) -> float:
        """How much of the way to the target lies behind a step, counted from 1."""
        share = step / self.steps
        if self.schedule == "linear" or target.fraction is None or target.fraction == 1:
            return share
        return float((1 - target.fraction**share) / (1 - target.fraction))

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        units: Units = {}
        for step in range(1, self.steps + 1):
            scores = self.score(study.silenced(units) if units else study)
            for name, gone in units.items():
                scores[name] = scores[name].index_fill(0, torch.tensor(gone), -torch.inf)
            units = choose(scores, target, self.way(step, target) if step < self.steps else 1.0)
        return units
