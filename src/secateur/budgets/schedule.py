"""From how redundant each layer is to how much of it goes (Dynamic Slicing, arXiv:2411.03513, and its corrections)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.budgets.layer_maps import scaled


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
    base, weights = min(base, mean), torch.tensor(redundant, dtype=torch.float64)
    idle = weights <= 1e-12 * weights.max()
    shares = scaled(weights.masked_fill(idle, 0.0), mean, base, most)
    if bool(idle.any()):  # those with v = 0 give too, where the others cannot carry all
        shares[idle] = (mean * len(weights) - float(shares[~idle].sum())) / int(idle.sum())
    return [float(share) for share in shares]
