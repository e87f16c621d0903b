"""Sizes at which every block keeps a share of its own units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.budgets.solver import Budget
from secateur.families import BlockSizes, Kind, Sizes
from secateur.families.limits import refusals

FIELDS: Mapping[Kind, str] = {"ffn": "ffn", "kv": "kv", "heads": "group"}


def sizes_at_shares(budget: Budget, shares: Mapping[Kind, Sequence[float]]) -> Sizes:
    """Sizes that the layout admits, nearest to a share of the units of every block.

    Args:
        budget: rounds to what is reachable; no block loses its last units.
        shares: of each kind that can be cut, one per block; the native layout, which has one size for all, takes the
            first.
    """
    found = budget.sizes
    for kind, wanted in shares.items():
        if budget.layout == "native":
            options = budget.reachable(kind, budget.sizes)
            target = wanted[0] * budget.sizes.size(kind)
            found = found.resized(kind, min(options, key=lambda n: (abs(n - target), n)))
        else:
            pairs = zip(found.blocks, wanted, strict=True)
            found = replace(found, blocks=tuple(_narrowed(budget, block, kind, share) for block, share in pairs))
    return found


def _narrowed(budget: Budget, block: BlockSizes, kind: Kind, share: float) -> BlockSizes:
    names = (FIELDS[kind], "shared") if kind == "ffn" else (FIELDS[kind],)
    change: dict[str, Any] = {}
    for name in names:
        full = getattr(block, name)
        change[name] = budget.rounded(kind, share * full, full)
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
