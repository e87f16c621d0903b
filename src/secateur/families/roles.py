"""What the roles of a decoder mean: for each role, the axes of its matrix as [written, read].

This table and the family files replace all knowledge about where a width appears: cutting ``ffn`` touches every
tensor with an ``ffn`` axis, and so on. Matrices are canonical here, always [out, in], one role each; how the stock
class fuses, stacks or transposes them is the business of :mod:`secateur.families.packing`.

Axes: ``residual``, ``vocab``, ``positions``, ``head`` (dimensions of one head), ``heads`` and ``kv`` (all dimensions of
the query or the key/value heads), ``query_heads`` and ``kv_heads`` (one entry per head), ``ffn``, ``experts``;
``own`` is a length of the stock class that no cut changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

MATRICES: Final[dict[str, tuple[str, ...]]] = {
    "embedding": ("vocab", "residual"),
    "positions": ("positions", "residual"),
    "q": ("heads", "residual"),
    "k": ("kv", "residual"),
    "v": ("kv", "residual"),
    "out": ("residual", "heads"),
    "latent_q": ("own", "residual"),  # of attention with low-rank queries, keys and values
    "latent_kv": ("own", "residual"),
    "latent_q_up": ("own", "own"),
    "latent_kv_up": ("own", "own"),
    "latent_out": ("residual", "own"),
    "sinks": ("query_heads",),
    "router": ("experts", "residual"),
    "shared_router": ("own", "residual"),
    "gate": ("ffn", "residual"),
    "up": ("ffn", "residual"),
    "down": ("residual", "ffn"),
    "head": ("vocab", "residual"),
    "attention_shortcut": ("triangle",),
    "ffn_shortcut": ("triangle",),
}
NORMS: Final[dict[str, tuple[str, ...]]] = {
    "attention_norm": ("residual",),
    "ffn_norm": ("residual",),
    "final_norm": ("residual",),
    "embedding_norm": ("residual",),
    "attention_post_norm": ("residual",),
    "ffn_post_norm": ("residual",),
    "attention_stream_norm": ("residual",),  # of the sum of stream and branch
    "ffn_stream_norm": ("residual",),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "q_norm_each": ("query_heads", "head"),  # weights of its own for every head
    "k_norm_each": ("kv_heads", "head"),
    "q_norm_all": ("heads",),  # one norm over all heads together
    "k_norm_all": ("kv",),
    "latent_q_norm": ("own",),
    "latent_kv_norm": ("own",),
}

TABLES: Final = ("embedding", "positions")
"""Lookup tables: their second axis *writes* the stream."""

EXPERT_ROLES: Final = ("gate", "up", "down")
"""What an expert is made of; the first axis or the second of each is its neurons."""

BEHIND_A_WRITER: Final = ("embedding_norm", "attention_post_norm", "ffn_post_norm")
"""Norms between a writer and the stream: no map of the stream commutes with them."""

IN_THE_STREAM: Final = ("attention_stream_norm", "ffn_stream_norm")
"""Norms of the stream itself, behind what a branch has added to it (post-norm): they stay where the branch goes."""

ATTENTION_WRITERS: Final = ("out", "latent_out")
"""What the attention adds to the stream; a block has one of them."""

OVER_ALL_HEADS: Final = ("q_norm_all", "k_norm_all")
"""Norms whose divisor sums over the heads: without some of the heads it is another."""

_ATTENTION: Final = ("q", "k", "v", "latent_q", "latent_kv")
_FFN: Final = ("router", "shared_router", "gate", "up")
_POST_NORMS: Final = {"attention_post_norm": "attention", "ffn_post_norm": "ffn"}

NORMS_OF_HEADS: Final = ("q_norm", "k_norm", "q_norm_each", "k_norm_each", *OVER_ALL_HEADS)
"""Norms whose divisor sums over the dimensions of a head."""

READ, WRITE = "read_index", "write_index"
INDICES: Final = (READ, WRITE)
"""Kinds of the tensors that say which entries of a wider signal a narrowed matrix reads or writes."""

PORTS: Final[dict[tuple[str, int], str]] = {
    **{(role, 0): "qk" for role in ("q", "k")},
    ("v", 0): "value",
    ("out", 1): "value",
    **{(role, 1): "attention_read" for role in _ATTENTION},
    **{(role, 0): "attention_write" for role in ATTENTION_WRITERS},
    **{(role, 1): "ffn_read" for role in _FFN},
    ("down", 0): "ffn_write",
    **{(role, 1): "stem_write" for role in TABLES},
    ("head", 1): "stem_read",
}
"""Which size, besides that of its axis, narrows a (role, dimension): the stock signal stays as wide as the axis says,
the matrix reads or writes some of its entries."""

WHOLE: Final[dict[str, str]] = {
    **dict.fromkeys(("qk", "value"), "head"),
    **dict.fromkeys(("attention_read", "attention_write", "ffn_read", "ffn_write"), "residual"),
    **dict.fromkeys(("stem_write", "stem_read"), "residual"),
}
"""What each of these sizes is a part of: of an axis that is n times as long, it leaves n times as much."""

BIASES: Final = {"out": "out_bias", "down": "down_bias"}
"""The flag by which a role gets a bias that the stock class does not have."""

SHORTCUTS: Final = {
    "attention_shortcut": ("attention_read", "attention_write"),
    "ffn_shortcut": ("ffn_read", "ffn_write"),
}
"""Widths of the stream before and behind a change of basis."""


def branch_of(role: str) -> str | None:
    """``attention`` or ``ffn``, whose role it is by itself; None of a role of the stem or of a norm before them."""
    if role in _POST_NORMS:
        return _POST_NORMS[role]
    if role in (*_FFN, "down"):
        return "ffn"
    axes = {*MATRICES.get(role, ()), *NORMS.get(role, ())}
    if role.startswith("latent") or axes & {"heads", "kv", "query_heads", "kv_heads", "head"}:
        return "attention"
    return None


def branches_of(role: str, beside: Collection[str]) -> frozenset[str]:
    """The branches of a block that need a role; empty for one that no branch owns.

    Args:
        beside: all roles of the block.
    """
    if own := branch_of(role):
        return frozenset({own})
    readers = readers_of_norms(beside).get(role, ())
    return frozenset(filter(None, (branch_of(reader) for reader in readers if reader in beside)))


def index_kind(role: str, dimension: int) -> str:
    """Kind of the index of a narrowed dimension: a table writes its second, a matrix its first."""
    return READ if dimension and role not in TABLES else WRITE


def readers_of_norms(roles: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The matrices that read the output of each norm on the stream.

    Args:
        roles: those present in one place; a block without a norm of its own for the FFN feeds both from one.
    """
    if "ffn_norm" in roles or "attention_norm" not in roles:
        return {"attention_norm": _ATTENTION, "ffn_norm": _FFN, "final_norm": ("head",)}
    return {"attention_norm": (*_ATTENTION, *_FFN), "final_norm": ("head",)}


def dimensions_of(role: str, kind: str) -> tuple[int, ...]:
    """The dimensions of a role's matrix along which its ``weight``, ``bias`` or index lies."""
    every = range(len(NORMS.get(role, ()) or MATRICES[role]))
    if kind in INDICES:
        return tuple(d for d in every if (role, d) in PORTS and index_kind(role, d) == kind)
    return tuple(every) if kind == "weight" or role in NORMS else (0,)


def axes_of(role: str, kind: str) -> tuple[str, ...]:
    """Axis names of a role's ``weight``, ``bias`` or index."""
    axes = NORMS.get(role) or MATRICES[role]
    return tuple(axes[d] for d in dimensions_of(role, kind))


def writes_stream(role: str) -> bool:
    """Whether the role adds to the residual stream."""
    return role in TABLES or MATRICES.get(role, ("",))[0] == "residual"


def reads_stream(role: str) -> bool:
    """Whether the role's matrix multiplies a signal of the stream."""
    return role not in TABLES and MATRICES.get(role, ())[1:] == ("residual",)
