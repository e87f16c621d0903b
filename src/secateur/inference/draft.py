"""What is known so far of an unknown architecture: roles by module, filled in part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from secateur.families.packing import Shape
from secateur.inference.anatomy import Anatomy
from secateur.inference.measures import Measures
from secateur.inference.specimen import Specimen

Table = dict[str, dict[str, Any]]


class Draft:
    """The tables of a family while they are filled.

    Attributes:
        width: of the small model's stream.
        block, stem: entries by module.
        fused: modules whose parts may take turns, with the turns to try.
        notes: why a kind of space cannot be cut.
        kinds: of the norms that read the stream.
    """

    def __init__(self, specimen: Specimen, measures: Measures, anatomy: Anatomy) -> None:
        self.specimen, self.measures, self.anatomy = specimen, measures, anatomy
        self.width = int(anatomy.raw[specimen.width_key])
        self.block: Table = {}
        self.stem: Table = {}
        self.fused: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.kinds: set[tuple[str, float]] = set()

    def of_blocks(self) -> Iterator[tuple[int, str, str, Shape]]:
        """Block, module in it, leaf and shape of every parameter inside the blocks."""
        for name, shape in self.anatomy.shapes.items():
            if name.startswith(self.specimen.blocks + "."):
                number, _, local = name.removeprefix(self.specimen.blocks + ".").partition(".")
                module, _, leaf = local.rpartition(".")
                yield int(number), module, leaf, shape

    def full(self, block: int, module: str) -> str:
        """Name of a module of a block in the whole."""
        return f"{self.specimen.blocks}.{block}.{module}"

    @property
    def roles(self) -> set[str]:
        """Roles of the blocks so far."""
        return {role for entry in self.block.values() for role in entry["roles"]}

    def is_matrix(self, block: int, module: str) -> bool:
        """Whether a module is a matrix rather than a norm with a weight for every head."""
        return self.full(block, module) not in self.anatomy.norms()

    def transposed(self, block: int, module: str) -> bool:
        """Whether a matrix is stored [in, out]."""
        return self.anatomy.transposed(self.full(block, module))

    def note_kind(self, name: str) -> None:
        """Take down what a norm on the stream does."""
        found = self.anatomy.gain(name)
        if found is None:
            self.notes["residual"] = f"{name} is neither an RMSNorm nor a LayerNorm"
        else:
            self.kinds.add(found)
