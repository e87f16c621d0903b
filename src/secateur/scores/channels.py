"""Scores of coupled channels: what every entry of a weight is worth, gathered over all that goes with a unit (SPA)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.graph.spaces import ChannelSpace, Entry

Aggregation = Literal["sum", "mean", "max", "prod", "first"]
Normaliser = Literal["none", "sum", "mean", "max", "standardise", "gaussian", "median", "lamp"]
Worth = Callable[[str], Tensor]
"""What every entry of a parameter is worth, given its name."""


def unit_scores(
    space: ChannelSpace,
    worth: Worth,
    aggregation: Aggregation = "mean",
    normaliser: Normaliser = "mean",
    roles: Collection[str] = (),
) -> Tensor:
    """One number for each unit of a space, higher = keep.

    The worth is summed inside each tensor's slice, over the slice's positions, and these sums are aggregated over the
    tensors (arXiv:2403.18955).

    Args:
        space: its parameters count, its buffers do not.
        worth: of every entry of a parameter, in its shape.
        aggregation, normaliser: see :func:`aggregated` and :func:`normalised`.
        roles: axes that count; all where none of them occurs in the space.

    Returns:
        [units], float64.
    """
    parts = [slices(entry, worth(entry.name)) for entry in counted(space, roles)]
    return normalised(aggregated(parts, aggregation), normaliser)


def counted(space: ChannelSpace, roles: Collection[str] = ()) -> list[Entry]:
    """Entries of parameters, of some roles where these occur; those that make the units come first."""
    entries = sorted((e for e in space.entries if e.parameter), key=lambda e: "producer" not in e.roles)
    return [entry for entry in entries if entry.roles & set(roles)] or entries


def slices(entry: Entry, worth: Tensor) -> Tensor:
    """Sum over the slice of every unit, [units] float64."""
    wide = worth.detach().double()
    along = wide.movedim(entry.dim, 0).flatten(1).sum(1) if wide.ndim > 1 else wide
    found: Tensor = along[torch.from_numpy(entry.index).to(along.device)].sum(1).cpu()
    return found


def rows(entry: Entry, tensor: Tensor) -> Tensor:
    """All that a tensor holds of every unit, [units, entries] float64."""
    wide = tensor.detach().double().movedim(entry.dim, 0)
    return wide[torch.from_numpy(entry.index).to(wide.device)].flatten(1).cpu()


def aggregated(parts: Sequence[Tensor], aggregation: Aggregation) -> Tensor:
    """The scores of a unit's tensors as one: their sum, mean, maximum or product, or the first maker's alone.

    Products are geometric means, so that long ones neither vanish nor overflow.
    """
    stacked = torch.stack(list(parts))
    if aggregation == "prod":
        return stacked.clamp(min=1e-300).log().mean(0).exp()
    if aggregation == "first":
        return stacked[0]
    return {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0)}[aggregation]


def normalised(scores: Tensor, normaliser: Normaliser) -> Tensor:
    """Scores of a space made comparable with those of others.

    Divided by their sum, mean, maximum or median, of their sizes where some are negative; ``standardise``: from 0 to 1;
    ``gaussian``: mean 0, deviation 1; ``lamp``: each over the sum of those not below it (arXiv:2010.07611).
    """
    if normaliser == "standardise":
        return (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-300)
    if normaliser == "gaussian":
        return (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-300)
    if normaliser == "lamp":
        order = torch.sort(scores, stable=True).indices
        behind = torch.empty_like(scores)
        behind[order] = scores[order].flip(0).cumsum(0).flip(0)
        return scores / behind.abs().clamp(min=1e-300)
    sizes = scores.abs()
    over = {
        "none": sizes.new_ones(()),
        "sum": sizes.sum(),
        "mean": sizes.mean(),
        "max": sizes.max(),
        "median": sizes.median(),
    }[normaliser]
    return scores / over.clamp(min=1e-300)


def distances(entry: Entry, tensor: Tensor) -> Tensor:
    """How far a unit's weights are from those of all others, summed: little where others can stand in for it.

    The redundancy that FPGM looks for (arXiv:1811.00250), [units].
    """
    own = rows(entry, tensor)
    return torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
