"""Ridge least squares: the reader of a cut signal takes over what the removed units said."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor
from secateur.spaces import positions

DAMPING = 1e-2
"""Ridge as a share of the mean of the Gram's diagonal."""


def silenced(gram: Tensor, target: Tensor | None, kept: Tensor | None, span: int) -> tuple[Tensor, Tensor | None]:
    """Statistics without the units that went before: columns that are zero there ask for nothing and get nothing.

    Args:
        gram: X X^T, [n, n].
        target: Y X^T, [out, n].
        kept: units that are there; None for all.
        span: columns of one unit.
    """
    if kept is None:
        return gram, target
    there = torch.zeros(len(gram), dtype=gram.dtype)
    there[positions(kept.cpu(), span)] = 1
    there = there.to(gram.device)
    return gram * there * there[:, None], None if target is None else target * there


def aim(weight: Tensor, gram: Tensor, target: Tensor, damping: float) -> Tensor:
    """W* that minimises |W* X - Y|^2 + delta |W* - W|^2: outputs that are wanted, on other inputs than W's own.

    Args:
        weight: W, [out, n].
        gram: X X^T of the inputs it will see, [n, n].
        target: Y X^T, [out, n].
        damping: delta over the mean of the Gram's diagonal.
    """
    factor, delta = ridge_factor(gram, damping)
    right = target.to(gram) + delta * weight.to(gram)
    return torch.cholesky_solve(right.t(), factor).t()


def refit(weight: Tensor, gram: Tensor, kept: Tensor, damping: float = DAMPING, cross: Tensor | None = None) -> Tensor:
    """Readers W* of the kept units that come nearest to W on the data, shrunk towards W itself.

    W* minimises |W* X_M - W X|^2 + delta |W* - W_M|^2, so W* = W_M + W_P G[P, M] (G[M, M] + delta I)^-1 with P the
    removed units; delta to infinity is plain slicing, and at delta = 0 it is MoDeGPT's Nystrom step (FASP,
    arXiv:2501.09412, sec. 3.3; MoDeGPT, arXiv:2408.09632, alg. 1).

    Args:
        weight: W, [out, n].
        gram: G = X X^T of its inputs, [n, n]; behind cuts, of the inputs it will see.
        kept: indices M of the units that stay.
        damping: delta over the mean of G's diagonal.
        cross: Y X^T, [out, n], where the outputs wanted are others than W X.

    Returns:
        [out, n] in the type of ``gram``, zero in the columns of removed units.
    """
    wide = weight.to(gram)
    result = torch.zeros_like(wide)
    part = gram[kept][:, kept]
    factor, _ = ridge_factor(part, damping)
    if cross is None:  # exactly nothing where the removed inputs are silent
        removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        removed[kept] = False
        missing = wide[:, removed] @ gram[removed][:, kept]
    else:
        missing = cross.to(gram)[:, kept] - wide[:, kept] @ part
    result[:, kept] = wide[:, kept] + torch.cholesky_solve(missing.t(), factor).t()
    return result


def centred(gram: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Sum of products of deviations from the mean: G - n m m^T, from G, the sum of the signal [n] and its count."""
    return gram - torch.outer(first, first) / count.clamp(min=1)


def absorb(bias: Tensor | None, weight: Tensor, mean: Tensor) -> Tensor:
    """A bias that takes over what a matrix makes of a constant signal: b + W m (FLAP, arXiv:2312.11983, sec. 3.3).

    Args:
        bias: b, [out]; None for none.
        weight: W, [out, n], what no longer reads the signal, or the old matrix less the new.
        mean: m, [n].
    """
    moved = weight.to(mean) @ mean
    return moved if bias is None else bias.to(moved) + moved
