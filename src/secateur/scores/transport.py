"""Entropic optimal transport from all neurons to some of them (DOTResize, arXiv:2507.04517v2, as its spec knows it)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.errors import refuse

Cost = Literal["l1", "squared"]
_TOO_FLAT = 1e-8  # singular values below this share of the largest span nothing
_DUPLICATE = 1e-9  # of the mean cost


def targets(samples: Tensor, cost: Tensor, count: int) -> Tensor:
    """The neurons that stay: those of largest mean magnitude, ascending, exact duplicates of one chosen last.

    Args:
        samples: signals, [rows, n].
        cost: distance of every pair, [n, n]; two copies of a neuron would leave another one without a target.
        count: how many.
    """
    size = samples.double().abs().mean(0)
    order = torch.sort(size, descending=True, stable=True).indices.tolist()
    limit = _DUPLICATE * float(cost.mean())
    first: list[int] = []
    copies: list[int] = []
    twins = (cost <= limit).cpu()
    taken = torch.zeros(len(cost), dtype=torch.bool)
    for neuron in order:
        (copies if (twins[neuron] & taken).any() else first).append(neuron)
        taken[neuron] = not copies or copies[-1] != neuron
    return torch.tensor([*first, *copies][:count]).sort().values


def pair_costs(samples: Tensor, gram: Tensor, cost: Cost, normalise: bool, signed: bool) -> tuple[Tensor, Tensor]:
    """Distance of every pair of neurons over their signals, and the sign with which they are nearest.

    ``l1`` sums |z_i - z_j| over sampled tokens. ``squared`` is |z_i|^2 + |z_j|^2 - 2 G_ij over all tokens, free once
    the Gram is known.

    Args:
        samples: Z, [rows, n].
        gram: G = Z^T Z, [n, n] float64.
        cost: which of them.
        normalise: divide every neuron by its norm first: the same shape is near, not the same value.
        signed: also compare with -z_j (ours).

    Returns:
        Both [n, n] float64; signs are 1 unless ``signed``.
    """
    if cost == "squared":
        energy = gram.diagonal().clamp(min=1e-300)
        product = gram / torch.outer(energy.sqrt(), energy.sqrt()) if normalise else gram
        energy = torch.ones_like(energy) if normalise else energy
        both = energy[:, None] + energy
        signs = torch.where(product < 0, -1.0, 1.0) if signed else torch.ones_like(product)
        return (both - 2 * signs * product).clamp(min=0), signs.to(gram)
    rows = samples.double().t().contiguous()
    if normalise:
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-150)
    near = torch.cdist(rows, rows, p=1)
    if not signed:
        return near, torch.ones_like(near)
    far = torch.cdist(rows, -rows, p=1)
    return torch.minimum(near, far), torch.where(far < near, -1.0, 1.0).to(near)


def transport(cost: Tensor, strength: float, iterations: int = 500, tolerance: float = 1e-9) -> Tensor:
    """The plan T that minimises <T, C> - lambda H(T) with uniform marginals, [n, k], by Sinkhorn in the log domain.

    The cost counts relative to its mean, without which lambda would mean nothing. A small lambda is approached by
    halving a larger one, each solution starting the next (epsilon scaling).

    Args:
        cost: C, [n, k].
        strength: lambda.
        iterations: most of each lambda.
        tolerance: of the marginals, times their number.

    Raises:
        RequestError: POT is not installed.
    """
    try:
        from ot.bregman import sinkhorn_log
    except ImportError:
        refuse("no-extra", "optimal transport", "the package POT is not installed", "pip install 'secateur[ot]'")
    n, k = cost.shape
    a, b = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((k,), 1 / k, dtype=torch.float64)
    relative = (cost / cost.mean().clamp(min=1e-300)).double().cpu()
    settings = {"stopThr": tolerance / k, "warn": False, "log": True}
    steps = [strength]
    while steps[0] < 1:
        steps.insert(0, 2 * steps[0])
    start = None
    for value in steps:
        most = iterations if value == strength else max(10, iterations // 10)
        plan, log = sinkhorn_log(a, b, relative, value, numItermax=most, warmstart=start, **settings)
        start = (log["log_u"], log["log_v"])
    return plan  # type: ignore[no-any-return]


def directions_of(merge: Tensor, kept: Tensor) -> Tensor:
    """Orthonormal directions that span the columns of a merge map, [n, k], so that its projector commutes with a norm.

    Q of M = Q R; R cancels against the pseudo-inverse that undoes the merge, so only the span matters (derived). Where
    the columns span less than k directions, units of the kept neurons make up for those that are missing.

    Args:
        merge: M, [n, k].
        kept: the k neurons.
    """
    triangle = torch.linalg.qr(merge)
    values = torch.linalg.svdvals(triangle.R)
    if values[-1] > _TOO_FLAT * values[0]:
        found: Tensor = triangle.Q
        return found
    left, values, _ = torch.linalg.svd(merge, full_matrices=False)
    spanned = left[:, values > _TOO_FLAT * values[0]]
    units = torch.eye(len(merge), dtype=merge.dtype)[:, kept]
    rest = torch.linalg.svd(units - spanned @ (spanned.t() @ units), full_matrices=False).U
    return torch.cat([spanned, rest[:, : merge.shape[1] - spanned.shape[1]]], dim=1)
