"""In which order a matrix's inputs stand, so that an N:M pattern loses least (RIA's channel permutation, ICLR 2024).

Weights that matter lie together in few input channels; a group of M that holds several of these has to drop what
another would have kept. Dealing channels out to the groups by importance evens that; an assignment improves on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.cuts.masks import Pattern, best
from secateur.errors import refuse

_ENTRIES = 1 << 24  # of the comparison of channels with groups, at a time


def retained(scores: Tensor, pattern: Pattern) -> float:
    """Sum of the scores of what an N:M pattern keeps of a matrix [out, in] as its columns stand."""
    return float((scores * best(scores, 0, pattern=pattern)).sum(dtype=torch.float64))


def best_order(scores: Tensor, pattern: Pattern, assign: bool = False) -> Tensor:
    """The better of the channels dealt out and the channels as they stand, by what the pattern then keeps.

    Args:
        scores: one per weight, at least 0, [out, in].
        pattern: N:M.
        assign: improve what was dealt by linear assignment, one position of the groups after the other.

    Returns:
        int64, [in]: the channel that comes to each place.
    """
    order = dealt(scores, pattern)
    if assign:
        order = assigned(scores, order, pattern)
    if retained(scores[:, order], pattern) > retained(scores, pattern):
        return order
    return torch.arange(scores.shape[1], device=scores.device)


def dealt(scores: Tensor, pattern: Pattern) -> Tensor:
    """Channels ranked by their summed score, cut into M strips, and one of every strip dealt to each group.

    Every second strip is dealt backwards, so that the best of one meets the worst of the next. Channels that fill no
    group come last: the least important ones.
    """
    size, columns = pattern.of, scores.shape[1]
    ranked = torch.sort(scores.sum(0, dtype=torch.float64), descending=True, stable=True).indices
    whole = columns // size * size
    strips = ranked[:whole].view(size, -1).clone()
    strips[1::2] = strips[1::2].flip(1)
    return torch.cat([strips.T.flatten(), ranked[whole:]])


def assigned(scores: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    """An order in which the pattern keeps at least as much: of one position after the other, who goes to which group.

    With the other channels of a group given, one more adds what it has above the N-th of them, row by row; so what all
    groups keep is a sum over pairs, and the best assignment of a position is exact (Hungarian algorithm).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        refuse("no-scipy", "an assignment of channels", "scipy is not installed", "pip install 'secateur[solvers]'")
    size = pattern.of
    whole = scores.shape[1] // size * size
    groups = order[:whole].view(-1, size).clone()
    for position in range(size if len(groups) > 1 else 0):
        others = torch.cat([groups[:, :position], groups[:, position + 1 :]], 1)
        total = scores.new_zeros(len(groups), len(groups), dtype=torch.float64)
        for rows in torch.split(scores, max(1, _ENTRIES // len(groups) ** 2)):
            least = rows[:, others].kthvalue(size - pattern.kept, dim=-1).values  # the N-th largest of M - 1
            gains = (rows[:, None, groups[:, position]] - least[:, :, None]).clamp(min=0)
            total += gains.sum(0, dtype=torch.float64)
        _, chosen = linear_sum_assignment(total.cpu().numpy(), maximize=True)
        groups[:, position] = groups[torch.from_numpy(chosen).to(groups.device), position]
    return torch.cat([groups.flatten(), order[whole:]])
