"""How scores are distributed: histograms and quantiles of bounded size, for the eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def relative(scores: Tensor) -> Tensor:
    """Scores of one space [n] in units of their mean size, so that spaces compare."""
    return scores.double() / scores.double().abs().mean().clamp(min=1e-300)


def histogram(values: Tensor, kept: Tensor, bins: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Units per bin; the first and the last hold what lies beyond the 1st (or zero) and the 99th percentile.

    Args:
        values: [n].
        kept: [n] boolean.

    Returns:
        Middles of the bins, kept units and removed units of each, all [bins].
    """
    ordered = values.sort().values
    low, high = (float(ordered[int(share * (len(values) - 1))]) for share in (0.01, 0.99))
    low = min(low, 0.0)
    width = (high - low) / bins or 1.0
    index = ((values - low) / width).long().clamp(0, bins - 1)
    counts = [torch.bincount(index[chosen], minlength=bins) for chosen in (kept, ~kept)]
    return low + (torch.arange(bins) + 0.5) * width, counts[0], counts[1]


def quantiles(spaces: Sequence[Tensor]) -> Tensor:
    """The 10 %, 50 % and 90 % quantiles of every space's scores, [spaces, 3]."""
    at = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return torch.stack([scores.double().quantile(at) for scores in spaces])
