"""SPA, Structurally Prune Anything (arXiv:2403.18955): any criterion, gathered over all that goes with a channel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.methods.channels import ChannelStudy, GraphMethod
from secateur.scores.channels import CRITERIA, Aggregation, Normaliser, unit_scores


class Spa(GraphMethod):
    """Delete the coupled channels whose weights are worth least."""

    name = "spa"
    title = "Structurally Prune Anything"
    paper = "arXiv:2403.18955"

    score_by: Literal["l1", "l2", "bn", "random"] = Field(
        "l1",
        description="what an entry of a weight is worth: its absolute value, its square, the scale of its batch norm "
        "alone (all weights where there is none); or units at random",
    )
    aggregation: Aggregation = Field("mean", description="how the sums over a unit's slices become one")
    normaliser: Normaliser = Field(
        "mean", description="what of its space a score is divided by, so that spaces compare"
    )

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.score_by == "random"

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        if self.score_by == "random":
            return {s.name: torch.rand(s.size, generator=study.generator, dtype=torch.float64) for s in study.spaces}
        criterion = CRITERIA[self.score_by]
        return {
            space.name: unit_scores(space, criterion, study.tensor, self.aggregation, self.normaliser)
            for space in study.spaces
        }
