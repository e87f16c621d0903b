"""Two sets of units, one of which goes further, as one order: the choice between them is that of any ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.budgets.channels import Units
from secateur.graph.spaces import ChannelSpace


def between(spaces: Sequence[ChannelSpace], near: Units, far: Units, order: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores with which units go in three runs: what both sets name, what the farther one names as well, the rest.

    Args:
        spaces: those that are ranked.
        near, far: units that go.
        order: of the units of every space, the order inside each run.
    """
    flat = torch.cat([order[space.name].double() for space in spaces]) if spaces else torch.zeros(1)
    low, span = flat.min(), flat.max() - flat.min() + 1
    found = {}
    for space in spaces:
        run = torch.full((space.size,), 2.0, dtype=torch.float64)
        run[far.get(space.name, [])] = 1
        run[sorted({*near.get(space.name, ())} & {*far.get(space.name, ())})] = 0
        found[space.name] = run * span + order[space.name].double() - low
    return found
