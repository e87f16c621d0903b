"""Backward elimination: which columns of a matrix to remove next, the others making up for each, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor
from secateur.spaces import positions

_STEPS = 1024  # at most; of more units several go at a time


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go.

    Attributes:
        order: all units, the first to go first, int64.
        costs: [units + 1], what is lost when so many are gone; the first is 0.
    """

    order: Tensor
    costs: Tensor

    def kept(self, count: int) -> Tensor:
        """The ``count`` units that go last, ascending."""
        return self.order[len(self.order) - count :].sort().values


def eliminate(
    weight: Tensor, gram: Tensor, metric: Tensor | None = None, group: int = 1, damping: float = 1e-4
) -> Elimination:
    """Remove units one by one, always that whose loss is least when the remaining columns are refitted.

    With I = (G + delta I)^-1 and W the least-squares readers, removing a set B of columns costs
    tr(F W_B I_BB^-1 W_B^T); W and I are then brought up to date (Optimal Brain Surgeon for sets of columns, in the
    metric of the loss; exact for the quadratic it minimises).

    Args:
        weight: W, [out, n].
        gram: G, mean over tokens of the inputs' products, [n, n] float64.
        metric: F, [out, out]: half of tr(F E) is the loss of an error with covariance E; None counts squares.
        group: columns of one unit.
        damping: delta over the mean of G's diagonal.
    """
    wide = weight.to(gram)
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric.to(gram))
        wide = (vectors * values.clamp(min=0).sqrt()).t() @ wide
    factor, _ = ridge_factor(gram, damping)
    inverse, wide = torch.cholesky_inverse(factor), wide.clone()
    units = len(gram) // group
    alive = torch.ones(units, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    costs = [0.0]
    at_once = -(-units // _STEPS)
    while len(order) < units:
        losses = _losses(wide, inverse, group)
        losses[~alive] = torch.inf
        gone = torch.sort(losses, stable=True).indices[: min(at_once, units - len(order))]
        columns = positions(gone, group)
        rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        lost = wide[:, columns]
        together = float((lost * torch.linalg.solve(inverse[columns][:, columns], lost.t()).t()).sum())
        wide -= lost @ rows
        inverse -= inverse[:, columns] @ rows
        wide[:, columns] = 0
        inverse[columns], inverse[:, columns] = 0, 0
        alive[gone] = False
        inverse[columns, columns] = 1  # stands for nothing any more
        order += gone.tolist()
        costs += [costs[-1] + together * (i + 1) / len(gone) for i in range(len(gone))]
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64) / (1 if metric is None else 2))


def _losses(weight: Tensor, inverse: Tensor, group: int) -> Tensor:
    """What the removal of each unit costs now, [units]."""
    if group == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=1e-300)
    units = len(inverse) // group
    parts = weight.view(len(weight), units, group)
    products = torch.einsum("oub,ouc->ubc", parts, parts)
    blocks = torch.stack([inverse[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(units)])
    losses: Tensor = torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)
    return losses
