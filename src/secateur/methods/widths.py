"""Widths of the stream that differ from norm to norm: from shares that go to sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from secateur.budgets import Budget
from secateur.cuts.stream import interfaces, sliced
from secateur.families import Layout, Sizes
from secateur.families.limits import problems, refusals

_ROUNDING = 8  # the published code floors the width to a multiple of it
_PER_LAYER: Final[Layout] = "per-layer"


def floored(width: float) -> int:
    """A width down to a multiple of eight, as in the published code; of less than that, itself."""
    return int(width) // _ROUNDING * _ROUNDING or max(1, int(width))


def at_shares(budget: Budget, base: Sizes, shares: Sequence[float], head: float, published: bool) -> Sizes:
    """Sizes at which the norms of each layer lose its share of the width.

    Args:
        base: all other sizes.
        shares: one per block.
        head: share that the head does not read.
        published: round as the published code does, or to what the target's quantum admits.
    """
    full, found = budget.sizes.residual, {}
    for name in interfaces(budget.architecture):
        place = name.split(".")[1]
        wanted = (1 - (shares[int(place)] if place.isdigit() else head)) * full
        width = floored(wanted) if published else budget.rounded("residual", wanted, full)
        found[name] = width - base.mean_free
    return sliced(budget.architecture, base, found)


def uneven_problems(budget: Budget, base: Sizes) -> list[str]:
    """Why the norms of a model cannot each read the stream at a width of their own."""
    if reasons := refusals(budget.architecture, "residual", _PER_LAYER):
        return reasons
    full = budget.sizes.residual - base.mean_free
    uneven = {name: full - index % 2 for index, name in enumerate(interfaces(budget.architecture))}
    return problems(budget.architecture, sliced(budget.architecture, base, uneven), budget.itemsize, _PER_LAYER)
