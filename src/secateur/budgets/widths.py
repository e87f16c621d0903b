"""Widths of coupled channels under a budget as a convex problem (arXiv:2203.02549, stated per coupled group).

With x = log of the share of every space that stays, parameters and multiply-accumulates are sums of exponentials of
linear functions of x. What is maximised is linear in x, so that there is one optimum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis
from secateur.graph.spaces import ChannelSpace, Graph

Reals = NDArray[np.float64]
_Monomial = tuple[int, ...]
"""Numbers of the spaces whose shares are multiplied, sorted."""


@dataclass(frozen=True)
class Sums:
    """Sum over monomials of ``weight * exp(powers @ x)``.

    Attributes:
        weights: [monomials], positive.
        powers: [monomials, spaces].
    """

    weights: Reals
    powers: Reals

    def __call__(self, x: Reals) -> float:
        return float((self.weights * np.exp(self.powers @ x)).sum())

    def slopes(self, x: Reals) -> tuple[Reals, Reals]:
        """Gradient [spaces] and curvature [spaces, spaces]."""
        each = self.weights * np.exp(self.powers @ x)
        return self.powers.T @ each, (self.powers.T * each) @ self.powers


class Widths:
    """Costs and worth of a graph as functions of the shares of its spaces that stay.

    Args:
        graph: the network's channels.
        spaces: those that may be cut; the others stay whole.
    """

    def __init__(self, graph: Graph, spaces: Sequence[ChannelSpace]) -> None:
        self._graph, self._count = graph, len(spaces)
        owners: dict[int, set[int]] = defaultdict(set)
        for number, space in enumerate(spaces):
            for atom in np.unique(np.concatenate(space.classes)).tolist():
                owners[atom].add(number)
        self._owners = {atom: tuple(sorted(found)) for atom, found in owners.items()}
        self._known: dict[bytes, dict[_Monomial, float]] = {}

    def _parts(self, axis: Axis) -> dict[_Monomial, float]:
        """How many positions of an axis go with which spaces; a position seen as a product goes with each factor."""
        key = axis.tobytes()
        if key not in self._known:
            found: dict[_Monomial, float] = defaultdict(float)
            for atom in axis.tolist():
                found[self._owners.get(atom, ())] += 1.0
            self._known[key] = found
        return self._known[key]

    def cost(self, measure: str) -> Sums:
        """``params``, or multiply-accumulates, as they remain."""
        found: dict[_Monomial, float] = defaultdict(float)
        for term in self._graph.costs.terms(measure):
            product: dict[_Monomial, float] = {(): 1.0}
            for axis in term:
                parts, longer = self._parts(axis), defaultdict[_Monomial, float](float)
                for left, a in product.items():
                    for right, b in parts.items():
                        longer[tuple(sorted((*left, *right)))] += a * b
                product = longer
            for monomial, weight in product.items():
                found[monomial] += weight
        powers = np.zeros((len(found), self._count))
        for row, monomial in enumerate(found):
            np.add.at(powers[row], list(monomial), 1.0)
        return Sums(np.array(list(found.values())), powers)

    def worth(self) -> Reals:
        """[spaces]: how the sum of the log-densities of all weights that multiply grows with x.

        A weight's density is the product of the shares of its axes. An axis that several spaces share, as behind a
        concatenation, counts with their weighted geometric mean: of the bounds that are linear in x, the one that is
        right when all are alike.
        """
        found = np.zeros(self._count)
        steps = dict.fromkeys(self._graph.charged)
        weights = {value.name for step in steps for value in step.inputs.values() if value.kind == "parameter"}
        for name in sorted(weights):
            axes = self._graph.axes[name]
            for axis in axes if len(axes) > 1 else ():
                for monomial, count in self._parts(axis).items():
                    np.add.at(found, list(monomial), count / len(axis))
        return found


def allocate(worth: Reals, cost: Sums, budget: float, least: Reals, tolerance: float = 1e-9) -> Reals:
    """Maximise ``worth @ x`` where the cost is at most the budget and log(least) <= x <= 0.

    The multiplier of the budget is found by bisection; for every multiplier, x by Newton steps inside the box.

    Args:
        worth: [spaces], at least zero.
        cost: convex in x, growing in every entry.
        budget: where it is below what ``least`` costs, ``least`` is the answer.
        least: [spaces], the smallest shares.

    Returns:
        [spaces]: shares exp(x).
    """
    low, x = np.log(least), np.zeros(len(least))
    if not len(x) or cost(x) <= budget:
        return np.exp(x)
    if cost(low) >= budget:
        return np.asarray(least, dtype=np.float64)
    scale = cost(x)
    small, large = -30.0, 30.0  # of the multiplier's logarithm
    while large - small > tolerance:
        middle = (small + large) / 2
        x = _inner(worth, cost, np.exp(middle) / scale, low, x)
        small, large = (middle, large) if cost(x) > budget else (small, middle)
    return np.exp(_inner(worth, cost, np.exp(large) / scale, low, x))


def _inner(worth: Reals, cost: Sums, price: float, low: Reals, x: Reals, rounds: int = 200) -> Reals:
    """The x in the box that minimises price * cost - worth @ x."""

    def value(at: Reals) -> float:
        return price * cost(at) - float(worth @ at)

    now = value(x)
    for _ in range(rounds):
        slope, curvature = cost.slopes(x)
        slope = price * slope - worth
        held = ((x <= low) & (slope > 0)) | ((x >= 0) & (slope < 0))
        free = np.flatnonzero(~held)
        if not len(free) or np.abs(slope[free]).max() < 1e-12 * max(1.0, float(worth.max())):
            break
        part = price * curvature[np.ix_(free, free)]
        part[np.diag_indices(len(free))] += 1e-12 * max(float(np.trace(part)), 1e-300) / len(free)
        step = np.zeros_like(x)
        step[free] = -np.linalg.solve(part, slope[free])
        length = 1.0
        while True:
            further = np.clip(x + length * step, low, 0.0)
            found = value(further)
            if found <= now - 1e-4 * float(slope @ (x - further)) or length < 1e-12:
                break
            length /= 2
        if found >= now:
            break
        x, now = further, found
    return x
