"""Which entries of a delta are kept: counts that are exact to one, drawn or by score, and how they are spread again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.archives.sparse import Indices, random_indices
from secateur.cuts.masks import best
from secateur.methods.base import keep_best

Axis = Literal[0, 1] | None


@dataclass(frozen=True)
class Signal:
    """What a matrix reads: mean and mean square of every column's input over tokens, float64 [columns]."""

    mean: Tensor
    square: Tensor

    @property
    def norms(self) -> Tensor:
        """Root of the mean square; 1 of a signal that was never seen (an expert that no token visited)."""
        return self.square.sqrt() if bool(self.square.any()) else torch.ones_like(self.square)


@dataclass(frozen=True)
class Selection:
    """Kept entries (or rows, or columns) of a matrix.

    Attributes:
        size: of how many.
        indices: sorted.
        axis: 0 of rows, 1 of columns, None of entries.
        seed: by which they were drawn, where they were.
    """

    size: int
    indices: Indices
    axis: Axis = None
    seed: int | None = None

    @property
    def share(self) -> float:
        """Share that is kept."""
        return len(self.indices) / self.size if self.size else 1.0

    def entries(self, delta: Tensor) -> int:
        """How many entries are kept."""
        return len(self.indices) * (1 if self.axis is None else delta.shape[1 - self.axis])

    def take(self, delta: Tensor) -> Tensor:
        """The kept values of a matrix, in the order of the indices."""
        where = torch.from_numpy(self.indices).to(delta.device)
        return delta.reshape(-1)[where] if self.axis is None else delta.index_select(self.axis, where)

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The matrix with these values, zero elsewhere."""
        found, where = values.new_zeros(shape), torch.from_numpy(self.indices).to(values.device)
        if self.axis is None:
            found.view(-1)[where] = values.reshape(-1)
        else:
            found.index_copy_(self.axis, where, values)
        return found

    def masked(self, delta: Tensor) -> Tensor:
        """The matrix, zero where nothing is kept."""
        return self.spread(self.take(delta), tuple(delta.shape))


def kept_count(size: int, ratio: float) -> int:
    """How many of ``size`` stay when a share goes."""
    return size - round(ratio * size)


def random_choice(size: int, count: int, seed: int, axis: Axis = None) -> Selection:
    """Drawn entries, rows or columns."""
    return Selection(size, random_indices(size, count, seed), axis, seed)


def best_units(scores: Tensor, count: int, axis: Axis = None) -> Selection:
    """Those of the highest scores, of equals the first."""
    return Selection(scores.numel(), keep_best(scores, count).cpu().numpy().astype(np.int64), axis)


def best_entries(scores: Tensor, count: int, by_row: bool) -> Selection:
    """Entries of the highest scores of a matrix.

    Args:
        scores: [rows, columns].
        count: how many in all.
        by_row: the same number in every row; where the count does not divide, the rows whose next entry scores highest
            keep one more.
    """
    kept = best(scores, count, "row" if by_row else "matrix")
    return Selection(scores.numel(), np.flatnonzero(kept.cpu().numpy().reshape(-1)).astype(np.int64))
