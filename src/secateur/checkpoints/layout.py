"""Which tensors the output holds: the source's names and files, renumbered and resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from secateur.checkpoints.folder import TensorHeader
from secateur.families import Architecture, Block, Packed


@dataclass(frozen=True)
class Piece:
    """One tensor of the output: its header there, and how canonical tensors (under their old names) make it."""

    header: TensorHeader
    packed: Packed


@dataclass(frozen=True)
class OutputLayout:
    """All tensors of the output.

    Attributes:
        pieces: those made of canonical tensors, by place of the source.
        copies: (name in the source, header in the output) of tensors that only travel along.
    """

    pieces: dict[Block, list[Piece]]
    copies: list[tuple[str, TensorHeader]]

    @property
    def headers(self) -> list[TensorHeader]:
        return [p.header for group in self.pieces.values() for p in group] + [header for _, header in self.copies]


class _Renumber:
    """New names on disk after a depth cut."""

    def __init__(self, prefix: str, kept: Sequence[int]) -> None:
        base, _, rest = prefix.partition(".")
        self.prefixes = (prefix + ".", rest + "." if rest else base + ".")
        self.new = {old: new for new, old in enumerate(kept)}

    def __call__(self, name: str) -> str | None:
        """The new name, None for a tensor of a block that is gone."""
        for prefix in self.prefixes:
            if name.startswith(prefix):
                number, dot, local = name.removeprefix(prefix).partition(".")
                if number.isdigit():
                    new = self.new.get(int(number))
                    return None if new is None else f"{prefix}{new}{dot}{local}"
        return name


def output_layout(source: Checkpoint, target: Architecture, kept: Sequence[int]) -> OutputLayout:
    """The output's tensors.

    Args:
        source: the dense checkpoint.
        target: architecture after the cut.
        kept: surviving blocks.
    """
    renumber = _Renumber(source.architecture.family.blocks, kept)
    shapes = {}
    for name, tensor in source.architecture.tensors.items():
        if tensor.block is None:
            shapes[name] = target.shapes[name]
        elif tensor.block in renumber.new:
            new = replace(tensor, block=renumber.new[tensor.block])
            shapes[name] = target.shape(new)
    pieces: dict[Block, list[Piece]] = {}
    for place in (None, *kept):
        pieces[place] = []
        for packed in source.packed[place]:
            new_name = renumber(packed.name)
            assert new_name is not None
            header = replace(source.folder.headers[packed.name], name=new_name, shape=packed.shape(shapes))
            pieces[place].append(Piece(header, packed))
    embedding = next(piece for piece in pieces[None] if EMBEDDING in piece.packed.canonical)
    if source.architecture.sizes.tied and (source.repeated_head or not target.sizes.tied):
        module = next(n for n, p in source.architecture.packed.items() if HEAD in p.canonical)
        made_of = EMBEDDING if target.sizes.tied else HEAD
        name = source.repeated_head or module
        pieces[None].append(Piece(replace(embedding.header, name=name), Packed(name, ((made_of,),))))
    copies = []
    for header in source.passthrough:
        travelling = renumber(header.name)
        if travelling is not None:
            copies.append((header.name, replace(header, name=travelling)))
    return OutputLayout(pieces, copies)
