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

BEHIND_A_WRITER: Final = ("embedding_norm", "attention_post_norm", "ffn_post_norm")
"""Norms between a writer and the stream: no map of the stream commutes with them."""

ATTENTION_WRITERS: Final = ("out", "latent_out")
"""What the attention adds to the stream; a block has one of them."""

OVER_ALL_HEADS: Final = ("q_norm_all", "k_norm_all")
"""Norms whose divisor sums over the heads: without some of the heads it is another."""

_ATTENTION: Final = ("q", "k", "v", "latent_q", "latent_kv")
_FFN: Final = ("router", "shared_router", "gate", "up")


def readers_of_norms(roles: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The matrices that read the output of each norm on the stream.

    Args:
        roles: those present in one place; a block without a norm of its own for the FFN feeds both from one.
    """
    if "ffn_norm" in roles or "attention_norm" not in roles:
        return {"attention_norm": _ATTENTION, "ffn_norm": _FFN, "final_norm": ("head",)}
    return {"attention_norm": (*_ATTENTION, *_FFN), "final_norm": ("head",)}


def axes_of(role: str, kind: str) -> tuple[str, ...]:
    """Axis names of a role's ``weight`` or ``bias``."""
    if role in NORMS:
        return NORMS[role]
    return MATRICES[role] if kind == "weight" else MATRICES[role][:1]


def writes_stream(role: str) -> bool:
    """Whether the role adds to the residual stream."""
    return role in TABLES or MATRICES.get(role, ("",))[0] == "residual"


def reads_stream(role: str) -> bool:
    """Whether the role's matrix multiplies a signal of the stream."""
    return role not in TABLES and MATRICES.get(role, ())[1:] == ("residual",)
