"""Which norm of an unknown architecture stands where: by what it reads and who reads it."""

from __future__ import annotations

import re
from typing import Any, Final

from torch import Tensor

from secateur.inference.anatomy import same
from secateur.inference.draft import Draft
from secateur.inference.measures import is_attention

_READERS: Final = frozenset(("q", "k", "v", "gate", "up", "router", "shared_router"))


def fill_norms(draft: Draft) -> None:
    """Norms of the blocks by what they read and who reads them."""
    for name in draft.anatomy.norms():
        if not name.startswith(draft.specimen.blocks + "."):
            continue
        number, _, local = name.removeprefix(draft.specimen.blocks + ".").partition(".")
        role = _norm_role(draft, f"{draft.specimen.blocks}.{number}.", local)
        if role is None:
            continue
        if role in ("attention_norm", "ffn_norm"):
            draft.note_kind(name)
        if f"{local}.weight" in draft.measures.in_blocks:
            draft.block[local] = {"roles": [role]}
        elif role in ("attention_norm", "ffn_norm"):
            draft.notes["residual"] = "its norms have no weights to make up for a narrower stream"


def _norm_role(draft: Draft, prefix: str, local: str) -> str | None:
    seen = draft.anatomy.seen[prefix + local]
    parent = {n.removeprefix(prefix): s for n, s in draft.anatomy.seen.items() if n.startswith(prefix)}
    if is_attention(local.rpartition(".")[0]):
        found = _head_norm(draft, prefix, local, parent)
        if found is not None or seen.read.shape[-1] != draft.width:
            return found
    writes = {name for name, other in parent.items() if name != local and same(other.wrote, seen.read)}
    feeds = {name for name, other in parent.items() if name != local and same(other.read, seen.wrote)}
    inner = {name for name, entry in draft.block.items() if set(entry["roles"]) & _READERS}
    attends = any(is_attention(name) and (name in inner or _has(name, inner)) for name in feeds)
    others = any(not is_attention(name) and (name in inner or _has(name, inner)) for name in feeds)
    if attends:
        return "attention_norm"
    if others:
        return "ffn_norm"
    if any(is_attention(name) for name in writes):
        return "attention_post_norm"
    if writes:
        return "ffn_post_norm"
    return None


def _head_norm(draft: Draft, prefix: str, local: str, parent: dict[str, Any]) -> str | None:
    """A norm of queries or keys, by what it reads."""
    seen = draft.anatomy.seen[prefix + local]
    for role in ("q", "k") if "q" in draft.roles else ():
        source = next((n for n, entry in draft.block.items() if entry["roles"] == [role]), None)
        named = re.search(rf"(^|_){role}|{'query' if role == 'q' else 'key'}", local.rpartition(".")[2])
        reads = source is not None and source in parent and _reordered(parent[source].wrote, seen.read)
        if reads or (named and seen.read.shape[-1] == draft.measures.head):
            shape = draft.measures.in_blocks.get(f"{local}.weight", ())
            if len(shape) == 2:
                return f"{role}_norm_each"
            whole = source is not None and seen.read.shape[-1] == parent[source].wrote.shape[-1]
            return f"{role}_norm_all" if whole and seen.read.shape[-1] != draft.measures.head else f"{role}_norm"
    return None


def is_parallel(draft: Draft) -> bool:
    """Whether attention and FFN of a block read the same stream."""
    roles = draft.roles
    if "attention_norm" in roles and "ffn_norm" not in roles:
        readers = {n: e["roles"][0] for n, e in draft.block.items() if e["roles"][0] in ("q", "up", "gate")}
        reads = [draft.anatomy.seen.get(f"{draft.specimen.blocks}.0.{name}") for name in readers]
        return len(reads) > 1 and all(s is not None and same(s.read, reads[0].read) for s in reads if reads[0])
    names = [n for r in ("attention_norm", "ffn_norm") for n, e in draft.block.items() if e["roles"] == [r]]
    seen = [draft.anatomy.seen.get(f"{draft.specimen.blocks}.0.{name}") for name in names]
    return len(seen) == 2 and all(seen) and same(seen[0].read, seen[1].read)  # type: ignore[union-attr]


def _has(name: str, inner: set[str]) -> bool:
    """Whether a module holds one of some others."""
    return any(other.startswith(name + ".") for other in inner)


def _reordered(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in another order."""
    if first.numel() != second.numel():
        return False
    return bool((first.flatten().sort().values == second.flatten().sort().values).all())
