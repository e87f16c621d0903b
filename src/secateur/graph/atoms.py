"""Channel atoms: what one position of one axis is, and which positions must go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Axis = NDArray[np.int64]
"""The atoms of an axis, in order; 0 is the frozen atom, which never goes."""


@dataclass(frozen=True)
class Link:
    """An axis that is also seen as several: position (i, j, ...) of ``factors`` is entry i * n + j ... of ``flat``.

    An entry of ``flat`` is gone exactly if one of its factors' atoms is.
    """

    flat: Axis
    factors: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(factor) for factor in self.factors)


class Atoms:
    """Atoms, and pairs of them that must go together; pairs are merged in one pass at the end."""

    def __init__(self) -> None:
        self._count = 1
        self._left: list[Axis] = []
        self._right: list[Axis] = []
        self.links: list[Link] = []

    def fresh(self, size: int) -> Axis:
        """New atoms; an axis of one position is frozen, since it cannot get smaller."""
        if size <= 1:
            return frozen(size)
        self._count += size
        return np.arange(self._count - size, self._count, dtype=np.int64)

    def tie(self, left: Axis, right: Axis) -> Axis:
        """Make two axes of one size the same, position by position; returns the one that stands for both."""
        if left is right:
            return left
        if len(left) != len(right):
            raise ValueError(f"axes of {len(left)} and {len(right)} positions are not the same")
        stuck = is_frozen(right)
        if not (stuck and is_frozen(left)):
            self._left.append(left)
            self._right.append(right)
        return right if stuck else left

    def freeze(self, axis: Axis) -> Axis:
        """Forbid every change of an axis."""
        return self.tie(axis, frozen(len(axis)))

    def merge(self, factors: Sequence[Axis]) -> Axis:
        """The axis that several adjacent ones become when they are flattened."""
        if len(factors) == 1:
            return factors[0]
        size = int(np.prod([len(factor) for factor in factors]))
        flat = frozen(size) if all(is_frozen(factor) for factor in factors) else self.fresh(size)
        self.link(flat, factors)
        return flat

    def split(self, flat: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes that one becomes when it is unflattened."""
        if len(sizes) == 1:
            return [flat]
        factors = [frozen(size) if is_frozen(flat) else self.fresh(size) for size in sizes]
        self.link(flat, factors)
        return factors

    def link(self, flat: Axis, factors: Sequence[Axis]) -> None:
        """Say that ``flat`` is the product of ``factors``."""
        if len(flat) != prod(len(factor) for factor in factors):
            raise ValueError(f"an axis of {len(flat)} positions is no such product")
        if not (is_frozen(flat) and all(is_frozen(factor) for factor in factors)):
            self.links.append(Link(flat, tuple(factors)))

    def classes(self) -> Classes:
        """Merge all pairs."""
        parent = np.arange(self._count, dtype=np.int64)
        left = np.concatenate(self._left) if self._left else frozen(0)
        right = np.concatenate(self._right) if self._right else frozen(0)
        while len(left):
            left, right = parent[left], parent[right]
            open_ = left != right
            left, right = left[open_], right[open_]
            np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
            while not np.array_equal(parent, jumped := parent[parent]):
                parent = jumped
        return Classes(parent, self.links)


class Classes:
    """Atoms merged into classes; a class is named by its smallest atom.

    Attributes:
        parent: the class of every atom.
        links: what is a product of what, in classes.
    """

    def __init__(self, parent: Axis, links: Sequence[Link]) -> None:
        self.parent = parent
        self.links = [Link(parent[link.flat], tuple(parent[f] for f in link.factors)) for link in links]
        self._freeze()
        self._found: dict[int, tuple[Axis, Axis]] = {}
        self._composed = np.zeros(len(parent), dtype=bool)
        self._linked = np.zeros(len(parent), dtype=bool)
        for link in self.links:
            self._composed[link.flat] = True
            self._linked[np.concatenate([link.flat, *link.factors])] = True

    def of(self, axis: Axis) -> Axis:
        """The class of every position of an axis; one array gives one array."""
        known = self._found.get(id(axis))
        if known is None or known[0] is not axis:
            known = self._found[id(axis)] = (axis, axis if axis is frozen(len(axis)) else self.parent.take(axis))
        return known[1]

    def __len__(self) -> int:
        return len(self.parent)

    def linked(self, axis: Axis) -> NDArray[np.bool_]:
        """Which classes stand in a link."""
        found: NDArray[np.bool_] = self._linked[axis]
        return found

    def composed(self, axis: Axis) -> NDArray[np.bool_]:
        """Which classes are products of others, so that they never go alone."""
        found: NDArray[np.bool_] = self._composed[axis]
        return found

    def _freeze(self) -> None:
        """What stands in a link with something frozen is frozen as well, until nothing changes."""
        while True:
            lost = [_frozen_by(link) for link in self.links]
            gone = np.unique(np.concatenate(lost)) if lost else frozen(0)
            if not len(gone):
                return
            self.parent[np.isin(self.parent, gone)] = 0
            self.links = [
                Link(self.parent[link.flat], tuple(self.parent[f] for f in link.factors)) for link in self.links
            ]


@lru_cache(maxsize=4096)
def frozen(size: int) -> Axis:
    """An axis that cannot change; one array for all of a size."""
    found = np.zeros(size, dtype=np.int64)
    found.flags.writeable = False
    return found


def is_frozen(axis: Axis) -> bool:
    """Whether an axis is known to be frozen already while rules run."""
    if not len(axis) or axis is frozen(len(axis)):
        return True
    return not axis.item(0) and not axis.any()


def along(values: NDArray[Any], position: int, rank: int) -> NDArray[Any]:
    """A vector along one of several axes."""
    return values.reshape([-1 if axis == position else 1 for axis in range(rank)])


def _frozen_by(link: Link) -> Axis:
    """Classes of a link that its frozen ones freeze."""
    held = link.flat.reshape(link.shape) == 0
    lost, bound = [], np.ones(link.shape, dtype=bool)
    for position, factor in enumerate(link.factors):
        stuck = held.any(axis=tuple(axis for axis in range(held.ndim) if axis != position))
        lost.append(factor[stuck & (factor != 0)])
        bound &= along(stuck | (factor == 0), position, held.ndim)
    lost.append(link.flat[bound.ravel() & (link.flat != 0)])
    return np.concatenate(lost)
