"""How alike the experts of a block are, and which of them are joined (STUN, arXiv:2409.06211)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**16  # weights of each expert multiplied at a time


def router_distances(rows: Tensor) -> Tensor:
    """Distances [E, E] of the router's rows [E, width], float64, over their mean: so blocks compare."""
    rows = rows.double()
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / _mean_of_pairs(distances)


def coactivation_distances(together: Tensor, alike: bool = True) -> Tensor:
    """Distances [E, E] from how many tokens visit both experts, over the mean of all pairs.

    Args:
        together: [E, E] counts.
        alike: whether experts that are often visited together are near (the distance is negative), or far.
    """
    counts = together.double().clone().fill_diagonal_(0)
    return counts / _mean_of_pairs(counts) * (-1 if alike else 1)


def lesser_shares(mass: Tensor) -> Tensor:
    """Of every two experts [E, E], the smaller share of the weight [E] that the router gives."""
    shares = mass.double() / mass.double().sum().clamp(min=1e-300)
    return torch.minimum(shares[:, None], shares[None])


def _mean_of_pairs(values: Tensor) -> Tensor:
    """Mean of what stands beside a diagonal of zeros; never zero."""
    count = len(values)
    return (values.sum() / max(1, count * (count - 1))).clamp(min=1e-300)


@dataclass(frozen=True)
class Join:
    """Two clusters become one.

    Attributes:
        height: the largest distance of two members of the new cluster.
        first, second: the smallest member of each, the smaller before the larger.
    """

    height: float
    first: int
    second: int


def complete_linkage(distances: Tensor) -> list[Join]:
    """All joins [E - 1] that make one cluster of E experts, always of the two whose farthest members are nearest.

    Heights never fall, so the clusters at a threshold are those after all joins below it, and every pair of members is
    nearer than that. Ties go to the lower numbers.
    """
    linked = distances.double().clone()
    linked.fill_diagonal_(torch.inf)
    joins = []
    for _ in range(len(linked) - 1):
        first, second = divmod(int(linked.argmin()), len(linked))
        first, second = min(first, second), max(first, second)
        joins.append(Join(float(linked[first, second]), first, second))
        linked[first] = linked[:, first] = torch.maximum(linked[first], linked[second])
        linked[second] = linked[:, second] = linked[first, first] = torch.inf
    return joins


def clusters_after(joins: Sequence[Join], experts: int) -> list[list[int]]:
    """The clusters that some joins leave, each ascending, in the order of their smallest members."""
    clusters = {expert: [expert] for expert in range(experts)}
    for join in joins:
        clusters[join.first] = sorted(clusters[join.first] + clusters.pop(join.second))
    return [clusters[smallest] for smallest in sorted(clusters)]


def gram_of_rows(rows: Sequence[Tensor]) -> Tensor:
    """Products [E, E] of the rows of matrices [E, n] that lie side by side, float64."""
    gram = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for matrix in rows:
        for start in range(0, matrix.shape[1], _CHUNK):
            wide = matrix[:, start : start + _CHUNK].double().cpu()
            gram += wide @ wide.t()
    return gram


def nearest_to_mean(gram: Tensor, cluster: Sequence[int]) -> int:
    """The member whose weights are nearest to the cluster's mean, from the products [E, E] of all experts' weights."""
    within = gram[list(cluster)][:, list(cluster)]
    return cluster[int((within.diagonal() - 2 * within.mean(1)).argmin())]
