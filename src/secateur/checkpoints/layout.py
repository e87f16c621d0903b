"""Which tensors the output holds: the source's names and files, renumbered and resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from secateur.checkpoints.folder import TensorHeader
from secateur.families import Architecture, Block, Packed, canonical_name


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
    arranged = {p.canonical: p for p in target.packed.values()}
    shapes, renamed = {}, {}
    for name, tensor in source.architecture.tensors.items():
        if tensor.block is None or tensor.block in renumber.new:
            block = None if tensor.block is None else renumber.new[tensor.block]
            renamed[name] = canonical_name(block, tensor.role, tensor.kind, tensor.expert)
            shapes[name] = target.shapes[renamed[name]]
    pieces: dict[Block, list[Piece]] = {}
    for place in (None, *kept):
        pieces[place] = []
        for packed in source.packed[place]:
            new_name = renumber(packed.name)
            assert new_name is not None
            # what takes turns in it may do so in other numbers
            alike = arranged.get(tuple(renamed[name] for name in packed.canonical))
            made = packed if alike is None else replace(packed, turn=alike.turn)
            header = replace(source.folder.headers[packed.name], name=new_name, shape=made.shape(shapes))
            pieces[place].append(Piece(header, made))
        if place is not None and target.sizes.shortcuts and not source.architecture.sizes.shortcuts:
            pieces[place] += _shortcuts(source, target, place, renumber.new[place], renumber)
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


def _shortcuts(source: Checkpoint, target: Architecture, old: int, new: int, renumber: _Renumber) -> list[Piece]:
    """The changes of basis of one block: in the file and the type of the matrix they stand beside."""
    found = []
    for role in target.shortcut_roles:
        packed = next(p for p in target.packed_of(new) if p.canonical == (canonical_name(new, role, "weight"),))
        writer = canonical_name(old, source.architecture.attention_writer(old), "weight")
        beside = next(p for p in source.packed[old] if writer in p.canonical)
        header = source.folder.headers[beside.name]
        spelled = _spelled_alike(packed.name, renumber(beside.name) or "", target.family.blocks)
        shape = packed.shape(target.shapes)
        made = replace(packed, name=spelled, parts=((canonical_name(old, role, "weight"),),))
        found.append(Piece(replace(header, name=spelled, shape=shape), made))
    return found


def _spelled_alike(name: str, other: str, prefix: str) -> str:
    """``name`` without the base-model prefix where ``other`` has none."""
    base = prefix.partition(".")[0] + "."
    return name if other.startswith(base) else name.removeprefix(base)
