"""Scores of coupled channels: what every entry of a weight is worth, gathered over all that goes with a unit (SPA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from secateur.graph.spaces import ChannelSpace, Entry

Aggregation = Literal["sum", "mean", "max", "prod"]
Normaliser = Literal["none", "sum", "mean", "max"]


@dataclass(frozen=True)
class Criterion:
    """A score of single entries.

    Attributes:
        worth: of every entry of a tensor, given the tensor; at least zero.
        roles: which axes count; all where there are none.
    """

    worth: Callable[[Tensor], Tensor]
    roles: frozenset[str] = frozenset()


CRITERIA: Final[Mapping[str, Criterion]] = {
    "l1": Criterion(Tensor.abs),
    "l2": Criterion(Tensor.square),
    "bn": Criterion(Tensor.abs, frozenset({"norm"})),
}
"""Criteria that see weights alone: absolute values, squares, scales of the normalisations (network slimming)."""


def unit_scores(
    space: ChannelSpace,
    criterion: Criterion,
    tensor: Callable[[str], Tensor],
    aggregation: Aggregation = "mean",
    normaliser: Normaliser = "mean",
) -> Tensor:
    """One number for each unit of a space, higher = keep.

    The criterion is summed inside each tensor's slice, over the slice's positions, and these sums are aggregated over
    the tensors (arXiv:2403.18955): as their sum, mean, maximum or product. Products are geometric means, so that long
    ones neither vanish nor overflow.

    Args:
        space: its parameters count, its buffers do not.
        criterion: where none of its roles occurs in the space, all axes count.
        tensor: a parameter by name.
        normaliser: what of the space the scores are divided by, so that spaces compare.

    Returns:
        [units], float64.
    """
    entries = [entry for entry in space.entries if entry.parameter]
    chosen = [entry for entry in entries if criterion.roles & entry.roles] or entries
    parts = torch.stack([_slices(entry, criterion.worth(tensor(entry.name).detach().double())) for entry in chosen])
    if aggregation == "prod":
        scores = parts.clamp(min=1e-300).log().mean(0).exp()
    else:
        scores = {"sum": parts.sum(0), "mean": parts.mean(0), "max": parts.amax(0)}[aggregation]
    over = {"none": scores.new_ones(()), "sum": scores.sum(), "mean": scores.mean(), "max": scores.max()}[normaliser]
    return scores / over.clamp(min=1e-300)


def _slices(entry: Entry, worth: Tensor) -> Tensor:
    """Sum over the slice of every unit."""
    along = worth.movedim(entry.dim, 0).flatten(1).sum(1) if worth.ndim > 1 else worth
    found: Tensor = along[torch.from_numpy(entry.index).to(along.device)].sum(1).cpu()
    return found
