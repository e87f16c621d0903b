"""Sizes at which every block keeps a share of its own units, or of the dimensions of its heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.budgets.solver import Budget
from secateur.errors import RequestError, refuse
from secateur.families import BlockSizes, Kind, Sizes
from secateur.families.limits import refusals
from secateur.families.sizes import FIELD_OF


def sizes_at_shares(budget: Budget, shares: Mapping[Kind, Sequence[float]], base: Sizes | None = None) -> Sizes:
    """Sizes that the layout admits, nearest to a share of the units of every block.

    Args:
        budget: rounds to what is reachable; no block loses its last units.
        shares: of each kind that can be cut, one per block; the native layout, which has one size for all, takes the
            first.
        base: sizes to start from.
    """
    found = base or budget.sizes
    for kind, wanted in shares.items():
        if budget.layout == "native":
            options = budget.reachable(kind, found)
            target = wanted[0] * found.size(kind)
            found = found.resized(kind, min(options, key=lambda n: (abs(n - target), n)))
        else:
            pairs = zip(found.blocks, wanted, strict=True)
            found = replace(found, blocks=tuple(_narrowed(budget, block, kind, share) for block, share in pairs))
    return found


def _narrowed(budget: Budget, block: BlockSizes, kind: Kind, share: float, exact: bool = False) -> BlockSizes:
    names = (FIELD_OF[kind], "shared") if kind == "ffn" else (FIELD_OF[kind],)
    change: dict[str, Any] = {}
    for name in names:
        full = getattr(block, name)
        change[name] = max(1, int(share * full)) if exact and full else budget.rounded(kind, share * full, full)
    return replace(block, **change)


def with_ffn_of(attention: Sizes, ffn: Sizes) -> Sizes:
    """The heads of one and the neurons of the other."""
    pairs = zip(attention.blocks, ffn.blocks, strict=True)
    blocks = tuple(replace(heads, ffn=neurons.ffn, shared=neurons.shared) for heads, neurons in pairs)
    return replace(attention, blocks=blocks)


def cuttable(budget: Budget, wanted: Sequence[Kind]) -> list[Kind]:
    """Those of some kinds that the layout can cut; refused as the first is where it can cut none."""
    found = [kind for kind in wanted if not refusals(budget.architecture, kind, budget.layout)]
    if not found:
        budget.reachable(wanted[0], budget.sizes)
    return found


def narrowed(
    budget: Budget, shares: Sequence[float], parts: Collection[str], base: Sizes | None = None, exact: bool = False
) -> Sizes:
    """Sizes at which every block keeps its share of each part.

    Args:
        budget: knows what can be reached.
        shares: from 0 to 1, one per block.
        parts: kinds of units, and ``qk`` (in pairs) or ``value`` for dimensions of every head.
        base: sizes to start from.
        exact: of the FFN round down to a neuron instead of to the nearest step of the budget, as papers do.
    """
    heads: dict[Kind, Sequence[float]] = {kind: shares for kind in ("kv", "heads") if kind in parts}
    sizes = sizes_at_shares(budget, heads, base)
    head = sizes.head

    def block(present: BlockSizes, share: float) -> BlockSizes:
        change: dict[str, Any] = {}
        if "qk" in parts:
            change["qk"] = max(2, 2 * round(share * head / 2)) % head
        if "value" in parts:
            change["value"] = max(1, round(share * head)) % head
        return replace(_narrowed(budget, present, "ffn", share, exact) if "ffn" in parts else present, **change)

    pairs = zip(sizes.blocks, shares, strict=True)
    sizes = replace(sizes, blocks=tuple(block(present, share) for present, share in pairs))
    if exact and (reasons := budget.problems(sizes)):
        refuse("out-of-reach", "these shares of " + ", ".join(parts), "; ".join(reasons))
    return sizes


def why_not(budget: Budget, part: str) -> list[str]:
    """Why the dimensions of heads, ``qk`` or ``value``, cannot be narrowed (empty: they can)."""
    if budget.sizes.head <= 2:
        return [f"its heads have {budget.sizes.head} dimensions"]
    change: dict[str, Any] = {part: 2}
    blocks = tuple(replace(block, **change) for block in budget.sizes.blocks)
    return budget.problems(replace(budget.sizes, blocks=blocks))


def solve_shares(
    budget: Budget, shares_at: Callable[[float], Sequence[float]], parts: Collection[str], base: Sizes | None = None
) -> Sizes:
    """The sizes on a path of shares nearest to the target; the FFN makes up for the coarser steps of the heads.

    Args:
        budget: the request; in the native layout the FFN takes the sizes that its stock class admits.
        shares_at: what every block keeps at a point from 0 to 1, growing.
        parts: what is narrowed, see ``narrowed``.
        base: sizes to start from.

    Raises:
        RequestError: as ``Budget.solve``.
    """
    what = " and ".join(parts)

    def of_ffn(start: Sizes | None) -> Sizes:
        if budget.layout == "native":
            return budget.solve("ffn", start)
        return budget.solve_along(lambda t: narrowed(budget, shares_at(t), ("ffn",), start), what)

    if "ffn" not in parts:
        return budget.solve_along(lambda t: narrowed(budget, shares_at(t), parts, base), what)
    if len(parts) == 1:
        return of_ffn(base)
    loose = replace(budget, tolerance=None)
    found = loose.solve_along(lambda t: narrowed(budget, shares_at(t), parts, base), what)
    whole = with_ffn_of(found, base or budget.sizes)
    try:
        return of_ffn(whole)
    except RequestError:
        if budget.tolerance is not None:
            raise
        budget.gap = loose.gap
        return found
