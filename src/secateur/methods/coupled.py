"""Rules for single weights of language models that coupled channels of any network follow as well, by one name."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from secateur.budgets.channels import Units
from secateur.budgets.targets import Target
from secateur.errors import refuse
from secateur.graph.spaces import ChannelSpace
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod
from secateur.scores.channels import counted, slices, unit_scores


class LampOfChannels(GraphMethod):
    """One ranking of all channels by their squared weights over those of their space that are not smaller."""

    name = "lamp"
    title = "Layer-adaptive Sparsity for the Magnitude-based Pruning"
    paper = "arXiv:2010.07611"

    ranking: Literal["global"] = Field("global", description="one ranking of LAMP scores")

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        return {
            space.name: unit_scores(space, lambda name: study.tensor(name).square(), "mean", "lamp")
            for space in study.spaces
        }


class GlobalMpOfChannels(GraphMethod):
    """One ranking of all channels by the mean absolute value of their weights; no space falls below a minimum."""

    name = "global_mp"
    title = "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning"
    paper = "arXiv:2209.14624"

    ranking: Literal["global"] = Field("global", description="one ranking of all channels")
    minimum: NonNegativeFloat = Field(
        0.05, le=100, description="percent of all parameters that every space keeps; one with fewer stays whole"
    )

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        found = {}
        for space in study.spaces:
            entries = counted(space)
            total = torch.stack([slices(entry, study.tensor(entry.name).abs()) for entry in entries]).sum(0)
            found[space.name] = total / _weights(study, space)
        return found

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        least = self.minimum / 100 * study.graph.parameters()
        scores, held = {}, {}
        for name, each in self.score(study).items():
            space = study.graph.space(name)
            stays = math.ceil(least / _weights(study, space))
            if stays < space.size:
                held[name] = set(torch.argsort(each, stable=True)[space.size - stays :].tolist())
                scores[name] = each.index_fill(0, torch.tensor(sorted(held[name]), dtype=torch.long), torch.inf)
        units = choose(scores, target)
        if any(held[name] & set(gone) for name, gone in units.items()):
            refuse(
                "target-out-of-reach",
                f"target {target}",
                f"every space keeps {self.minimum:g} % of the parameters",
                "ask for less, or a lower minimum",
            )
        return units


def _weights(study: ChannelStudy, space: ChannelSpace) -> int:
    """Parameters in one unit's slices."""
    sizes = {entry.name: study.tensor(entry.name).shape for entry in counted(space)}
    return sum(math.prod(sizes[e.name]) // sizes[e.name][e.dim] * e.index.shape[1] for e in counted(space))
