"""Parameters and multiply-accumulates of a network, exactly, as functions of the channels that go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis, frozen

Term = Sequence[Axis]
"""Axes whose sizes are multiplied."""


class Products:
    """Products of axis sizes.

    Args:
        tables: lists of terms.
    """

    def __init__(self, *tables: Sequence[Term]) -> None:
        self._numbers: dict[bytes, int] = {}
        self._seen: dict[int, tuple[Axis, int]] = {}
        self._axes: list[Axis] = []
        self._tables = [self._terms(table) for table in tables]
        self._atoms = np.concatenate(self._axes)
        self._starts = np.cumsum([0, *(len(axis) for axis in self._axes)])[:-1]

    def _terms(self, terms: Sequence[Term]) -> NDArray[np.int64]:
        """Numbers of the axes of every term, padded with that of an axis of size 1."""
        one = self._number(frozen(1))
        width = max(map(len, terms), default=1)
        table = np.full((len(terms), max(width, 1)), one, dtype=np.int64)
        for row, term in enumerate(terms):
            table[row, : len(term)] = [self._number(axis) for axis in term]
        return table

    def _number(self, axis: Axis) -> int:
        seen = self._seen.get(id(axis))
        if seen is None or seen[0] is not axis:
            number = self._numbers.setdefault(axis.tobytes(), len(self._axes))
            if number == len(self._axes):
                self._axes.append(axis)
            seen = self._seen[id(axis)] = (axis, number)
        return seen[1]

    def _sizes(self, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.add.reduceat(~gone[self._atoms], self._starts, dtype=np.int64)
        return found

    def each(self, table: int, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        """What every term of a table still comes to."""
        found: NDArray[np.int64] = self._sizes(gone)[self._tables[table]].prod(axis=1)
        return found

    def terms(self, table: int) -> list[list[Axis]]:
        """The axes whose sizes are multiplied."""
        return [[self._axes[number] for number in row] for row in self._tables[table]]

    def smallest(self, gone: NDArray[np.bool_]) -> int:
        """Size of the smallest axis that remains."""
        return int(self._sizes(gone).min())


class Costs:
    """Sums of products of axis sizes.

    Args:
        params: axes of every parameter, shared ones once.
        macs: axes of every contraction.
    """

    def __init__(self, params: Sequence[Term], macs: Sequence[Term]) -> None:
        self._products = Products(params, macs)

    def params(self, gone: NDArray[np.bool_]) -> int:
        """Elements of the parameters that remain."""
        return int(self._products.each(0, gone).sum())

    def macs(self, gone: NDArray[np.bool_]) -> int:
        """Multiply-accumulates of one run on the example inputs that remain."""
        return int(self.each_macs(gone).sum())

    def each_macs(self, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The same by term."""
        return self._products.each(1, gone)

    def terms(self, measure: str) -> list[list[Axis]]:
        """The axes whose sizes are multiplied and summed: of ``params``, or of multiply-accumulates."""
        return self._products.terms(0 if measure == "params" else 1)

    def smallest(self, gone: NDArray[np.bool_]) -> int:
        """Size of the smallest axis that remains."""
        return self._products.smallest(gone)
