"""The Optimal Brain Surgeon sweep: the weights that stay make up, column by column, for those that go (SparseGPT)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.scores.ridge import inverse_factor

Choose = Callable[[Tensor, int, int], Tensor]
"""Given scores [out, columns] of the columns from start to stop: which of these weights stay, bool."""


def obs_sweep(
    weight: Tensor,
    gram: Tensor,
    choose: Choose,
    *,
    damping: float = 1e-2,
    width: int = 128,
    step: int | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prune a matrix from left to right; what each column loses is made up for by the columns behind it.

    With U the upper Cholesky factor of the damped H^-1, a weight that goes leaves the error e = w / U_jj, which the
    columns behind take over as -e U_j,: (SparseGPT, arXiv:2301.00774, alg. 1). Computed in float32 (float64 for float64
    weights), as the paper's code does. Weights of inputs that were never seen go first, at no loss.

    Args:
        weight: W, [out, in].
        gram: H = X X^T up to a factor, [in, in].
        choose: says what stays, given w^2 / U_jj^2; a mask from elsewhere gives the compensation alone.
        damping: ridge over the mean of H's diagonal, raised tenfold until H^-1 has a factor.
        width: columns after which those behind are brought up to date.
        step: columns for which ``choose`` is asked at a time; all of ``width`` when omitted. With fewer, it sees
            weights that the columns before have changed already.
        order: columns in the order in which they are swept; as they stand when omitted.

    Returns:
        The new weights, zero where they go, and the mask, both [out, in].
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    order = torch.arange(len(gram)) if order is None else order
    order = order.to(gram.device)
    dead = gram.diagonal() <= 0
    hessian = gram.to(wide)[order][:, order]
    hessian.diagonal()[dead[order]] = gram.diagonal()[~dead].mean().to(wide) if bool((~dead).any()) else 1.0
    upper = inverse_factor(hessian, damping)
    # columns of W as rows, each in one piece of memory
    rows = weight.to(wide).t()[order.to(weight.device)].contiguous()
    stays = torch.zeros_like(rows, dtype=torch.bool)
    diagonal = upper.diagonal().to(rows)
    upper, silent = upper.to(rows), dead[order].to(rows.device)
    for first in range(0, len(rows), width):
        last = min(first + width, len(rows))
        errors = torch.zeros_like(rows[first:last])
        for column in range(first, last):
            if (column - first) % (step or width) == 0:
                end = min(column + (step or width), last)
                scores = (rows[column:end] / diagonal[column:end, None]).square().t()
                # below all that were seen, and among themselves by size: an expert without tokens goes by magnitude
                scores = torch.where(silent[column:end], -1 / (1 + scores), scores)
                stays[column:end] = choose(scores, column, end).t()
            before = rows[column].clone()
            after = before.masked_fill(~stays[column], 0)
            errors[column - first] = (before - after) / diagonal[column]
            rows[column:last] -= torch.outer(upper[column, column:last], errors[column - first])
            rows[column] = after
        rows[last:] -= upper[first:last, last:].t() @ errors
    back = torch.argsort(order).to(rows.device)
    return rows[back].t().contiguous(), stays[back].t().contiguous()


def shares_of(count: int, columns: int) -> Callable[[int, int], int]:
    """How many of ``count`` weights fall to the columns from start to stop: as many to each, exact over all."""
    return lambda start, stop: math.floor(count * stop / columns) - math.floor(count * start / columns)
