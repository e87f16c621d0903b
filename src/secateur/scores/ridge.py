"""The one way normal equations are made solvable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 8  # a Gram that is not positive definite gets ten times the ridge, so often at most
_RAISED: Final[list[float]] = []


class NoSolutionError(ArithmeticError):
    """Normal equations that cannot be solved."""


def ridge_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of G + delta I, and delta = damping * mean(diag G), raised tenfold until it exists.

    Args:
        gram: G, [n, n], symmetric.
        damping: relative ridge, above 0.

    Raises:
        NoSolutionError: there is none.
    """
    for times, delta in _ridges(gram, damping):
        factor, info = torch.linalg.cholesky_ex(_ridged(gram, delta))
        if not int(info):
            _note(times)
            return factor, delta
    raise NoSolutionError(_NONE)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (G + delta I)^-1, with the first delta, as of ``ridge_factor``, for which there is one.

    Rounding can leave an inverse that has none where G + delta I itself has one.
    """
    for times, delta in _ridges(gram, damping):
        factor, info = torch.linalg.cholesky_ex(_ridged(gram, delta))
        if int(info):
            continue
        upper: Tensor
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not int(info) and bool(upper.isfinite().all()):
            _note(times)
            return upper
    raise NoSolutionError(_NONE)


def take_raised() -> list[float]:
    """By how many times ridges were raised, of those that were since this was last asked.

    Kept here, because who solves an equation deep inside a method has nobody to tell.
    """
    found = _RAISED[:]
    del _RAISED[: len(found)]
    return found


_NONE: Final = "its normal equations have no solution, however damped: the Gram matrix is not finite"


def _ridges(gram: Tensor, damping: float) -> Iterator[tuple[float, float]]:
    """By how many times the ridge is raised, and the ridge."""
    mean = float(gram.diagonal().mean().clamp(min=1e-30))
    return ((10.0**step, damping * 10**step * mean) for step in range(_STEPS))


def _ridged(gram: Tensor, delta: float) -> Tensor:
    return gram + delta * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _note(times: float) -> None:
    if times > 1:
        _RAISED.append(times)
