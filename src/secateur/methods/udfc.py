"""UDFC, Unified Data-Free Compression (arXiv:2308.07209): channels restored from the others, weights to few bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from secateur.budgets.channels import Ranking, Units
from secateur.mends.folding import ALPHA1, ALPHA2, Folding
from secateur.methods.channels import ChannelStudy, GraphMethod, Mending
from secateur.scores.channels import unit_scores


class Udfc(GraphMethod):
    """Delete the smallest filters of every layer; what reads them reads a combination of the others instead."""

    name = "udfc"
    title = "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning"
    paper = "arXiv:2308.07209"

    ranking: Ranking = Field("local", description="what a unit competes with: those of its own space, or more")
    score_by: Literal["l1", "l2"] = Field("l1", description="size of a filter: absolute values, or squares")
    bits: int | None = Field(None, ge=2, le=16, description="bits of all weights of layers; as they are if not given")
    alpha1: NonNegativeFloat = Field(ALPHA1, description="what shifts of channels count beside their filters")
    alpha2: NonNegativeFloat = Field(ALPHA2, description="what the size of a combination counts")
    mending: Mending = Field("fold", description="how what stays makes up for what goes")

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        def worth(name: str) -> Tensor:
            return study.tensor(name).abs() if self.score_by == "l1" else study.tensor(name).square()

        return {space.name: unit_scores(space, worth, "mean", "mean", ("producer",)) for space in study.spaces}

    def mend(self, study: ChannelStudy, units: Units) -> dict[str, Tensor]:
        if self.mending != "fold":
            return super().mend(study, units)
        return Folding(study.host, study.graph, units, self.alpha1, self.alpha2, self.bits).restore()
