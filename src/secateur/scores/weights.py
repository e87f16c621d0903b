"""Scores of single weights: one number for every entry of a matrix, higher = keep."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| sqrt(h_j) (Wanda, arXiv:2306.11695, eq. 1); |W_ij| where nothing was ever seen of the inputs.

    Args:
        weight: W, [out, in].
        squares: h, [in]: mean or sum over tokens of the squared inputs.
    """
    wide = weight.float().abs()
    return wide * squares.clamp(min=0).sqrt().to(wide) if bool((squares > 0).any()) else wide


def ria_scores(weight: Tensor, squares: Tensor, power: float) -> Tensor:
    """(|W_ij| / sum of column j + |W_ij| / sum of row i) * h_j^(power / 2) (RIA, ICLR 2024, and its code).

    Args:
        weight: W, [out, in].
        squares: h, [in], as for :func:`wanda_scores`.
        power: how much the inputs count; 0 is relative importance alone.
    """
    wide = weight.float().abs()
    columns, rows = (wide.sum(axis, keepdim=True).clamp(min=1e-30) for axis in (0, 1))
    relative = wide / columns + wide / rows
    return relative * (squares.clamp(min=0) ** (power / 2)).to(wide) if bool((squares > 0).any()) else relative


def obs_scores(weight: Tensor, gram: Tensor, damping: float) -> Tensor:
    """W_ij^2 / [H^-1]_jj: what the loss grows by when a weight goes and its row makes up for it (SparseGPT's score).

    Args:
        weight: W, [out, in].
        gram: H = X X^T up to a factor, [in, in].
        damping: ridge over the mean of H's diagonal.
    """
    factor, _ = ridge_factor(gram, damping)
    return weight.to(gram).square() / torch.cholesky_inverse(factor).diagonal()


def lamp_scores(scores: Tensor) -> Tensor:
    """s_u^2 / sum of s_v^2 over all v that are not smaller: comparable from matrix to matrix (LAMP, arXiv:2010.07611).

    The largest of a matrix has 1, so that one ranking of all matrices empties none.

    Args:
        scores: |W|, or any other score at least 0, [out, in].
    """
    squares = scores.double().square().flatten()
    ascending, order = torch.sort(squares, stable=True)
    tails = ascending.flip(0).cumsum(0).flip(0)
    ranked = torch.where(tails > 0, ascending / tails.clamp(min=torch.finfo(torch.float64).tiny), ascending)
    return torch.empty_like(squares).scatter_(0, order, ranked).view(scores.shape)
