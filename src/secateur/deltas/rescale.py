"""What kept entries are divided by: their share (DARE), one q for all, or an analytic or learned q for each matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

_STEP: Final = 1e-3
_CHUNK: Final = 256  # rows of the table of the bound at a time


@dataclass(frozen=True)
class Rescale:
    """A rule that gives every matrix its q.

    Attributes:
        kind: ``share`` of the kept entries, ``fixed`` (``value``), ``analytic`` (``value`` is eta), or ``learned`` (by
            name in ``each``; others get their mean).
    """

    kind: Literal["share", "fixed", "analytic", "learned"]
    value: float = 1.0
    gamma: float = 0.95
    guard: float = 0.8
    each: Mapping[str, float] = field(default_factory=dict)

    def q(self, name: str, delta: Tensor, mean: Tensor | None, share: float) -> float:
        """The q of one matrix.

        Args:
            delta: [rows, columns].
            mean: of the inputs of its columns; needed by ``analytic``.
            share: of its entries that is kept.
        """
        if self.kind == "fixed":
            return self.value
        if self.kind == "learned":
            return self.each[name] if name in self.each else sum(self.each.values()) / len(self.each)
        if self.kind == "share" or share >= 1 or mean is None:
            return share
        return analytic_q(delta.double() * mean.to(delta.device), share, self.value, self.gamma, self.guard)


def q_grid(share: float) -> Tensor:
    """The values from which the analytic q is taken: from the kept share to 0.999, in steps of a thousandth."""
    return share + _STEP * torch.arange(max(1, math.floor((0.999 - share) / _STEP + 1e-9) + 1), dtype=torch.float64)


def sub_gaussian(p: float) -> float:
    """(1 - 2p) / ln((1 - p) / p), the sub-Gaussian constant of a centred Bernoulli variable (Kearns and Saul)."""
    return 0.5 if abs(p - 0.5) < 1e-9 else (1 - 2 * p) / math.log((1 - p) / p)


def analytic_q(parts: Tensor, share: float, eta: float, gamma: float = 0.95, guard: float = 0.8) -> float:
    """The q that makes DAREx's bound of the output error smallest, the mean over the rows of a matrix.

    For every row the bound is (arXiv:2410.09344; c_j is an entry of the delta times the mean of its input)

        | eta (1 - (1 - p) / q) sum_j c_j + eta^2 phi(p) sum_j c_j^2 / (4 q^2) + ln(2 / (1 - gamma)) |.

    The grid of q is walked upwards until a share of the rows has met a value no better than their best so far, so that
    a few rows with large inputs do not decide for all; every row keeps its best until there, the last of equals.

    Args:
        parts: c, [rows, columns].
        share: 1 - p, what is kept.
        eta: balances the two parts of the error.
        guard: the share of rows that ends the walk.
    """
    grid, p = q_grid(share).to(parts.device), 1 - share
    first, second = parts.double().sum(1), parts.double().square().sum(1)
    best, stopped = torch.full_like(first, torch.inf), torch.zeros(len(first), dtype=torch.bool, device=parts.device)
    chosen = torch.full_like(first, share)
    for begin in range(0, len(grid), _CHUNK):
        q = grid[begin : begin + _CHUNK]
        table = eta * torch.outer(first, 1 - share / q)
        table += torch.outer(second, eta**2 * sub_gaussian(p) / (4 * q**2)) + math.log(2 / (1 - gamma))
        table.abs_()
        before = torch.cat([best[:, None], torch.cummin(table, 1).values.minimum(best[:, None])], 1)
        over = torch.cummax((table >= before[:, :-1]) | stopped[:, None], 1).values
        enough = torch.nonzero(over.double().mean(0) >= guard)
        steps = len(q) if not len(enough) else int(enough[0, 0]) + 1
        reached = before[:, steps]
        hit = table[:, :steps] <= reached[:, None]
        last = steps - 1 - torch.argmax(hit.flip(1).to(torch.uint8), 1)
        chosen = torch.where(hit.any(1), q[last], chosen)
        best, stopped = reached, over[:, steps - 1]
        if len(enough):
            break
    return float(chosen.mean())
