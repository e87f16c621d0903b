"""Layer maps: from one score per layer to one share per layer, with a given mean and within bounds.

A share is what is removed, or kept, of a layer's units: the maps do not care. All are monotone in the mean, so that a
budget can be solved along them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(weights: Tensor, mean: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Shares ``low + t * weights``, capped at ``high``, with t such that their mean is ``mean``.

    What the cap takes is redistributed in proportion to the weights.

    Args:
        weights: one per layer, at least 0.
        mean: between ``low`` and ``high``; where weights of 0 put it out of reach, the other layers are at ``high``.
    """
    wide = weights.double() / max(float(weights.max()), 5e-324)
    capped = torch.zeros(len(wide), dtype=torch.bool)
    while True:
        free = wide.masked_fill(capped, 0.0)
        spare = len(wide) * (mean - low) - int(capped.sum()) * (high - low)
        shares = low + free * (max(spare, 0.0) / max(float(free.sum()), 1e-300))
        over = ~capped & (shares > high)
        if not bool(over.any()):
            return shares.masked_fill(capped, high)
        capped |= over


def shrunk(weights: Tensor, mean: float, high: float = 1.0) -> Tensor:
    """Shares proportional to positive weights; where one would exceed ``high``, deviations from the mean shrink."""
    relative = weights.double() / weights.double().mean() - 1
    largest = mean * float(relative.max())
    room = max(high - mean, 0.0)
    return mean * (1 + relative * (room / largest if largest > room else 1.0))


def softmax_map(scores: Tensor, temperature: float, mean: float, high: float = 1.0) -> Tensor:
    """Shares removed that grow as ``exp(-score / temperature)`` (MoDeGPT, arXiv:2408.09632, eq. 10-11).

    The minimiser of sum(score * share) - temperature * entropy(share) at the given mean; infinity is uniform.
    """
    return scaled(torch.softmax(-scores.double() / temperature, 0), mean, 0.0, high)


def sigmoid_map(scores: Tensor, slope: float, mean: float, high: float = 1.0) -> Tensor:
    """Shares kept that grow with ``sigmoid(slope * (score - mean score))`` (CFSP, arXiv:2409.13199)."""
    wide = scores.double()
    return shrunk(torch.sigmoid(slope * (wide - wide.mean())), mean, high)
