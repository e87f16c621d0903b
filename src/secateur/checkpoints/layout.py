"""Which tensors the output holds: the source's names and files, renumbered and resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.checkpoints.checkpoint import EMBEDDING, HEAD, Checkpoint
from secateur.checkpoints.folder import TensorHeader
from secateur.families import Architecture, Block, Packed, Survivors, canonical_name
from secateur.families.roles import SHORTCUTS

INDEX_DTYPE = "I32"


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


def output_layout(source: Checkpoint, target: Architecture, survivors: Survivors) -> OutputLayout:
    """The output's tensors.

    Args:
        source: the dense checkpoint.
        target: architecture after the cut.
        survivors: blocks and experts.
    """
    kept = survivors.blocks
    renumber = _Renumber(source.architecture.family.blocks, kept)
    arranged = {p.canonical: p for p in target.packed.values()}
    shapes, renamed = {}, {}
    for name in source.architecture.tensors:
        new = survivors.new_name(name)
        if new in target.shapes:  # a branch of its block may be gone
            renamed[name], shapes[name] = new, target.shapes[new]
    pieces: dict[Block, list[Piece]] = {}
    for place in (None, *kept):
        pieces[place] = []
        names: dict[tuple[str | None, ...], str] = {p.canonical: p.name for p in source.packed[place]}
        for packed in source.packed[place]:
            parts = tuple(group for group in packed.parts if all(name in renamed for name in group))
            if not parts:
                continue
            # an expert that lies alone on disk takes the name that belonged to its new number
            alone = tuple(survivors.in_its_block(name) for name in packed.canonical)
            new_name = renumber(packed.name if packed.stacked else names[alone])
            assert new_name is not None
            made = replace(packed, parts=parts)
            # what takes turns in it may do so in other numbers
            alike = arranged.get(tuple(renamed[name] for name in made.canonical))
            made = made if alike is None else replace(made, turn=alike.turn)
            header = replace(source.folder.headers[packed.name], name=new_name, shape=made.shape(shapes))
            pieces[place].append(Piece(header, made))
        pieces[place] += _added(source, target, place, None if place is None else renumber.new[place], renumber)
    embedding = next(piece for piece in pieces[None] if EMBEDDING in piece.packed.canonical)
    if source.architecture.sizes.tied and (source.repeated_head or not target.sizes.tied):
        module = next(n for n, p in source.architecture.packed.items() if HEAD in p.canonical)
        made_of = EMBEDDING if target.sizes.tied else HEAD
        name = source.repeated_head or module
        header = replace(embedding.header, name=name, shape=target.shapes[made_of])
        pieces[None].append(Piece(header, Packed(name, ((made_of,),))))
    copies = []
    for header in source.passthrough:
        travelling = renumber(header.name)
        if travelling is not None and not target.is_gone(travelling):
            copies.append((header.name, replace(header, name=travelling)))
    return OutputLayout(pieces, copies)


def _added(source: Checkpoint, target: Architecture, old: Block, new: Block, renumber: _Renumber) -> list[Piece]:
    """What the source does not have in one place (changes of basis, biases, indices), each in the file of the matrix it
    stands beside."""
    found = []
    for packed in target.packed_of(new):
        tensors = [target.tensors[name] for name in packed.canonical]
        names = tuple(canonical_name(old, t.role, t.kind, t.expert) for t in tensors)
        if names[0] in source.architecture.tensors:
            continue
        role = tensors[0].role
        if role in SHORTCUTS and old is not None:
            role = source.architecture.attention_writer(old)
        if role not in source.architecture.roles_of(old):  # the head of its own that a tied one becomes
            role = "embedding"
        beside = next(p for p in source.packed[old] if canonical_name(old, role, "weight") in p.canonical)
        header = source.folder.headers[beside.name]
        spelled = _spelled_alike(packed.name, renumber(beside.name) or "", target.family.blocks)
        dtype = INDEX_DTYPE if tensors[0].is_index else header.dtype
        made = replace(packed, name=spelled, parts=(names,))
        found.append(Piece(replace(header, name=spelled, dtype=dtype, shape=packed.shape(target.shapes)), made))
    return found


def _spelled_alike(name: str, other: str, prefix: str) -> str:
    """``name`` without the base-model prefix where ``other`` has none."""
    base = prefix.partition(".")[0] + "."
    return name if other.startswith(base) else name.removeprefix(base)
