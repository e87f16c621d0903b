"""Find what kept entries are divided by: a grid from coarse to fine, or gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.deltas.learning import learn_q
from secateur.deltas.options import DarexQ, DeltaMethod, Searched
from secateur.deltas.rescale import Rescale
from secateur.deltas.trials import Candidate, Pruner, try_candidates
from secateur.engine.progress import Progress
from secateur.errors import refuse

Curve = list[tuple[float, float]]
Costs = Callable[[Sequence[float]], list[float]]
_LOW = 0.1  # of entries that were not drawn: how much the kept ones may make up for the others
_ETAS = tuple(4.0**power for power in range(-2, 7))


def coarse_to_fine(low: float, high: float, costs: Costs, step: float = 0.1, levels: int = 2) -> tuple[float, Curve]:
    """The point of least cost on a grid whose step shrinks tenfold at every level, around the best so far.

    Args:
        low, high: ends of the interval; ``low`` is always tried.
        costs: of several points.
        levels: grids; the finest has the step ``step / 10 ** (levels - 1)``.

    Returns:
        The point (of equals the first), and everything tried in the order of the points.
    """
    tried: dict[float, float] = {}
    best = low
    for level in range(levels):
        width = step / 10**level
        begin, end = (low, high) if not level else (max(low, best - 10 * width), min(high, best + 10 * width))
        points = [round(begin + width * index, 9) for index in range(math.floor((end - begin) / width + 1e-9) + 1)]
        points = [point for point in dict.fromkeys((*points, high if not level else begin)) if point not in tried]
        tried.update(zip(points, costs(points), strict=True))
        best = min(sorted(tried), key=tried.__getitem__)
    return best, sorted(tried.items())


def found_rescale(
    method: DeltaMethod, pruner: Pruner, ids: Tensor | None, dtype: torch.dtype, device: torch.device, seed: int,
    told: Progress,
) -> tuple[Rescale, dict[str, Any]]:  # fmt: skip
    """The rule for q that a method asks for, and what was tried to find it.

    Args:
        ids: windows to try on, where something has to be tried.
        seed: of the file's masks.
    """
    asked = method.rescale
    if asked == "share":
        return Rescale("share"), {}
    if not isinstance(asked, str):
        return Rescale("fixed", float(asked)), {}
    assert ids is not None
    assert isinstance(method, Searched)
    some = ids[: method.windows]

    def costs(rules: Sequence[Rescale]) -> list[float]:
        candidates = [Candidate(seed + more, rule) for rule in rules for more in range(method.seeds)]
        each = try_candidates(pruner, candidates, some, method.objective, dtype, device, told)
        averaged = [sum(each[i : i + method.seeds]) / method.seeds for i in range(0, len(each), method.seeds)]
        return [cost if math.isfinite(cost) else math.inf for cost in averaged]

    if asked == "learned":
        assert isinstance(method, DarexQ)
        each, curve = learn_q(pruner, some, dtype, device, seed, told)
        return Rescale("learned", each=each), {"curve": curve}
    if asked == "analytic":
        assert isinstance(method, DarexQ)

        def rule(eta: float) -> Rescale:
            return Rescale("analytic", eta, method.gamma, method.guard)

        if method.eta != "search":
            return rule(method.eta), {"eta": method.eta}
        found = costs([rule(eta) for eta in _ETAS])
        best = min(range(len(_ETAS)), key=found.__getitem__)
        return rule(_ETAS[best]), {"eta": _ETAS[best], "curve": list(zip(_ETAS, found, strict=True))}
    low = 1 - pruner.ratio if method.random else _LOW
    best_q, tried = coarse_to_fine(low, 1.0, lambda points: costs([Rescale("fixed", q) for q in points]))
    if not math.isfinite(dict(tried)[best_q]):
        refuse("not-finite", "the search for q", "no candidate gives finite logits", "--dtype float32")
    return Rescale("fixed", best_q), {"curve": tried}
