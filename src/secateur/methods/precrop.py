"""PreCrop (arXiv:2203.02549): how wide every layer of a network that is not trained yet should be, in closed form."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets.channels import Units, counted, remaining
from secateur.budgets.targets import Target
from secateur.budgets.widths import Widths, allocate
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod


class PreCrop(GraphMethod):
    """Crop coupled channels so that the product of all layers' densities is as large as the budget allows."""

    name = "precrop"
    title = "Structured Pruning is All You Need for Pruning CNNs at Initialization"
    paper = "arXiv:2203.02549"

    ranking: Literal["global"] = Field("global", description="widths are allocated for all spaces together")
    units: Literal["random", "last"] = Field(
        "random", description="which of a space's units go: any, as before training all are alike, or the last ones"
    )
    rescale: bool = Field(
        False,
        description="multiply the weights of what reads fewer channels so that their variance is that of an "
        "initialisation at the new width; for networks without norms that are trained afterwards",
    )

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.units == "random"

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        widths, sizes = Widths(study.graph, study.spaces), np.array([space.size for space in study.spaces])
        counts = counted(target)
        present = remaining(study.graph, counts.measure, {})
        cost = widths.cost("params" if counts.measure in ("params", "bytes") else "macs")
        least = np.maximum(np.ceil(self.floor * sizes), 1) / sizes
        budget = counts.of(present) / present * cost(np.zeros(len(sizes)))
        shares = allocate(widths.worth(), cost, budget, least)
        return choose(self._scores(study, shares), target)

    def _scores(self, study: ChannelStudy, shares: np.ndarray) -> dict[str, Tensor]:
        """Units of a space in some order, at least 1 as far as its share goes: the nearest size is found from there."""
        found = {}
        for space, share in zip(study.spaces, shares.tolist(), strict=True):
            place = torch.arange(1, space.size + 1, dtype=torch.float64)
            order = (
                torch.randperm(space.size, generator=study.generator)
                if self.units == "random"
                else torch.arange(space.size)
            )
            scores = torch.empty_like(place)
            scores[order] = share * space.size / place
            found[space.name] = scores
        return found

    def mend(self, study: ChannelStudy, units: Units) -> dict[str, Tensor]:
        if not self.rescale:
            return super().mend(study, units)
        gone, found = study.graph.gone(units), {}
        for space in study.spaces:
            for entry in space.entries:
                if entry.name in found or "consumer" not in entry.roles or not entry.parameter:
                    continue
                axis = study.graph.axes[entry.name][entry.dim]
                stays = int((~gone[axis]).sum())
                if 0 < stays < len(axis):
                    found[entry.name] = study.tensor(entry.name) * (len(axis) / stays) ** 0.5
        return found
