"""Canonical tensors: a matrix, bias, norm weight or index in its place, and the shape it has at any sizes."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.families.packing import Shape
from secateur.families.roles import INDICES, PORTS, SHORTCUTS, WHOLE, axes_of, dimensions_of
from secateur.families.sizes import Expert, Sizes

Block = int | None
"""Index of a decoder block; None is the stem (embeddings, final norm, head)."""


@dataclass(frozen=True)
class CanonicalTensor:
    """A matrix, bias, norm weight or index in its canonical place.

    ``name`` is ``stem.ROLE.KIND``, ``blocks.I.ROLE.KIND`` or ``blocks.I.experts.E.ROLE.KIND``; ``fixed`` its shape in
    the stock class, where it has axes of its own. It is there where the block has one of ``branches`` (if any are
    named) and one of the sizes ``asked`` (if any are named) asks for it.
    """

    name: str
    role: str
    kind: str
    block: Block
    expert: Expert
    fixed: Shape | None = None
    branches: frozenset[str] = frozenset()
    asked: frozenset[str] = frozenset()

    @property
    def axes(self) -> tuple[str, ...]:
        return axes_of(self.role, self.kind)

    @property
    def is_index(self) -> bool:
        """Whether it says where a matrix reads or writes, rather than what it computes."""
        return self.kind in INDICES

    def exists(self, sizes: Sizes) -> bool:
        """Whether it is there at some sizes."""
        if self.branches and self.block is not None and not any(map(sizes.blocks[self.block].has, self.branches)):
            return False
        return not self.asked or any(self._asks(field, sizes) for field in self.asked)

    def _asks(self, field: str, sizes: Sizes) -> bool:
        if field in WHOLE:
            return bool(sizes.narrowed(field, self.block))
        return self.block is not None and bool(getattr(sizes.blocks[self.block], field))

    def shape(self, sizes: Sizes) -> Shape:
        """Its shape at some sizes."""
        if self.role in SHORTCUTS and self.block is not None:
            rows, columns = sizes.change_of_basis(self.role, self.block)
            return (sum(min(row + 1, columns) for row in range(rows)),)
        found = []
        for i, (axis, dimension) in enumerate(zip(self.axes, dimensions_of(self.role, self.kind), strict=True)):
            length = self.fixed[i] if axis == "own" and self.fixed else sizes.axis(axis, self.block, self.expert)
            field = PORTS.get((self.role, dimension))
            if field and (narrowed := sizes.narrowed(field, self.block)):
                length = length * narrowed // int(getattr(sizes, WHOLE[field]))
            found.append(length)
        return tuple(found)


def place_name(block: Block) -> str:
    """``stem`` or ``blocks.I``."""
    return "stem" if block is None else f"blocks.{block}"


def canonical_name(block: Block, role: str, kind: str, expert: Expert = None) -> str:
    """Name of a canonical tensor."""
    place = place_name(block)
    return f"{place}.{role}.{kind}" if expert is None else f"{place}.experts.{expert}.{role}.{kind}"
