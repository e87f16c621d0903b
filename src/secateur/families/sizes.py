"""The sizes of a decoder, per block where they may differ, and the length of every named axis."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.errors import InternalError


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block: ``ffn`` neurons (of each expert) and ``kv`` groups (key/value heads)."""

    ffn: int
    kv: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a whole decoder.

    Attributes:
        residual: width of the residual stream.
        heads_per_kv: query heads that share one key/value head.
        head: dimensions of a head.
        vocab: rows of the token embedding.
        positions: rows of the learned position table, 0 without one.
        experts: experts of a block, 0 for a dense FFN.
        active_experts: experts that a token visits.
        tied: whether the head shares the embedding's storage.
        blocks: sizes of each block.
    """

    residual: int
    heads_per_kv: int
    head: int
    vocab: int
    positions: int
    experts: int
    active_experts: int
    tied: bool
    blocks: tuple[BlockSizes, ...]

    def axis(self, name: str, block: int | None) -> int:
        """Length of the axis called ``name`` in ``block`` (or in the stem)."""
        if name in ("ffn", "kv", "heads"):
            if block is None:
                raise InternalError("axis", f"axis {name!r} of the stem", "only blocks have it")
            units = self.blocks[block].ffn if name == "ffn" else self.blocks[block].kv
            return units * self.span(name)
        length = getattr(self, name)
        assert isinstance(length, int)
        return length

    def span(self, axis: str) -> int:
        """Positions along ``axis`` that one unit of its space covers."""
        return {"kv": self.head, "heads": self.heads_per_kv * self.head}.get(axis, 1)

    def uniform(self, kind: str) -> int | None:
        """The one size that all blocks share in ``kind``; None where they differ."""
        if kind == "residual":
            return self.residual
        if kind == "blocks":
            return len(self.blocks)
        values = {getattr(block, kind) for block in self.blocks}
        return values.pop() if len(values) == 1 else None

    def resized(self, kind: str, size: int) -> Sizes:
        """These sizes with every block's ``kind`` (or the stream, or the depth) set to ``size``."""
        if kind == "residual":
            return replace(self, residual=size)
        if kind == "blocks":
            return replace(self, blocks=self.blocks[:size])
        return replace(self, blocks=tuple(replace(block, **{kind: size}) for block in self.blocks))

    def untied(self) -> Sizes:
        """These sizes with a head of its own."""
        return replace(self, tied=False)


UNIT_OF_AXIS = {"ffn": "ffn", "kv": "kv", "heads": "kv", "residual": "residual"}
"""The kind of space whose units lie along an axis; axes without an entry are never cut."""
