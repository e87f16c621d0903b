"""The sizes of a decoder, per block where they may differ, and the length of every named axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from secateur.errors import InternalError
from secateur.families.roles import SHORTCUTS, WHOLE

Kind = Literal["ffn", "experts", "kv", "heads", "residual", "blocks"]
Expert = int | Literal["shared"] | None
"""An expert of a block: its number, the one that every token visits, or None in a dense FFN."""

FIELD_OF: Final[Mapping[Kind, str]] = {"ffn": "ffn", "experts": "experts", "kv": "kv", "heads": "group"}
"""Which size of a block counts its units of a kind."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block.

    Attributes:
        ffn: neurons of the FFN, or of each routed expert.
        kv: groups, that is key/value heads.
        group: query heads of each group.
        experts: routed experts, 0 for a dense FFN.
        shared: neurons of the expert that every token visits, 0 without one.

    Only the per-layer layout knows what follows; 0 and False are as the stock class has it.

    Attributes:
        qk: dimensions that every query and key head keeps.
        value: dimensions that every value head keeps.
        attention_read, ffn_read: dimensions of the stream that the branch reads, behind its norm.
        attention_write, ffn_write: dimensions of the stream that the branch writes.
        out_bias, down_bias: a bias that the stock class has not.

    Without any of ``kv`` the block has no attention; without ``ffn``, ``experts`` and ``shared`` no FFN.
    """

    ffn: int
    kv: int
    group: int = 1
    experts: int = 0
    shared: int = 0
    qk: int = 0
    value: int = 0
    attention_read: int = 0
    attention_write: int = 0
    ffn_read: int = 0
    ffn_write: int = 0
    out_bias: bool = False
    down_bias: bool = False

    def has(self, branch: str) -> bool:
        """Whether the block has its ``attention`` or its ``ffn``."""
        return bool(self.kv if branch == "attention" else self.ffn or self.experts or self.shared)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a whole decoder.

    Attributes:
        residual: width of the residual stream.
        head: dimensions of a head.
        vocab: rows of the token embedding.
        positions: rows of the learned position table, 0 without one.
        active_experts: routed experts that a token visits.
        tied: whether the head shares the embedding's storage.
        blocks: sizes of each block.
        shortcuts: whether the stream changes its basis at every norm, by a triangular map in the shortcuts.
        mean_free: dimensions of the stream that the norms take out of it: 1 for LayerNorm, 0 for RMSNorm.
        stem_write, stem_read: dimensions of the stream that the embeddings write and the head reads, 0 for all.
    """

    residual: int
    head: int
    vocab: int
    positions: int
    active_experts: int
    tied: bool
    blocks: tuple[BlockSizes, ...]
    shortcuts: bool = False
    mean_free: int = 0
    stem_write: int = 0
    stem_read: int = 0

    def narrowed(self, field: str, block: int | None) -> int:
        """A size that narrows a part of the stock class (``roles.PORTS``); 0 where it leaves it as it is."""
        value: int = getattr(self if block is None else self.blocks[block], field)
        return value if value < getattr(self, WHOLE[field]) else 0

    def width(self, field: str, block: int | None) -> int:
        """The same, and the whole where nothing is narrowed."""
        return self.narrowed(field, block) or int(getattr(self, WHOLE[field]))

    def change_of_basis(self, role: str, block: int) -> tuple[int, int]:
        """Directions of the stream before and behind a shortcut."""
        before, behind = (self.width(field, block) - self.mean_free for field in SHORTCUTS[role])
        return before, behind

    def directions(self, interface: str) -> int:
        """Directions of the stream that survive where a norm reads it, or everywhere (``residual``)."""
        place, _, norm = interface.rpartition(".")
        field = norm.replace("_norm", "_read")
        if place == "stem":
            return self.width("stem_read", None) - self.mean_free
        found = self.width(field, int(place.removeprefix("blocks."))) if place else self.residual
        return found - self.mean_free

    def axis(self, name: str, block: int | None, expert: Expert = None) -> int:
        """Length of the axis called ``name`` in ``block`` (or in the stem)."""
        if name in ("residual", "head", "vocab", "positions"):
            length: int = getattr(self, name)
            return length
        if block is None:
            raise InternalError("axis", f"axis {name!r} of the stem", "only blocks have it")
        sizes = self.blocks[block]
        lengths = {
            "ffn": sizes.shared if expert == "shared" else sizes.ffn,
            "experts": sizes.experts,
            "kv_heads": sizes.kv,
            "query_heads": sizes.kv * sizes.group,
            "kv": sizes.kv * self.head,
            "heads": sizes.kv * sizes.group * self.head,
            "group": sizes.group,
        }
        return lengths[name]

    def span(self, axis: str, kind: Kind, block: int | None) -> int:
        """Positions along ``axis`` that one unit of ``kind`` covers."""
        group = 1 if block is None or kind == "heads" else self.blocks[block].group
        return {
            "kv": self.head,
            "heads": group * self.head,
            "query_heads": group,
        }.get(axis, 1)

    # -- one number for a kind -------------------------------------------------------------------------------------

    def _each(self, kind: Kind) -> Iterator[tuple[bool, int, int]]:
        """Of every block that has any: whether it has experts, its size of ``kind``, that of its shared expert."""
        for block in self.blocks:
            if not (block.experts if kind == "experts" else block.has("ffn" if kind == "ffn" else "attention")):
                continue
            value = getattr(block, FIELD_OF[kind])
            yield kind == "ffn" and block.experts > 0, value, block.shared if kind == "ffn" else 0

    def size(self, kind: Kind) -> int:
        """The size that stands for all: the largest of any block (of those with experts, where there are some)."""
        if kind == "residual":
            return self.residual
        if kind == "blocks":
            return len(self.blocks)
        each = list(self._each(kind))
        with_experts = any(expert for expert, _, _ in each)
        return max((value for expert, value, _ in each if expert == with_experts), default=0)

    def uniform(self, kind: Kind) -> int | None:
        """``size`` where all blocks of a sort share it; None where they differ."""
        if kind not in ("residual", "blocks"):
            sorts = set(self._each(kind))
            if len(sorts) > len({expert for expert, _, _ in sorts}):
                return None
        return self.size(kind)

    @property
    def alike(self) -> bool:
        """Whether all blocks are of the same sizes."""
        return len(set(self.blocks)) <= 1

    def resized(self, kind: Kind, size: int) -> Sizes:
        """These sizes with ``size(kind)`` set to ``size``; smaller blocks, and shared experts, in proportion."""
        if kind == "residual":
            return replace(self, residual=size)
        if kind == "blocks":
            return replace(self, blocks=self.blocks[:size])
        present = self.size(kind)

        def scaled(value: int) -> int:
            return max(1, value * size // present) if value else 0

        field = FIELD_OF[kind]
        blocks = []
        for block in self.blocks:
            change: dict[str, Any] = {field: scaled(getattr(block, field))}
            if kind == "ffn":
                change["shared"] = scaled(block.shared)
            blocks.append(replace(block, **change))
        return replace(self, blocks=tuple(blocks))

    def kept_blocks(self, kept: list[int]) -> Sizes:
        """These sizes with only some of the blocks."""
        return replace(self, blocks=tuple(self.blocks[i] for i in kept))

    def untied(self) -> Sizes:
        """These sizes with a head of its own."""
        return replace(self, tied=False)


KINDS_OF_AXIS: Final[dict[str, tuple[Kind, ...]]] = {
    "ffn": ("ffn",),
    "experts": ("experts",),
    "kv": ("kv",),
    "kv_heads": ("kv",),
    "heads": ("kv", "heads"),
    "query_heads": ("kv", "heads"),
    "residual": ("residual",),
}
"""The kinds of space whose units lie along an axis; axes without an entry are never cut.

Tensors of a single expert belong to a unit as a whole and have no axis of experts."""
