"""How many weights every matrix keeps: exact integer totals, within floors and caps.

Every rule comes down to a weight per matrix and one water level (:func:`fill`); rankings of all weights are in
:mod:`secateur.budgets.thresholds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor

from secateur.errors import refuse

Counts = dict[str, int]
Shape = tuple[int, int]


def fill(
    weights: Mapping[str, float], caps: Mapping[str, int], total: int, floors: Mapping[str, int] | None = None
) -> Counts:
    """Counts ``floor + t * weight``, at most their cap, with t such that they sum to ``total`` exactly.

    What a cap takes away goes to the others in proportion to their weights (ECoFLaP's and ERK's rule); the fractions
    are settled by largest remainder, of equal ones the first.

    Args:
        weights: at least 0, by name; those of weight 0 get more only when all others are full.
        caps: the most each can have.
        total: to share out.
        floors: the least each has; 0 where omitted.

    Raises:
        RequestError: the floors are more than the total, or the caps less.
    """
    least = {name: 0 if floors is None else min(floors.get(name, 0), caps[name]) for name in caps}
    if not sum(least.values()) <= total <= sum(caps.values()):
        found = f"floors and sizes admit {sum(least.values()):,} to {sum(caps.values()):,}"
        refuse("out-of-reach", f"{total:,} weights to keep", found, "another ratio, or a lower floor")
    exact = {name: float(value) for name, value in least.items()}
    largest = max(weights.values(), default=0.0)
    weights = {name: weights[name] / largest for name in caps} if largest > 1e-300 else dict(caps)
    free = {name for name in caps if weights[name] > 1e-12}
    while free:
        spare = total - sum(exact[name] for name in caps if name not in free) - sum(least[name] for name in free)
        level = spare / sum(weights[name] for name in free)
        wanted = {name: least[name] + level * weights[name] for name in free}
        over = {name for name in free if wanted[name] > caps[name]}
        exact.update({name: float(caps[name]) for name in over} if over else wanted)
        free = free - over if over else set()
    left = total - round(sum(exact.values()))
    if left > 0:  # everything that has a weight is full
        rest = {name: caps[name] - round(exact[name]) for name in caps}
        more = fill({name: float(size) for name, size in rest.items()}, rest, left)
        exact = {name: exact[name] + more[name] for name in caps}
    return _rounded(exact, caps, total)


def _rounded(exact: Mapping[str, float], caps: Mapping[str, int], total: int) -> Counts:
    """Integers of a given sum next to real numbers."""
    counts = {name: min(floor(value + 1e-9), caps[name]) for name, value in exact.items()}
    missing = total - sum(counts.values())
    room = [name for name in counts if counts[name] < caps[name]]
    for name in sorted(room, key=lambda name: counts[name] - exact[name])[:missing]:
        counts[name] += 1
    return counts


def uniform(shapes: Mapping[str, Shape], total: int) -> Counts:
    """The same share of every matrix."""
    sizes = _sizes(shapes)
    return fill(sizes, sizes, total)


def uniform_plus(shapes: Mapping[str, Shape], total: int, first: Sequence[str], last: Sequence[str]) -> Counts:
    """The first matrices whole, the last ones at least a fifth, the others alike (arXiv:2202.02643's Uniform+).

    Where the first do not fit, they keep what they can of it.
    """
    sizes = _sizes(shapes)
    floors = {name: sizes[name] for name in first} | {name: sizes[name] // 5 for name in last if name not in first}
    most = sum(floors.values())
    if most > total:
        floors = {name: size * total // most for name, size in floors.items()}
    rest = {name: 0 if name in first else sizes[name] for name in shapes}
    spread = {name: max(rest[name] - floors.get(name, 0), 0) for name in shapes}
    return fill(spread, sizes, total, floors)


def erk(shapes: Mapping[str, Shape], total: int) -> Counts:
    """Counts in proportion to inputs plus outputs (Erdos-Renyi, arXiv:1707.04780; for matrices ERK is the same)."""
    return fill({name: float(sum(shape)) for name, shape in shapes.items()}, _sizes(shapes), total)


def mapped(shapes: Mapping[str, Shape], total: int, shares: Mapping[str, float]) -> Counts:
    """A given share of every matrix, in proportion where they do not sum to the total."""
    sizes = _sizes(shapes)
    return fill({name: max(shares[name], 0.0) * sizes[name] for name in shapes}, sizes, total)


def owl_shares(outliers: Sequence[float], keep: float, spread: float) -> list[float]:
    """Share kept of every block from its share of outlying scores: linear, of a given mean (OWL, arXiv:2310.05175).

    Args:
        outliers: of every block, the share of its scores above M times their mean.
        keep: mean share.
        spread: largest deviation from it, lambda.
    """
    low, high = min(outliers), max(outliers)
    if high <= low:
        return [keep] * len(outliers)
    scaled = [(value - low) * 2 * spread / (high - low) for value in outliers]
    mean = sum(scaled) / len(scaled)
    return [min(max(value - mean + keep, 0.0), 1.0) for value in scaled]


def with_floor(
    rank: Callable[[Mapping[str, int], int], Counts], caps: Mapping[str, int], total: int, least: int
) -> Counts:
    """A ranking in which no matrix falls below a floor, what they get coming from the others' ranking.

    (Global magnitude pruning's minimum threshold, arXiv:2209.14624, as water-filling.)

    Args:
        rank: counts of some matrices (by their caps) at a total.
        caps: sizes of the matrices.
        total: weights that stay.
        least: weights every matrix keeps; one with fewer stays whole.
    """
    floors = {name: min(least, size) for name, size in caps.items()}
    if sum(floors.values()) > total:
        found = f"the floors of {len(caps)} matrices alone are {sum(floors.values()):,}"
        refuse("out-of-reach", f"{total:,} weights to keep", found, "lower --set floor")
    settled: Counts = {}
    while True:
        free = {name: size for name, size in caps.items() if name not in settled}
        counts = rank(free, total - sum(settled.values())) if free else {}
        low = [name for name, count in counts.items() if count < floors[name]]
        if not low:
            return {name: settled.get(name, counts.get(name, 0)) for name in caps}
        settled |= {name: floors[name] for name in low}


def by_unit(
    shapes: Mapping[str, Shape],
    units: Sequence[Sequence[str]],
    total: int,
    weights: Sequence[float],
    floors: Sequence[int],
) -> Counts:
    """Counts of units by :func:`fill`, and inside a unit the same share of every matrix.

    Args:
        shapes: of all matrices.
        units: names of those that share a count.
        total: weights that stay.
        weights, floors: of the units.
    """
    caps = {str(unit): size for unit, size in enumerate(unit_sizes(shapes, units))}
    filled = fill(dict(zip(caps, weights, strict=True)), caps, total, dict(zip(caps, floors, strict=True)))
    counts: Counts = {}
    for names, count in zip(units, filled.values(), strict=True):
        counts |= uniform({name: shapes[name] for name in names}, count)
    return counts


def unit_sizes(shapes: Mapping[str, Shape], units: Sequence[Sequence[str]]) -> list[int]:
    """Weights of every unit of matrices."""
    sizes = _sizes(shapes)
    return [sum(sizes[name] for name in names) for names in units]


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    return {name: shape[0] * shape[1] for name, shape in shapes.items()}
