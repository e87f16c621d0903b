"""Experts that take the place of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.families import Architecture, Block, canonical_name
from secateur.spaces import BlockView


def means_of_clusters(view: BlockView, clusters: Sequence[list[int]], kept: Sequence[int]) -> dict[str, Tensor]:
    """The means of the members of every cluster, rows of the router included, as the tensors of those that stay.

    Args:
        view: the router and the experts of a block.
        clusters: its experts.
        kept: of every cluster the member that stays.

    Returns:
        Tensors that change, in dense shape and in their own data types.
    """
    found: dict[str, Tensor] = {}
    for name in names_of_means(view.architecture, view.place, clusters, kept):
        described, values = view.architecture.tensors[name], view.tensors[name]
        if described.role == "router":
            found[name] = values.clone()
            for stays, cluster in zip(kept, clusters, strict=True):
                found[name][stays] = values[cluster].double().mean(0)
            continue
        cluster = clusters[list(kept).index(int(described.expert or 0))]
        members = [canonical_name(view.place, described.role, described.kind, expert) for expert in cluster]
        found[name] = torch.stack([view.tensors[member].double() for member in members]).mean(0).to(values.dtype)
    return found


def names_of_means(
    architecture: Architecture, place: Block, clusters: Sequence[list[int]], kept: Sequence[int]
) -> list[str]:
    """The tensors that change where clusters of several become their means."""
    changed = {stays for stays, cluster in zip(kept, clusters, strict=True) if len(cluster) > 1}
    tensors = architecture.tensors_of(place) if changed else []
    return [tensor.name for tensor in tensors if tensor.role == "router" or tensor.expert in changed]
