"""Parameters and multiply-accumulates of a network, exactly, as functions of the channels that go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis, frozen

Term = Sequence[Axis]
"""Axes whose sizes are multiplied."""


class Costs:
    """Sums of products of axis sizes.

    Args:
        params: axes of every parameter, shared ones once.
        macs: axes of every contraction.
    """

    def __init__(self, params: Sequence[Term], macs: Sequence[Term]) -> None:
        self._numbers: dict[bytes, int] = {}
        self._seen: dict[int, tuple[Axis, int]] = {}
        self._axes: list[Axis] = []
        self._params = self._terms(params)
        self._macs = self._terms(macs)
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

    def params(self, gone: NDArray[np.bool_]) -> int:
        """Elements of the parameters that remain."""
        return int(self._sizes(gone)[self._params].prod(axis=1).sum())

    def macs(self, gone: NDArray[np.bool_]) -> int:
        """Multiply-accumulates of one run on the example inputs that remain."""
        return int(self.each_macs(gone).sum())

    def each_macs(self, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The same by term."""
        found: NDArray[np.int64] = self._sizes(gone)[self._macs].prod(axis=1)
        return found

    def terms(self, measure: str) -> list[list[Axis]]:
        """The axes whose sizes are multiplied and summed: of ``params``, or of multiply-accumulates."""
        table = self._params if measure == "params" else self._macs
        return [[self._axes[number] for number in row] for row in table]

    def smallest(self, gone: NDArray[np.bool_]) -> int:
        """Size of the smallest axis that remains."""
        return int(self._sizes(gone).min())
