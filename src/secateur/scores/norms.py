"""Norms of the weights that belong to a unit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.spaces import Member


def unit_energy(members: Iterable[Member], size: int) -> Tensor:
    """Sum of squares over all weights of each unit (LLM-Pruner's group magnitude, p = 2).

    Args:
        members: the tensors that the space runs through.
        size: number of units.

    Returns:
        [size] float64.
    """
    energy = torch.zeros(size, dtype=torch.float64)
    for member in members:
        other = [d for d in range(member.values.ndim) if d != member.axis]
        if other:
            norms = torch.linalg.vector_norm(member.values, dim=other, dtype=precise_type(member.values)).double()
        else:
            norms = member.values.double()
        energy += norms.square().view(size, member.span).sum(1)
    return energy


def precise_type(values: Tensor) -> torch.dtype:
    """Type to sum in: float32 at least."""
    return torch.promote_types(values.dtype, torch.float32)
