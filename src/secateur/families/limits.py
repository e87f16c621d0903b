"""What each layout admits: which kinds of units can go, and which sizes the stock class takes."""

from __future__ import annotations

import math
from typing import Final, Literal

from secateur.families.architecture import Architecture
from secateur.families.branches import BRANCHES, without_problems
from secateur.families.roles import BEHIND_A_WRITER, BIASES, IN_THE_STREAM, NORMS_OF_HEADS, OVER_ALL_HEADS, WHOLE
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
    if kind == "experts" and not sizes.size(kind):
        reasons.append("its FFN has no experts")
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
    if kind == "kv" and not reasons and all(block.kv <= 1 for block in sizes.blocks):
        reasons.append("one key/value head serves all query heads and stays; choose heads")
    if any(whole == ("head" if attention else kind) and _places(sizes, field) for field, whole in WHOLE.items()):
        reasons.append("a part of it is narrowed already; cut the model it was made from instead")
    if kind == "residual" and sizes.shortcuts:
        reasons.append("its stream changes bases already; cut the model it was made from instead")
    if kind == "residual" and roles.intersection(IN_THE_STREAM):
        reasons.append(
            "its norms stand in the stream, behind what each branch adds, and no map of the stream commutes with them"
        )
    elif kind == "residual" and roles.intersection(BEHIND_A_WRITER):
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
    kinds: tuple[Kind, ...] = ("residual", "ffn", "experts", "kv", "heads", "blocks")
    for kind in kinds:
        if kind == "experts" and not sizes.size(kind):
            continue  # no block with experts is left
        if layout == "native" and sizes.uniform(kind) is None:
            found.append(f"the native layout wants one {kind} size for all blocks")
        elif sizes.size(kind) != architecture.sizes.size(kind) or sizes.uniform(kind) is None:
            found += refusals(architecture, kind, layout)
    found += _no_place_in_native(sizes) if layout == "native" else _wrong_beside_stock(architecture, sizes)
    if sizes == architecture.sizes:
        return found
    fewest = min((block.experts for block in sizes.blocks if block.experts), default=sizes.active_experts)
    if fewest < sizes.active_experts:
        found.append(f"{fewest} experts are fewer than the {sizes.active_experts} that every token visits")
    for rule in architecture.family.constraints:
        if rule.multiple_of and layout == "native":
            heads = max([1, *(block.kv * block.group for block in sizes.blocks)])
            found += _not_multiple(rule.size, sizes, heads, rule.why)
        elif rule.multiple_of_bytes:
            found += _not_multiple(rule.size, sizes, -(-rule.multiple_of_bytes // itemsize), rule.why)
    return found


_WORDS: Final = {
    "qk": "heads with narrower queries and keys",
    "value": "heads with narrower values",
    **dict.fromkeys(("attention_read", "ffn_read", "stem_read"), "matrices that read a part of the stream"),
    **dict.fromkeys(("attention_write", "ffn_write", "stem_write"), "matrices that write a part of the stream"),
    **dict.fromkeys(BIASES.values(), "a bias that the stock class does not have"),
}
"""What each of the sizes that only the per-layer layout knows is for."""


def _places(sizes: Sizes, field: str) -> list[int | None]:
    """Places where such a size is set; None is the stem."""
    places: list[int | None] = [None] if hasattr(sizes, field) else list(range(len(sizes.blocks)))
    if field in WHOLE:
        return [place for place in places if sizes.narrowed(field, place)]
    return [place for place in places if place is not None and getattr(sizes.blocks[place], field)]


def _gone(sizes: Sizes) -> list[tuple[int, str]]:
    """Blocks without a branch, and which."""
    return [(i, branch) for i, block in enumerate(sizes.blocks) for branch in BRANCHES if not block.has(branch)]


def _no_place_in_native(sizes: Sizes) -> list[str]:
    words = {word for field, word in _WORDS.items() if _places(sizes, field)}
    words |= {f"blocks without their {'FFN' if branch == 'ffn' else branch}" for _, branch in _gone(sizes)}
    words |= {"shortcuts"} if sizes.shortcuts else set()
    return [f"the native layout has no place for {word}" for word in sorted(words)]


def _size(sizes: Sizes, field: str, place: int | None) -> int:
    return int(getattr(sizes if place is None else sizes.blocks[place], field))


def _cannot_be_narrowed(architecture: Architecture, sizes: Sizes, field: str) -> str:
    """Why no block can have such a size; empty where it can."""
    roles = architecture.roles
    if field in ("qk", "value"):
        if "q" not in roles:
            return "its heads share low-rank queries, keys and values"
        if any(packed.turn and packed.canonical[0].endswith(".q.weight") for packed in architecture.packed.values()):
            return "queries, keys and values take turns in one matrix"
    if field == "qk" and roles.intersection(NORMS_OF_HEADS):
        return "queries and keys are normalised, and the divisor sums over all dimensions of a head"
    if field == "out_bias" and "out" not in roles:
        return "its attention is written by a matrix of low rank"
    if field in ("stem_read", "stem_write") and sizes.tied:
        return "its embedding and its head are one table"
    return ""


def _wrong_beside_stock(architecture: Architecture, sizes: Sizes) -> list[str]:
    """What the per-layer layout cannot lay over the stock class."""
    found, present = [], architecture.sizes
    same_blocks = len(present.blocks) == len(sizes.blocks)
    for field in _WORDS:
        places = _places(sizes, field)
        old = _places(present, field)
        if same_blocks and places == old and all(_size(sizes, field, p) == _size(present, field, p) for p in places):
            continue
        reason = _cannot_be_narrowed(architecture, sizes, field) if places else ""
        if not reason and old and field in WHOLE and same_blocks:
            reason = "it is narrowed already; cut the model it was made from instead"
        routed = any(place is not None and sizes.blocks[place].experts for place in places)
        if not reason and routed and field.startswith(("ffn", "down")):
            reason = "experts are called together, and their module takes and gives the whole stream"
        if not reason and places and field in BIASES.values():
            role = next(role for role, flag in BIASES.items() if flag == field)
            stock = [t for t in architecture.catalogue.values() if (t.role, t.kind) == (role, "bias") and not t.asked]
            reason = "the stock class has a bias there" if stock else ""
        if reason:
            found.append(f"{field}: {reason}")
    gone = [lost for lost in _gone(sizes) if same_blocks and lost not in _gone(present)]
    found += without_problems(architecture, gone)
    if sizes.shortcuts and _gone(sizes):
        found.append("a stream that changes its bases needs both branches in every block")
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
