"""Closed sets of classes: what goes when a head goes.

A set of classes is closed if it can go as a whole: in every link, an entry is in it exactly if one of the entry's
factors is. All positions of one factor are followed together, each under its own label; where their sets overlap, one
by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis, Classes, Link, along


def closed_sets(classes: Classes) -> Iterator[list[Axis]]:
    """Batches of units alike, every unit as its classes: one batch for each factor that is no product itself."""
    search = _Search(classes)
    done = np.zeros(len(classes), dtype=bool)
    done[0] = True
    for link in classes.links:
        for factor in link.factors:
            seeds = np.unique(factor[~done[factor] & ~classes.composed(factor)])
            if len(seeds):
                found = search.together(seeds)
                units = search.one_by_one(seeds) if found is None else found
                done[np.concatenate([seeds, *units])] = True
                if units:
                    yield units


class _Search:
    def __init__(self, classes: Classes) -> None:
        self._links = classes.links
        members = [np.unique(np.concatenate([link.flat, *link.factors])) for link in classes.links]
        numbers = np.repeat(np.arange(len(members)), [len(found) for found in members])
        atoms = np.concatenate(members) if members else np.zeros(0, dtype=np.int64)
        order = np.argsort(atoms, kind="stable")
        self._atoms, self._numbers = atoms[order], numbers[order]
        self._label = np.full(len(classes), -1, dtype=np.int64)

    def _touched(self, atoms: Axis) -> list[int]:
        """Links in which some classes stand."""
        start = np.searchsorted(self._atoms, atoms, "left")
        count = np.searchsorted(self._atoms, atoms, "right") - start
        index = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
        return sorted(set(self._numbers[index].tolist()))

    def together(self, seeds: Axis) -> list[Axis] | None:
        """The closed sets around each of some classes; None where they are not disjoint, or hold something frozen."""
        label, marked = self._label, [seeds]
        label[seeds] = np.arange(len(seeds))
        queue, alright = self._touched(seeds), True
        while queue and alright:
            current = queue.pop(0)
            spread = _spread(self._links[current], label)
            if spread is None or not spread[0].all():
                alright = False
            elif len(spread[0]):
                more, settled = spread
                marked.append(more)
                queue += [n for n in self._touched(more) if n not in queue and not (settled and n == current)]
        members = np.unique(np.concatenate(marked))
        labels = label[members]
        label[members] = -1
        label[0] = -1
        if not alright:
            return None
        members = members[np.argsort(labels, kind="stable")]
        bounds = np.cumsum([0, *np.bincount(labels, minlength=len(seeds))]).tolist()
        return [members[start:end] for start, end in pairwise(bounds)]

    def one_by_one(self, seeds: Axis) -> list[Axis]:
        """The closed sets around each of some classes, but those that hold something frozen."""
        found = {closed: None for seed in seeds.tolist() if (closed := self._closure(seed)) is not None}
        return [np.array(sorted(closed), dtype=np.int64) for closed in found]

    def _closure(self, seed: int) -> frozenset[int] | None:
        gone = np.array([seed], dtype=np.int64)
        queue = self._touched(gone)
        while queue:
            link = self._links[queue.pop(0)]
            more = np.setdiff1d(_completed(link, gone), gone)
            if (more == 0).any():
                return None
            if len(more):
                gone = np.concatenate([gone, more])
                queue += [number for number in self._touched(more) if number not in queue]
        return frozenset(gone.tolist())


def _spread(link: Link, label: Axis) -> tuple[Axis, bool] | None:
    """Label what must go with what is labelled, in one link.

    Returns:
        What was labelled, and whether the link holds now; None where two labels meet.
    """
    rank = len(link.factors)
    induced = np.full(link.shape, -1, dtype=np.int64)
    before = [label[factor] for factor in link.factors]
    for position, labels in enumerate(before):
        if (labels >= 0).any():
            own = along(labels, position, rank)
            if ((own >= 0) & (induced >= 0) & (own != induced)).any():
                return None
            induced = np.where(own >= 0, own, induced)
    entries = label[link.flat]
    wanted = induced.ravel()
    known, sought = entries >= 0, wanted >= 0
    if (known & sought & (entries != wanted)).any():
        return None
    new = sought & ~known
    found, labels = link.flat[new], wanted[new]
    label[found] = labels
    if (label[found] != labels).any():
        return None
    bare = known & ~sought
    if not bare.any():
        after = (label[factor] for factor in link.factors)
        return found, all((one == other).all() for one, other in zip(before, after, strict=True))
    slabs, lone = entries.reshape(link.shape), bare.reshape(link.shape)
    for position, factor in enumerate(link.factors):
        others = tuple(axis for axis in range(rank) if axis != position)
        needed = lone.any(axis=others)
        least, most = slabs.min(axis=others), slabs.max(axis=others)
        if (least == most)[needed].all():
            atoms, labels = factor[needed], least[needed]
            label[atoms] = labels
            return None if (label[atoms] != labels).any() else (np.concatenate([found, atoms]), False)
    return None


def _completed(link: Link, gone: Axis) -> Axis:
    """What must go besides, so that one link holds; of several ways the one that takes the fewest entries."""
    rank = len(link.factors)
    entries: NDArray[np.bool_] = np.isin(link.flat, gone).reshape(link.shape)
    covered = np.zeros(link.shape, dtype=bool)
    for position, factor in enumerate(link.factors):
        covered |= along(np.isin(factor, gone).astype(bool), position, rank)
    found = [link.flat[(covered & ~entries).ravel()]]
    bare = entries & ~covered
    if bare.any():
        ways = []
        for position, factor in enumerate(link.factors):
            needed: NDArray[np.bool_] = np.asarray(bare.any(axis=tuple(a for a in range(rank) if a != position)))
            if factor[needed].all():
                slab = np.broadcast_to(along(needed, position, rank), link.shape)
                ways.append((int((slab & ~entries).sum()), position, factor[needed]))
        found.append(min(ways, key=lambda way: way[:2])[2] if ways else np.zeros(1, dtype=np.int64))
    return np.concatenate(found)
