"""From how redundant each layer is to how much of it goes (Dynamic Slicing, arXiv:2411.03513, and its corrections)."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

_STEPS = 200


def redundancy(influence: Sequence[float]) -> list[float]:
    """Layer redundancy in [0, 1]: 1 of the layer that changes its input least, 0 of the one that does most.

    The released script prints the raw sums of 1 - cos and leaves this to its user; fed as they are, they would cut most
    where the network works most.

    Args:
        influence: how much each layer changes its input, the mean of 1 - cos.
    """
    least, most = min(influence), max(influence)
    if most - least <= 1e-12 * abs(most):
        return [0.0] * len(influence)
    return [(most - value) / (most - least) for value in influence]


def slices(redundant: Sequence[float], mean: float, base: float, most: float = 1.0) -> list[float]:
    """Share of the width that each layer loses: clip(base + t v) with t such that their mean is as asked.

    Without clipping that is base + v (mean - base) / mean(v), the paper's form, whose shares may exceed 1.

    Args:
        redundant: v, one number in [0, 1] per layer.
        mean: of the shares, at most ``most``.
        base: what every layer loses; more where the layers that v names cannot carry the rest.
        most: what none exceeds.
    """
    base, count = min(base, mean), len(redundant)

    def at(start: float, slope: float) -> list[float]:
        return [min(most, start + slope * value) for value in redundant]

    weight = fsum(redundant) / count
    if weight <= 0 or mean <= base:
        return [mean] * count
    plain = at(base, (mean - base) / weight)
    if max(base + (mean - base) / weight * value for value in redundant) <= most:
        return plain
    full = [most if value > 0 else base for value in redundant]
    if fsum(full) < mean * count:  # those with v = 0 have to give too
        others = sum(value <= 0 for value in redundant)
        rest = (mean * count - most * (count - others)) / others
        return [most if value > 0 else rest for value in redundant]
    low, high = 0.0, 1.0
    while fsum(at(base, high)) < mean * count and high < 1e300:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fsum(at(base, middle)) < mean * count else (low, middle)
    return at(base, high)
