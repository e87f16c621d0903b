"""Backward elimination: which columns of a matrix to remove next, the others making up for each, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor
from secateur.spaces import positions

_STEPS = 1024  # at most; of more units several go at a time
_DELAYED = 32  # columns that go between two updates of the whole matrices


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
    weight: Tensor, gram: Tensor, metric: Tensor | None = None, group: int = 1, damping: float = 1e-4, left: int = 0
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
        left: units with which to stop; they come last in the order, and have no costs.
    """
    wide = weight.to(gram)
    if metric is not None:
        values, vectors = torch.linalg.eigh(metric.to(gram))
        wide = (vectors * values.clamp(min=0).sqrt()).t() @ wide
    factor, _ = ridge_factor(gram, damping)
    state = _State(wide.clone(), torch.cholesky_inverse(factor), group)
    units = len(gram) // group
    order: list[int] = []
    costs = [0.0]
    at_once = -(-units // _STEPS)
    while len(order) < units - left:
        losses = state.losses()
        losses[order] = torch.inf
        gone = torch.sort(losses, stable=True).indices[: min(at_once, units - left - len(order))]
        together = state.remove(positions(gone, group))
        order += gone.tolist()
        costs += [costs[-1] + together * (i + 1) / len(gone) for i in range(len(gone))]
    order += sorted(set(range(units)) - set(order))
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64) / (1 if metric is None else 2))


class _State:
    """W and I as they are after some removals: I - U U^T and W - V U^T, the products made for many removals at once.

    Args:
        weight: W, [out, n]; changed in place.
        inverse: I, [n, n]; changed in place.
        group: columns of one unit.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, group: int) -> None:
        self._weight, self._inverse, self._group = weight, inverse, group
        self._room = 1 if group > 1 else _DELAYED  # the losses of larger units need more than norms
        self._gone = torch.zeros(len(inverse), dtype=torch.bool, device=inverse.device)
        self._u, self._v = inverse.new_empty(len(inverse), 0), weight.new_empty(len(weight), 0)
        self._measure()

    def _measure(self) -> None:
        self._norms, self._diagonal = self._weight.square().sum(0), self._inverse.diagonal().clone()

    def losses(self) -> Tensor:
        """What the removal of each unit costs now, [units]."""
        if self._group == 1:
            return self._norms / self._diagonal.clamp(min=1e-300)
        size, group = len(self._inverse), self._group
        parts = self._weight.view(len(self._weight), size // group, group)
        products = torch.einsum("oub,ouc->ubc", parts, parts)
        blocks = torch.stack([self._inverse[i : i + group, i : i + group] for i in range(0, size, group)])
        found: Tensor = torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)
        return found

    def remove(self, columns: Tensor) -> float:
        """Take columns out; returns what they cost together."""
        theirs, lost = self._inverse[:, columns], self._weight[:, columns]
        mine = self._u[columns].t()
        theirs, lost = theirs - self._u @ mine, lost - self._v @ mine
        root = torch.linalg.cholesky(theirs[columns])
        u = torch.linalg.solve_triangular(root, theirs.t(), upper=False).t()
        v = torch.linalg.solve_triangular(root, lost.t(), upper=False).t()
        if self._group == 1:
            along = v.t() @ self._weight - (v.t() @ self._v) @ self._u.t()
            self._norms += ((u @ (v.t() @ v) - 2 * along.t()) * u).sum(1)
            self._diagonal -= u.square().sum(1)
        self._u, self._v = torch.cat([self._u, u], 1), torch.cat([self._v, v], 1)
        self._gone[columns] = True
        if self._u.shape[1] >= self._room:
            self._settle()
        return float(v.square().sum())

    def _settle(self) -> None:
        """Make the products."""
        self._inverse -= self._u @ self._u.t()
        self._weight -= self._v @ self._u.t()
        self._inverse[self._gone], self._inverse[:, self._gone], self._weight[:, self._gone] = 0, 0, 0
        self._inverse.diagonal()[self._gone] = 1  # stands for nothing any more
        self._u, self._v = self._u[:, :0], self._v[:, :0]
        self._measure()
