"""The gains of the last norm, where the head has no matrix of its own to refit."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor


def aim_gains(gains: Tensor, tables: tuple[Tensor, Tensor], gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Gains g* with which a tied head gives on the cut stream most nearly what it gave on the dense one.

    With n the norm's output before its gains, g* minimises |E diag(g*) n - E' x'|^2 + delta |g* - g|^2: normal
    equations of the stream's width, (E^T E) o (n n^T) g* = diag(E^T E' x' n^T).

    Args:
        gains: g, [D], what the norm multiplies with now.
        tables: E and E', [vocab, D]: the table now, and that of the dense model.
        gram: x x^T of the head's inputs behind the cuts, [D, D].
        cross: x' x^T, x' being those of the dense model.
        damping: delta over the mean of the left side's diagonal.
    """
    inverse = gains.sign() / gains.abs().clamp(min=1e-6)
    now, dense = (table.to(gram) for table in tables)
    left = (now.t() @ now) * gram * inverse * inverse[:, None]
    right = ((now.t() @ dense) * (cross * inverse).t()).sum(1)
    factor, ridge = ridge_factor(left, damping)
    return torch.cholesky_solve((right + ridge * gains)[:, None], factor)[:, 0]
