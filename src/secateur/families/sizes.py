"""The sizes of a decoder, per block where they may differ, and the length of every named axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from secateur.errors import InternalError

Kind = Literal["ffn", "kv", "heads", "residual", "blocks"]
Expert = int | Literal["shared"] | None
"""An expert of a block: its number, the one that every token visits, or None in a dense FFN."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block.

    Attributes:
        ffn: neurons of the FFN, or of each routed expert.
        kv: groups, that is key/value heads.
        group: query heads of each group.
        experts: routed experts, 0 for a dense FFN.
        shared: neurons of the expert that every token visits, 0 without one.
    """

    ffn: int
    kv: int
    group: int = 1
    experts: int = 0
    shared: int = 0


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

    def axis(self, name: str, block: int | None, expert: Expert = None) -> int:
        """Length of the axis called ``name`` in ``block`` (or in the stem)."""
        if name in ("residual", "head", "vocab", "positions"):
            length: int = getattr(self, name)
            return length
        if name == "triangle":
            width = self.residual - self.mean_free
            return width * (width + 1) // 2
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
        """Of every block: whether it has experts, and its size of ``kind``, that of its shared expert beside it."""
        for block in self.blocks:
            value = {"ffn": block.ffn, "kv": block.kv, "heads": block.group}[kind]
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

    def resized(self, kind: Kind, size: int) -> Sizes:
        """These sizes with ``size(kind)`` set to ``size``; smaller blocks, and shared experts, in proportion."""
        if kind == "residual":
            return replace(self, residual=size)
        if kind == "blocks":
            return replace(self, blocks=self.blocks[:size])
        present = self.size(kind)

        def scaled(value: int) -> int:
            return max(1, value * size // present) if value else 0

        field = {"ffn": "ffn", "kv": "kv", "heads": "group"}[kind]
        blocks = []
        for block in self.blocks:
            change = {field: scaled(getattr(block, field))}
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
    "kv": ("kv",),
    "kv_heads": ("kv",),
    "heads": ("kv", "heads"),
    "query_heads": ("kv", "heads"),
    "residual": ("residual",),
}
"""The kinds of space whose units lie along an axis; axes without an entry are never cut."""
