"""Spectra of row subsets through the Gram matrix, and the Kolmogorov-Smirnov distance between spectra."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def ks_distance(reference: Tensor, other: Tensor) -> Tensor:
    """Two-sample Kolmogorov-Smirnov statistic sup_t |F(t) - G(t)|, exact, ties included (section 3).

    reference [n], other [..., m] -> [...] in float64.
    """
    left = reference.double().sort().values.expand(*other.shape[:-1], -1).contiguous()
    right = other.double().sort(dim=-1).values.contiguous()
    points = torch.cat([left, right], dim=-1)
    gap: Tensor = torch.searchsorted(left, points, right=True).double() / left.shape[-1]
    gap -= torch.searchsorted(right, points, right=True).double() / right.shape[-1]
    return gap.abs().amax(-1)


class Spectrum:
    """Singular values of row subsets of one matrix W [width, d] through its Gram matrix, never an SVD (section 3).

    The Gram W^T W is formed once; a subset costs one product with the rows removed or kept, whichever are fewer, and
    one ``eigvalsh``. All in float64: downdating cancels, and squaring halves the digits.
    """

    def __init__(self, weight: Tensor, gram: Tensor | None = None) -> None:
        self.weight = weight.detach().double()
        self.width, self.d = weight.shape
        self.gram = self.weight.T @ self.weight if gram is None else gram

    def values(self, kept: Tensor | None = None) -> Tensor:
        """Singular values of W[kept], ascending, [min(len(kept), d)]; of W itself without ``kept``."""
        if kept is None:
            kept = torch.arange(self.width, device=self.weight.device)
        if len(kept) < self.d or 2 * len(kept) < self.width:
            rows = self.weight[kept]
            gram = rows @ rows.T if len(kept) < self.d else rows.T @ rows
        else:
            removed = torch.ones(self.width, dtype=torch.bool, device=self.weight.device)
            removed[kept] = False
            rows = self.weight[removed]
            gram = self.gram - rows.T @ rows
        squares: Tensor = torch.linalg.eigvalsh(gram)
        return squares.clamp(min=0).sqrt()

    def bands(self, count: int) -> Tensor:
        """Leverage of each row in ``count`` groups of right singular directions, [width, count], columns standardised.

        Directions are scaled to the same energy first (u = W v / sigma), so no column, nor their sum, is the row norm.
        """
        energy, basis = torch.linalg.eigh(self.gram)
        good = energy > energy[-1] * self.d * 1e-12
        basis, energy = basis[:, good].flip(1), energy[good].flip(0)
        leverage = (self.weight @ basis).square() / energy
        edges = torch.linspace(0, leverage.shape[1], count + 1).round().long().tolist()
        columns = [leverage[:, a:b].sum(1) for a, b in pairwise(edges)]
        return standardise(torch.stack(columns, 1)).float()


def standardise(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the rows of ``values`` [width, ...]; constant columns become 0."""
    mean = values.mean(0)
    centred = values - mean
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-9 * mean.abs() + 1e-30)
