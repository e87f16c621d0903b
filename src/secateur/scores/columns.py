"""Scores of the columns of a matrix from the Gram of its inputs: how much is lost with each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor

ColumnMetric = Literal["wanda", "obs", "leverage"]


def column_scores(weight: Tensor, gram: Tensor, metric: ColumnMetric, damping: float) -> Tensor:
    """One number per column, [n], higher = keep.

    ``wanda``: |W_j|_1 sqrt(G_jj), Wanda's score summed over a column (FASP, arXiv:2501.09412, sec. 3.2).
    ``obs``: |W_j|^2 / [(G + delta I)^-1]_jj, the error that removing j leaves when the others make up for it
    (derived; Optimal Brain Surgeon for columns). ``leverage``: 1 - delta [(G + delta I)^-1]_jj, the ridge leverage
    score (MoDeGPT, arXiv:2408.09632, alg. 1).

    Args:
        weight: W, [out, n].
        gram: G = X X^T of its inputs, [n, n] float64.
        metric: which of them.
        damping: delta over the mean of G's diagonal.
    """
    wide = weight.to(gram)
    if metric == "wanda":
        return wide.abs().sum(0) * gram.diagonal().clamp(min=0).sqrt()
    factor, ridge = ridge_factor(gram, damping)
    inverse = torch.cholesky_inverse(factor).diagonal()
    if metric == "obs":
        return wide.square().sum(0) / inverse
    return 1 - ridge * inverse
