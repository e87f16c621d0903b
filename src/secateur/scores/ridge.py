"""The one way normal equations are made solvable."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 8  # a Gram that is not positive definite gets ten times the ridge, so often at most


def ridge_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of G + delta I, and delta = damping * mean(diag G), raised tenfold until it exists.

    Args:
        gram: G, [n, n], symmetric.
        damping: relative ridge, above 0.
    """
    mean = float(gram.diagonal().mean().clamp(min=1e-30))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for step in range(_STEPS):
        delta = damping * 10**step * mean
        factor, info = torch.linalg.cholesky_ex(gram + delta * eye)
        if not int(info):
            return factor, delta
    raise ArithmeticError("the Gram matrix is not finite")
