"""Propose a family: which module plays which role, from names, shapes and what modules read from one another.

A proposal is a guess. What it gets wrong, the self-check (:mod:`secateur.inference.selfcheck`) finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secateur.errors import RequestError, refuse
from secateur.inference.anatomy import Anatomy, same
from secateur.inference.draft import Draft
from secateur.inference.feedforward import fill_ffn
from secateur.inference.measures import Measures, attention_roles, is_attention
from secateur.inference.norms import fill_norms, is_parallel
from secateur.inference.specimen import UNKNOWN, Raw, Specimen


@dataclass
class Proposal:
    """Everything of a family but what only the self-check can tell.

    Attributes:
        raw: the fields of :class:`secateur.families.schema.Family`.
        small: the configuration of the small model.
        anatomy: the small model.
        fused: modules whose parts may take turns, with the turns to try.
        notes: why a kind of space cannot be cut, as far as it shows already.
        other: configuration of another small model, different in every size.
    """

    raw: dict[str, Any]
    small: Raw
    other: Raw
    anatomy: Anatomy
    fused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def propose(specimen: Specimen) -> Proposal:
    """A family for a specimen.

    Raises:
        RequestError: no small model of the class runs, or it is no chain of causal blocks.
    """
    measures = Measures(specimen)
    anatomy = _small_model(specimen, measures)
    asked = f"architecture {specimen.model_type!r}"
    if not anatomy.chained:
        refuse(UNKNOWN, asked, "its blocks do not read one from the other")
    if not anatomy.causal:
        refuse(UNKNOWN, asked, "its tokens see those after them")
    return _proposal(Draft(specimen, measures, anatomy))


def _small_model(specimen: Specimen, measures: Measures) -> Anatomy:
    last = ""
    for small in measures.small_configurations():
        try:
            return Anatomy(small, specimen.blocks)
        except RequestError as error:
            last = error.found
        except Exception as error:  # a stock class fails on odd sizes in many ways
            last = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    refuse(UNKNOWN, f"architecture {specimen.model_type!r}", f"no small model of its class runs ({last})")


def _proposal(draft: Draft) -> Proposal:
    """The parts, each with what those before it found, and what only the whole shows."""
    _fill_attention(draft)
    sizes = {**fill_ffn(draft), **_sizes(draft)}
    fill_norms(draft)
    _fill_stem(draft)
    if len(draft.kinds) > 1:
        draft.notes["residual"] = "its norms on the stream are of different kinds"
    kind, offset = min(draft.kinds, default=("rms", 0.0))
    raw = {
        "model_type": draft.specimen.model_type,
        "blocks": draft.specimen.blocks,
        "norm": kind,
        "norm_offset": offset,
        "scaled_embedding": _scaled(draft),
        "parallel": {} if is_parallel(draft) else None,
        "transposed": _all_transposed(draft),
        "stem": draft.stem,
        "block": draft.block,
        "sizes": sizes,
    }
    defaults = _defaults(draft, sizes)
    if defaults:
        raw["defaults"] = defaults
    small, anatomy = draft.anatomy.raw, draft.anatomy
    return Proposal(raw, small, draft.measures.other_small(small), anatomy, draft.fused, draft.notes)


def _sizes(draft: Draft) -> dict[str, Any]:
    """Keys of the sizes of the stream, the heads and the depth; a number where no key has it."""
    spec, measures = draft.specimen, draft.measures
    sizes: dict[str, Any] = {"residual": spec.width_key, "heads": spec.heads_key}
    sizes["blocks"] = spec.depth_key or spec.depth
    if measures.head_key is not None:
        sizes["head"] = measures.head_key
    if spec.groups_key is not None and spec.short[spec.groups_key] == measures.groups:
        sizes["kv"] = spec.groups_key
    elif measures.groups != measures.heads:
        sizes["kv"] = measures.groups
    return sizes


def _all_transposed(draft: Draft) -> bool:
    """Whether all matrices of the blocks are stored [in, out]; then their entries need not say it."""
    transposed = {name for name, entry in draft.block.items() if entry.get("transposed")}
    matrices = {name for name, entry in draft.block.items() if "norm" not in entry["roles"][0]}
    every = bool(matrices) and transposed == matrices
    for entry in draft.block.values():
        if every or not entry.get("transposed"):
            entry.pop("transposed", None)
    return every


def _defaults(draft: Draft, sizes: dict[str, Any]) -> dict[str, int]:
    """What the FFN's width is, times the stream's, where no key says so."""
    dense = [
        name
        for name, entry in draft.block.items()
        if entry["roles"] == ["down"] and not entry.get("experts") and not entry.get("shared")
    ]
    if draft.specimen.short.get(sizes.get("ffn", "")) is None and len(dense) == 1:
        (local,) = dense
        sides = draft.measures.in_blocks[f"{local}.weight"]
        inner = sides[0] if sides[1] == draft.measures.width else sides[1]
        if inner % draft.measures.width == 0:
            return {"ffn": inner // draft.measures.width}
    return {}


def _fill_attention(draft: Draft) -> None:
    modules = {
        module: block
        for block, module, leaf, shape in draft.of_blocks()
        if leaf == "weight" and len(shape) == 2 and is_attention(module) and draft.is_matrix(block, module)
    }
    for local, roles in attention_roles(modules).items():
        draft.block[local] = {"roles": list(roles), "transposed": draft.transposed(modules[local], local)}
        if len(roles) > 1:
            draft.fused[local] = "kv"
    if not attention_roles(modules):
        draft.notes["kv"] = "its queries, keys and values are not found"


def _fill_stem(draft: Draft) -> None:
    spec, seen = draft.specimen, draft.anatomy.seen
    draft.stem[spec.embedding] = {"roles": ["embedding"]}
    draft.stem[spec.head] = {"roles": ["head"]}
    first = seen[f"{spec.blocks}.0"]
    for name in draft.anatomy.norms():
        if name.startswith(spec.blocks + "."):
            continue
        role = None
        if spec.head in seen and same(seen[name].wrote, seen[spec.head].read):
            role = "final_norm"
            draft.note_kind(name)
        elif same(seen[name].wrote, first.read):
            role = "embedding_norm"
        if role is not None and f"{name}.weight" in draft.anatomy.shapes:
            draft.stem[name] = {"roles": [role]}
        elif role is not None:
            draft.notes["residual"] = "its norms have no weights to make up for a narrower stream"
    tables = {
        name.removesuffix(".weight")
        for name, shape in draft.anatomy.shapes.items()
        if not name.startswith(spec.blocks + ".") and len(shape) == 2 and shape[1] == draft.width
    } - set(draft.stem)
    if len(tables) == 1:
        (name,) = tables
        found = seen.get(name)
        if (found is not None and found.read.dtype != found.wrote.dtype) or "pos" in name:
            draft.stem[name] = {"roles": ["positions"]}


def _scaled(draft: Draft) -> bool:
    """Whether the stream starts as the root of its width times the token embeddings."""
    first = draft.anatomy.seen[f"{draft.specimen.blocks}.0"].read
    seen = draft.anatomy.seen.get(draft.specimen.embedding)
    if seen is None:
        return False
    table: Tensor = draft.anatomy.weights[f"{draft.specimen.embedding}.weight"]
    rows = table[seen.read]
    return any(
        bool(((found / rows).median() / math.sqrt(draft.width) - 1).abs() < 1e-3)
        for found in (seen.wrote, first)
        if found.shape == rows.shape
    )


def with_turns(raw: dict[str, Any], turns: dict[str, str]) -> dict[str, Any]:
    """The fields of a family with the parts of some modules taking turns."""
    changed = {name: {**raw["block"][name], "turns": turn} for name, turn in turns.items()}
    return {**raw, "block": {**raw["block"], **changed}}
