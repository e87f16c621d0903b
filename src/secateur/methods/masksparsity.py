"""MaskSparsity (arXiv:2201.06776): channels that their batch norms hardly scale any more, in all branches that meet."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets.channels import Units, counted, remaining
from secateur.budgets.nested import between
from secateur.budgets.targets import Target
from secateur.errors import refuse
from secateur.graph.spaces import ChannelSpace
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod, Mending
from secateur.scores.channels import slices

_TURNS = 60
_NEAR = 1e-3


class MaskSparsity(GraphMethod):
    """Mask channels by the scales of their norms, by vote where branches meet; trained towards nought, they can go."""

    name = "masksparsity"
    title = "Pruning-aware Sparse Regularization for Network Pruning"
    paper = "arXiv:2201.06776"

    ranking: Literal["global"] = Field("global", description="one level for all norms")
    mask: Literal["threshold", "energy"] = Field(
        "threshold",
        description="what makes a norm vote against a channel: its scale is at most the level, or it is among the "
        "smallest that hold together at most that share of the squared scales",
    )
    mending: Mending = Field("absorb", description=GraphMethod.model_fields["mending"].description)
    level: PositiveFloat | None = Field(
        None, description="found so that the target is met; the paper's are 0.01 for threshold and 0.0001 for energy"
    )

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """The mean absolute scale of every channel; spaces without norms have none."""
        return {space.name: scales.mean(0) for space, scales in self._scales(study)}

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        members = self._scales(study)
        spaces = [space for space, _ in members]

        def units(level: float) -> Units:
            chosen = {space.name: voted(self._against(scales, level)) for space, scales in members}
            return {name: found for name, found in chosen.items() if found}

        counts = counted(target)

        def cost(gone: Units) -> int:
            return remaining(study.graph, counts.measure, gone)

        full = cost({})
        wanted = counts.of(full)
        low, high = (
            0.0,
            max([float(scales.max()) for _, scales in members], default=1.0) if self.mask == "threshold" else 1.0,
        )
        near, far = {}, units(high if self.level is None else self.level)
        if self.level is not None and cost(far) > wanted + 0.01 * full:
            refuse(
                "target-out-of-reach",
                f"target {target}",
                f"this mask leaves {cost(far) / full:.3f} of the {target.measure}",
                "ask for that, or a higher level",
            )
        for _ in range(_TURNS if self.level is None and wanted < full else 0):
            middle = (low + high) / 2
            found = units(middle)
            if cost(found) > wanted:
                low, near = middle, found
            else:
                high, far = middle, found
            if high - low <= _NEAR * high and abs(cost(near) - cost(far)) <= _NEAR * full:
                break
        study.notes["level"] = high if self.level is None else self.level
        return choose(between(spaces, near, far, self.score(study)), target)

    def _scales(self, study: ChannelStudy) -> list[tuple[ChannelSpace, Tensor]]:
        """Absolute scales [norms, units] of every space that has norms."""
        found = []
        for space in study.spaces:
            norms = [
                e for e in space.entries if "norm" in e.roles and e.parameter and e.name.rpartition(".")[2] == "weight"
            ]
            if norms:
                parts = [slices(e, study.tensor(e.name).abs()) / e.index.shape[1] for e in norms]
                found.append((space, torch.stack(parts)))
        if not found:
            refuse("no-norms", f"method {self.name}", "no channel is scaled by a norm", "method='spa'")
        return found

    def _against(self, scales: Tensor, level: float) -> Tensor:
        """[norms, units]: which norm votes against which channel."""
        if self.mask == "threshold":
            return scales <= level
        order = torch.sort(scales, dim=1, stable=True)
        held = order.values.square().cumsum(1)
        below = held <= level * held[:, -1:]
        return torch.zeros_like(below).scatter_(1, order.indices, below)


def voted(against: Tensor) -> list[int]:
    """Channels with so many votes against them that at least as many go as the most lenient member named.

    Args:
        against: [members, units]; of the numbers of votes that suffice for that, the largest counts. One channel stays.
    """
    votes, fewest = against.sum(0), int(against.sum(1).min())
    for count in range(len(against), 0, -1):
        gone = votes >= count
        if fewest and int(gone.sum()) >= fewest:
            found = torch.nonzero(gone).flatten().tolist()
            return found[:-1] if len(found) == against.shape[1] else found
    return []
