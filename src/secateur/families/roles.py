"""What the roles of a decoder mean: for each role, the axes of its matrix as [written, read].

This table and the family files replace all knowledge about where a width appears: cutting ``ffn`` touches every
tensor with an ``ffn`` axis, and so on. Matrices are canonical here, always [out, in], one role each; how the stock
class fuses, stacks or transposes them is the business of :mod:`secateur.families.packing`.
"""

from __future__ import annotations

from typing import Final

MATRICES: Final[dict[str, tuple[str, str]]] = {
    "embedding": ("vocab", "residual"),
    "positions": ("positions", "residual"),
    "q": ("heads", "residual"),
    "k": ("kv", "residual"),
    "v": ("kv", "residual"),
    "out": ("residual", "heads"),
    "router": ("experts", "residual"),
    "gate": ("ffn", "residual"),
    "up": ("ffn", "residual"),
    "down": ("residual", "ffn"),
    "head": ("vocab", "residual"),
}
NORMS: Final[dict[str, str]] = {
    "attention_norm": "residual",
    "ffn_norm": "residual",
    "final_norm": "residual",
    "q_norm": "head",
    "k_norm": "head",
}

TABLES: Final = ("embedding", "positions")
"""Lookup tables: their second axis *writes* the stream."""

READERS_OF_NORM: Final[dict[str, tuple[str, ...]]] = {
    "attention_norm": ("q", "k", "v"),
    "ffn_norm": ("router", "gate", "up"),
    "final_norm": ("head",),
}
"""The matrices that read the output of each norm on the stream."""


def axes_of(role: str, kind: str) -> tuple[str, ...]:
    """Axis names of a role's ``weight`` or ``bias``."""
    if role in NORMS:
        return (NORMS[role],)
    return MATRICES[role] if kind == "weight" else MATRICES[role][:1]


def writes_stream(role: str) -> bool:
    """Whether the role adds to the residual stream."""
    return role in TABLES or MATRICES.get(role, ("",))[0] == "residual"
