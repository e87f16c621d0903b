"""Choose one point of every curve under a budget: the multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from secateur.errors import refuse


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, bins: int) -> list[int]:
    """The point of every curve at which the losses sum to the least while the costs sum to at most the budget.

    Costs are rounded up to whole bins, so the solution is always within the budget; with as many bins as the budget it
    is exact (rate-distortion allocation, arXiv:2308.10438, alg. 1).

    Args:
        costs: of the points of each curve.
        losses: of the same points.
        budget: the most the costs may sum to.
        bins: steps into which the budget is divided; at most as many as it is.

    Returns:
        Index of a point, for each curve.

    Raises:
        RequestError: the cheapest points together cost more than the budget.
    """
    bins = max(1, min(bins, budget))
    width = budget / bins
    steps = [[ceil(cost / width - 1e-9) for cost in each] for each in costs]
    best = np.zeros(bins + 1)
    taken = []
    for each, loss in zip(steps, losses, strict=True):
        options = np.full((len(each), bins + 1), np.inf)
        for point, (step, value) in enumerate(zip(each, loss, strict=True)):
            if step <= bins:
                options[point, step:] = best[: bins + 1 - step] + value
        taken.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best[bins]):
        least = sum(min(each) for each in costs)
        refuse("out-of-reach", f"a budget of {budget:,}", f"the least of all curves together is {least:,}")
    left, points = bins, []
    for each, row in zip(reversed(steps), reversed(taken), strict=True):
        points.append(int(row[left]))
        left -= each[points[-1]]
    return points[::-1]
