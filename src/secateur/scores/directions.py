"""Directions of a signal: the principal ones, random ones, and those that a LayerNorm does not take away."""

from __future__ import annotations

import torch
from torch import Tensor

_NO_MEAN = 1e-8  # of an entry of a unit vector


def principal(gram: Tensor, count: int) -> Tensor:
    """The ``count`` largest eigenvectors of a Gram matrix [width, width], [width, count]; signs are fixed."""
    _, vectors = torch.linalg.eigh(gram)  # ascending
    directions: Tensor = vectors.flip(1)[:, :count]
    # the sign of an eigenvector is arbitrary: make its largest entry positive
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * largest.sign()


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrix."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed


def centred(gram: Tensor) -> Tensor:
    """Gram of a signal without its mean: what a LayerNorm sees."""
    gram = gram - gram.mean(0)
    return gram - gram.mean(1, keepdim=True)


def in_hyperplane(directions: Tensor, gram: Tensor) -> Tensor:
    """As many directions without a mean, for norms that take it away: these centred, the rest principal ones.

    Args:
        directions: [width, count] orthonormal columns.
        gram: of the centred signal.
    """
    means = directions.mean(0)
    if means.abs().max() < _NO_MEAN:
        return directions
    left, values, _ = torch.linalg.svd(directions - means, full_matrices=False)
    found: Tensor = left[:, values > 1e-9]
    if missing := directions.shape[1] - found.shape[1]:
        others = torch.eye(len(gram), dtype=gram.dtype) - found @ found.t()
        rest = torch.linalg.eigh(others @ gram @ others).eigenvectors.flip(1)[:, :missing]
        found = torch.cat([found, rest], dim=1)
    return found
