"""Norms of the weights that belong to a unit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from secateur.spaces import Member

_CHUNK = 2**15 - 1  # elements squared at a time: they stay in the cache, and torch starts no threads to wait for


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
        energy += squares_along(member.values, member.axis).view(size, member.span).sum(1)
    return energy


def squares_along(values: Tensor, axis: int) -> Tensor:
    """Sum of squares of each slice of ``axis``, float64; products in float32, sums over chunks in float64."""
    if values.ndim == 1:
        return values.double().square()
    squares = torch.zeros(values.shape[axis], dtype=torch.float64)
    rows = max(1, _CHUNK // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        chunk = values[start : start + rows]
        chunk = chunk.square() if chunk.dtype == torch.float64 else chunk.float().square()
        if axis == 0:
            squares[start : start + rows] = chunk.sum(1)
        else:
            squares += chunk.sum(0)
    return squares
