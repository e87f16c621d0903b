"""Where a pruned checkpoint loads besides transformers, as the family files state it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, get_args

from secateur.families.architecture import Architecture
from secateur.families.limits import Layout, refusals
from secateur.families.schema import Family
from secateur.families.sizes import Kind, Sizes

RUNTIMES: Final = ("vllm", "llama.cpp", "onnxruntime")
_KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_WORST_FIRST: Final = ("no", "unknown", "expected")


def cut_kinds(before: Sizes, after: Sizes) -> frozenset[Kind]:
    """Kinds of units that a model lacks, as far as its sizes tell.

    A stream narrower or wider than the attention counts as cut whatever was cut now: that form is what a cut of the
    stream means to a runtime, and the source may have been cut before.
    """
    kinds = {kind for kind in _KINDS if before.size(kind) != after.size(kind)}
    return frozenset(kinds if is_square(after) else kinds | {"residual"})


def is_square(sizes: Sizes) -> bool:
    """Whether the attention of every block is as wide as the stream."""
    return all(sizes.axis("heads", block) == sizes.residual for block in range(len(sizes.blocks)))


def status(family: Family, runtime: str, kinds: Iterable[Kind]) -> str:
    """The worst of what the family states for ``kinds``: ``no``, ``unknown``, ``expected`` or ``verified(VERSION)``."""
    entry = family.loads_in.get(runtime, "unknown")
    stated = [entry] if isinstance(entry, str) else [entry.get(kind, "unknown") for kind in sorted(kinds)]
    return min(stated or ["expected"], key=lambda s: _WORST_FIRST.index(s) if s in _WORST_FIRST else len(_WORST_FIRST))


def loads_in(family: Family, before: Sizes, after: Sizes, layout: Layout = "native") -> dict[str, str]:
    """Status of every runtime but transformers, whose own is found at each save.

    Args:
        family: of the model, for its configuration.
        before: sizes of the source.
        after: sizes of the pruned model.
        layout: of the pruned model.
    """
    kinds = cut_kinds(before, after)
    found = {runtime: status(family, runtime, kinds) for runtime in RUNTIMES}
    if layout == "per-layer":  # a traced graph holds any layers; no other runtime knows layers that differ
        traced = found["onnxruntime"]
        return {**dict.fromkeys(RUNTIMES, "no"), "onnxruntime": "expected" if traced.startswith("verified") else traced}
    return found


def loads_by_kind(architecture: Architecture) -> dict[str, dict[Kind, str]]:
    """Status of every runtime for a cut of each kind that the native layout admits."""
    kinds = [kind for kind in _KINDS if not refusals(architecture, kind)]
    return {runtime: {kind: status(architecture.family, runtime, [kind]) for kind in kinds} for runtime in RUNTIMES}
