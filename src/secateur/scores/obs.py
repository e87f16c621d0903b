"""What is lost with some columns of matrices when all others make up for them (Optimal Brain Surgeon for sets)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor


@dataclass
class Share:
    """The columns that units have in one matrix.

    Attributes:
        weight: W, [rows, n]; changed by removals.
        inverse: (G + delta I)^-1 of its inputs' products, [n, n] float64; likewise.
        columns: [units, columns of each].
        worth: what a squared error of the products counts.
    """

    weight: Tensor
    inverse: Tensor
    columns: Tensor
    worth: float = 1.0

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, columns: Tensor, damping: float, worth: float = 1.0) -> Share:
        """Given G instead; delta is ``damping`` times the mean of its diagonal, raised tenfold until it exists."""
        factor, _ = ridge_factor(gram, damping)
        return cls(weight.to(gram).clone(), torch.cholesky_inverse(factor), columns.to(gram.device), worth)

    def costs(self) -> Tensor:
        """E_u = tr(W_u (I_uu)^-1 W_u^T) of every unit (OBSPA, arXiv:2403.18955), [units]."""
        parts = self.weight[:, self.columns]
        products = torch.einsum("ouc,oud->ucd", parts, parts)
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        found: Tensor = torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)
        return self.worth * found

    def remove(self, units: Tensor) -> Tensor:
        """Take units out, the others refitted: W - W_B I_BB^-1 I_B, and I - I_B^T I_BB^-1 I_B; what each costs."""
        columns = self.columns[units].flatten()
        root = torch.linalg.cholesky(self.inverse[columns][:, columns])
        u = torch.linalg.solve_triangular(root, self.inverse[columns], upper=False)
        v = torch.linalg.solve_triangular(root, self.weight[:, columns].t(), upper=False)
        self.weight -= v.t() @ u
        self.inverse -= u.t() @ u
        self.weight[:, columns] = 0
        self.inverse[columns], self.inverse[:, columns] = 0, 0
        self.inverse[columns, columns] = 1  # stands for nothing any more
        found: Tensor = v.square().sum(1).view(len(units), -1).sum(1)
        return self.worth * found


def elimination_scores(shares: Sequence[Share], rounds: int = 32) -> Tensor:
    """Remove units one by one, always those that cost least over all matrices; what each costs when it goes.

    Args:
        shares: of units in one or several matrices; used up.
        rounds: in how many rounds; each takes several units where there are more.

    Returns:
        [units], rising in the order in which they go.
    """
    units = len(shares[0].columns)
    found, left = torch.zeros(units, dtype=torch.float64), torch.ones(units, dtype=torch.bool)
    least = 0.0
    while left.any():
        costs = torch.stack([share.costs().cpu() for share in shares]).sum(0)
        costs[~left] = torch.inf
        going = torch.sort(costs, stable=True).indices[: min(-(-units // rounds), int(left.sum()))]
        lost = torch.stack([share.remove(going).cpu() for share in shares]).sum(0)
        for unit, cost in zip(going.tolist(), lost.tolist(), strict=True):
            least = max(cost, least * (1 + 1e-12))
            found[unit] = least
        left[going] = False
    return found
