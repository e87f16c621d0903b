"""Scores of the dimensions inside attention heads, from second moments of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def output_moments(weight: Tensor, bias: Tensor | None, gram: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """E[y y^T], [out, out], of y = W x + b, from G = sum of x x^T, the sum of x and their count."""
    wide = weight.to(gram)
    tokens = count.clamp(min=1)
    second: Tensor = wide @ (gram / tokens) @ wide.t()
    if bias is None:
        return second
    shift, mean = bias.to(gram), wide @ (first / tokens)
    cross = torch.outer(mean, shift)
    return second + cross + cross.t() + torch.outer(shift, shift)


def pair_scores(queries: Tensor, keys: Tensor, partners: Sequence[int]) -> Tensor:
    """How much each dimension adds to the products of queries and keys, the same for both of a rotated pair.

    sum over the query heads of a group of E[q_i^2] E[k_i^2], which are the squared column norms of the roots of both
    correlations (MoDeGPT, arXiv:2408.09632, alg. 2); of a pair, of E[q_i^2 + q_j^2] E[k_i^2 + k_j^2], which no rotation
    changes.

    Args:
        queries: E[q^2], [groups, query heads, head].
        keys: E[k^2], [groups, head].
        partners: for every dimension the one it is rotated with, or itself.

    Returns:
        [groups, head].
    """
    other = torch.tensor(partners)
    paired = (other != torch.arange(len(other))).to(queries)
    q, k = queries + queries[..., other] * paired, keys + keys[..., other] * paired
    return (q * k[:, None]).sum(1)


def best_pairs(scores: Tensor, partners: Sequence[int], count: int) -> Tensor:
    """Dimensions of one head that stay, ascending: rotated pairs stay together, the others are paired by their scores.

    Args:
        scores: [head], equal within a rotated pair.
        partners: as for ``pair_scores``.
        count: even where any are rotated.
    """
    alone = [i for i, other in enumerate(partners) if i == other]
    ranked = sorted(alone, key=lambda i: (-float(scores[i]), i))
    if len(alone) == len(partners):
        return torch.tensor(sorted(ranked[:count]))
    pairs = [(i, other) for i, other in enumerate(partners) if i < other]
    pairs += list(zip(ranked[::2], ranked[1::2], strict=False))
    # what a rotated pair adds is its common score, what two others add is the sum of theirs
    pairs.sort(key=lambda p: (-float(scores[p[0]] if partners[p[0]] == p[1] else scores[p[0]] + scores[p[1]]), p))
    return torch.tensor(sorted(i for pair in pairs[: count // 2] for i in pair))
