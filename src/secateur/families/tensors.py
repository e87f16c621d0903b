"""Canonical tensors: a matrix, bias, norm weight or index in its place, and the shape it has at any sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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


@dataclass(frozen=True)
class Survivors:
    """The blocks and the routed experts that stay; both are numbered anew, in their order.

    Attributes:
        blocks: by their numbers before.
        experts: of each block in which some go, those that stay, by their numbers before.
    """

    blocks: Sequence[int]
    experts: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @cached_property
    def _blocks(self) -> dict[str, int]:
        return {str(old): new for new, old in enumerate(self.blocks)}

    @cached_property
    def _experts(self) -> dict[str, dict[str, int]]:
        """New numbers of experts, by block."""
        return {str(block): {str(old): new for new, old in enumerate(kept)} for block, kept in self.experts.items()}

    def in_its_block(self, name: str) -> str | None:
        """The canonical name with the new number of its expert, the block's as it was; None where the expert goes."""
        parts = name.split(".")
        numbers = self._experts.get(parts[1]) if parts[2] == "experts" and parts[3].isdigit() else None
        if numbers is None:
            return name
        new = numbers.get(parts[3])
        return None if new is None else ".".join([*parts[:3], str(new), *parts[4:]])

    def new_name(self, name: str) -> str | None:
        """The canonical name in the pruned model; None where block or expert go."""
        found = self.in_its_block(name)
        if found is None or not found.startswith("blocks."):
            return found
        _, block, local = found.split(".", 2)
        return f"blocks.{self._blocks[block]}.{local}" if block in self._blocks else None

    def old_name(self, name: str) -> str:
        """The canonical name before, of one in the pruned model."""
        parts = name.split(".")
        if parts[0] != "blocks":
            return name
        block = self.blocks[int(parts[1])]
        experts = self.experts.get(block) if parts[2] == "experts" and parts[3].isdigit() else None
        local = parts[2:] if experts is None else [parts[2], str(experts[int(parts[3])]), *parts[4:]]
        return ".".join(["blocks", str(block), *local])


def place_name(block: Block) -> str:
    """``stem`` or ``blocks.I``."""
    return "stem" if block is None else f"blocks.{block}"


def canonical_name(block: Block, role: str, kind: str, expert: Expert = None) -> str:
    """Name of a canonical tensor."""
    place = place_name(block)
    return f"{place}.{role}.{kind}" if expert is None else f"{place}.experts.{expert}.{role}.{kind}"
