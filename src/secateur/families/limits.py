"""What each layout admits: which kinds of units can go, and which sizes the stock class takes."""

from __future__ import annotations

import math
from typing import Literal

from secateur.families.architecture import Architecture
from secateur.families.roles import BEHIND_A_WRITER, OVER_ALL_HEADS
from secateur.families.schema import holds
from secateur.families.sizes import Kind, Sizes

Layout = Literal["native", "per-layer"]
LAYOUTS: tuple[Layout, ...] = ("native", "per-layer")


def refusals(architecture: Architecture, kind: Kind, layout: Layout = "native") -> list[str]:
    """Why a layout cannot change ``kind`` at all (empty: it can)."""
    family, sizes = architecture.family, architecture.sizes
    reasons = [
        rule.why
        for rule in family.fixed
        if rule.size == kind
        and holds(rule.when, architecture.config)
        and not (rule.per_layer_only if layout == "native" else rule.native_only)
    ]
    attention = kind in ("kv", "heads")
    if (attention or kind == "residual") and layout == "native" and "head" not in family.sizes:
        consequence = (
            "removing heads would resize the rest" if attention else "a narrower stream would shrink every head"
        )
        reasons.append(
            f"{family.model_type} has no head size of its own: it is the stream's width divided by the number of "
            f"heads, so {consequence}"
        )
    roles = architecture.roles
    if attention and roles.intersection(OVER_ALL_HEADS):
        reasons.append("queries and keys are normalised over all heads together, so without some the others change")
    if attention and "out" not in roles:
        reasons.append("its heads share low-rank queries, keys and values")
    if kind == "heads" and not reasons and any(block.kv > 1 for block in sizes.blocks):
        reasons.append(
            f"there are {sizes.size('kv')} key/value heads: query heads are a space of their own where one serves all "
            "of them; choose kv"
        )
    if kind == "kv" and not reasons and all(block.kv == 1 for block in sizes.blocks):
        reasons.append("one key/value head serves all query heads and stays; choose heads")
    if kind == "residual" and sizes.shortcuts:
        reasons.append("its stream changes bases already; cut the model it was made from instead")
    if kind == "residual" and roles.intersection(BEHIND_A_WRITER):
        reasons.append(
            "a norm stands between what writes the stream and the stream, and no map of the stream commutes with it"
        )
    if attention or kind == "residual":
        unknown = [name for name in architecture.unmapped if kind == "residual" or family.blocks in name]
        if unknown:
            reasons.append(f"the family file does not describe {', '.join(sorted(unknown)[:3])}")
    return reasons


def problems(architecture: Architecture, sizes: Sizes, itemsize: int, layout: Layout = "native") -> list[str]:
    """Why a layout does not admit ``sizes`` (empty: it does).

    Args:
        architecture: the present one.
        itemsize: bytes of a weight, for row alignment.
    """
    found = []
    kinds: tuple[Kind, ...] = ("residual", "ffn", "kv", "heads", "blocks")
    for kind in kinds:
        if layout == "native" and sizes.uniform(kind) is None:
            found.append(f"the native layout wants one {kind} size for all blocks")
        elif sizes.size(kind) != architecture.sizes.size(kind) or sizes.uniform(kind) is None:
            found += refusals(architecture, kind, layout)
    if layout == "native" and sizes.shortcuts:
        found.append("the native layout has no place for shortcuts")
    if sizes == architecture.sizes:
        return found
    for rule in architecture.family.constraints:
        if rule.multiple_of and layout == "native":
            block = sizes.blocks[0]
            found += _not_multiple(rule.size, sizes, block.kv * block.group, rule.why)
        elif rule.multiple_of_bytes:
            found += _not_multiple(rule.size, sizes, -(-rule.multiple_of_bytes // itemsize), rule.why)
    return found


def grain(architecture: Architecture, kind: Kind, itemsize: int) -> int:
    """What sizes of ``kind`` must be multiples of in every layout."""
    bytes_of = [rule.multiple_of_bytes or 1 for rule in architecture.family.constraints if rule.size == kind]
    return math.lcm(*(-(-count // itemsize) for count in bytes_of))


def _not_multiple(kind: Kind, sizes: Sizes, divisor: int, why: str) -> list[str]:
    widths = {sizes.residual} if kind == "residual" else {block.ffn for block in sizes.blocks if block.experts}
    wrong = sorted(width for width in widths if width % divisor)
    return [f"{kind} {wrong[0]} is not a multiple of {divisor}: {why}"] if wrong else []


def verdict(architecture: Architecture, kind: Kind, layout: Layout) -> tuple[str, str]:
    """What a layout makes of a cut of ``kind`` (exact, exact with 1 extra dimension, refused), and why."""
    reasons = refusals(architecture, kind, layout)
    if reasons:
        return "refused", "; ".join(reasons)
    concerns = "heads" if kind == "kv" else kind
    limits = [
        rule.why
        for rule in architecture.family.constraints
        if concerns in (rule.size, rule.multiple_of) and (layout == "native" or rule.multiple_of is None)
    ]
    spare = kind == "residual" and architecture.sizes.mean_free
    return "exact with 1 extra dimension" if spare else "exact", "; ".join(limits)
