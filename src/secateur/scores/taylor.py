"""Taylor scores of units: what the loss is expected to change by without their weights (LLM-Pruner, eq. 4 and 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from secateur.spaces import Member

Order = Literal["vectorize", "param_first", "param_second", "param_mix", "param_rms"]
Reduction = Literal["sum", "mean", "max", "prod", "first"]
SQUARES: frozenset[str] = frozenset({"param_second", "param_mix", "param_rms"})
"""Orders that need squared gradients of every window."""
_ROOTS = ("embedding", "gate", "up", "k", "q")  # the matrix a group is found from, the first of those there are


def saliency(weight: Tensor, gradient: Tensor, squares: Tensor | None, order: Order) -> Tensor:
    """One number per weight w with mean gradient g and mean squared gradient s, float64.

    ``vectorize`` and ``param_first``: w g. ``param_second``: w^2 s, the diagonal of the Fisher matrix.
    ``param_mix``: w g - w^2 s / 2. ``param_rms`` (ours): |w| sqrt(s), in which the signs of windows do not cancel.
    """
    wide, slope = weight.double(), gradient.double()
    if order not in SQUARES:
        return wide * slope
    assert squares is not None
    fisher = squares.double()
    if order == "param_rms":
        return wide.abs() * fisher.sqrt()
    second = wide.square() * fisher
    return second if order == "param_second" else wide * slope - second / 2


def unit_saliency(
    members: Iterable[Member],
    size: int,
    gradients: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    order: Order,
) -> dict[str, Tensor]:
    """Scores of the units of a space from those of all weights that go with them, matrix by matrix.

    Every matrix (its bias with it) gives a number per row or column, the sum of the sizes of its weights' saliencies,
    or of ``vectorize`` the size of their sum; those of one unit are added.

    Args:
        members: the tensors that the space runs through.
        size: number of units.
        gradients, squares: by canonical name.

    Returns:
        [size] float64 by the matrix's canonical name without its kind.
    """
    found: dict[str, Tensor] = {}
    for member in members:
        tensor = member.tensor
        values = saliency(member.values, gradients[tensor.name], squares.get(tensor.name), order)
        rest = [axis for axis in range(values.ndim) if axis != member.axis]
        if order == "vectorize":
            lines = (values.sum(rest) if rest else values).abs()
        else:
            lines = values.abs().sum(rest) if rest else values.abs()
        units = lines.view(size, member.span).sum(1)
        matrix = tensor.name.rpartition(".")[0]
        found[matrix] = found[matrix] + units if matrix in found else units
    return found


def reduced(scores: Mapping[str, Tensor], reduction: Reduction) -> Tensor:
    """One score per unit from those of its matrices, higher = keep.

    Args:
        scores: by the matrix's name; ``first`` takes the one that the group is found from.
    """
    if reduction == "first":
        of_role: dict[str, Tensor] = {}
        for name, values in scores.items():
            of_role.setdefault(name.rpartition(".")[2], values)
        return of_role[next(role for role in (*_ROOTS, *of_role) if role in of_role)]
    stacked = torch.stack(list(scores.values()))
    return {
        "sum": lambda: stacked.sum(0),
        "mean": lambda: stacked.mean(0),
        "max": lambda: stacked.amax(0),
        "prod": lambda: stacked.prod(0),
    }[reduction]()
