"""Spaces: sets of interchangeable units, and where each lies in the tensors of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from secateur.families import Architecture, Block, CanonicalTensor, Expert, Kind, Sizes, canonical_name
from secateur.families.roles import TABLES
from secateur.families.sizes import KINDS_OF_AXIS

__all__ = [
    "KINDS",
    "BlockView",
    "Kind",
    "Member",
    "Space",
    "all_spaces",
    "columns_of_values",
    "positions",
    "space_name",
    "spaces_of",
]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Space:
    """Interchangeable units of one kind.

    Attributes:
        name: ``blocks.I.ffn``, ``blocks.I.experts.E.ffn``, ``blocks.I.experts``, ``blocks.I.kv``, ``blocks.I.heads``,
            ``residual`` or ``blocks``.
        kind: what its units are: FFN neurons, routed experts, KV-head groups with their query heads, query heads where
            one key/value head serves all, residual dimensions, blocks.
        size: number of units.
        place: the block it lies in; None for those that span the model.
        expert: the expert it lies in, if any.
    """

    name: str
    kind: Kind
    size: int
    place: Block = None
    expert: Expert = None


def space_name(kind: str, tensor: CanonicalTensor) -> str:
    """Name of the space of ``kind`` that a tensor's axis belongs to."""
    if kind == "residual":
        return kind
    place = f"blocks.{tensor.block}"
    return f"{place}.{kind}" if tensor.expert is None else f"{place}.experts.{tensor.expert}.{kind}"


def spaces_of(sizes: Sizes, kind: Kind, place: Block = None) -> list[Space]:
    """Spaces of one kind: those of the block ``place``, or the one that spans the model."""
    if kind == "residual":
        return [Space(kind, kind, sizes.residual)]
    if kind == "blocks":
        return [Space(kind, kind, len(sizes.blocks))]
    if place is None:
        return []
    block = sizes.blocks[place]
    if kind == "heads":
        return [Space(f"blocks.{place}.heads", kind, block.group, place)] if block.kv == 1 else []
    if kind == "experts":
        return [Space(f"blocks.{place}.experts", kind, block.experts, place)] if block.experts else []
    if not block.has("attention" if kind == "kv" else "ffn"):
        return []
    if kind == "kv":
        return [Space(f"blocks.{place}.kv", kind, block.kv, place)]
    if not block.experts:
        return [Space(f"blocks.{place}.ffn", kind, block.ffn, place)]
    experts: list[tuple[Expert, int]] = [(e, block.ffn) for e in range(block.experts)]
    if block.shared:
        experts.append(("shared", block.shared))
    return [Space(f"blocks.{place}.experts.{e}.ffn", kind, size, place, e) for e, size in experts]


def all_spaces(sizes: Sizes, kind: Kind) -> list[Space]:
    """All spaces of a kind, in the order of the blocks."""
    if kind in ("residual", "blocks"):
        return spaces_of(sizes, kind)
    return [space for place in range(len(sizes.blocks)) for space in spaces_of(sizes, kind, place)]


def positions(units: Tensor, span: int) -> Tensor:
    """Positions along an axis that units cover: unit u covers [u * span, (u + 1) * span)."""
    return (units[:, None] * span + torch.arange(span, device=units.device)).flatten()


def columns_of_values(positions: Tensor, head: int, group: int) -> Tensor:
    """Columns of ``out``, ascending, that read some rows of ``v``: each is read once by every query head of its group.

    Args:
        positions: rows of ``v``.
        head: dimensions of a head.
        group: query heads of a group.
    """
    firsts = positions // head * group * head + positions % head  # of the first query head of each group
    return (firsts[:, None] + head * torch.arange(group)).flatten().sort().values


@dataclass(frozen=True)
class Member:
    """One tensor that a space runs through: unit u covers [u * span, (u + 1) * span) of ``axis``.

    Of the tensors that lie in single experts, those of a role are one member of the space of experts: each expert's
    weights are a row of ``values``, and ``tensor`` is that of the first.
    """

    tensor: CanonicalTensor
    values: Tensor
    axis: int
    span: int
    in_experts: bool = False

    @property
    def writes(self) -> bool:
        """Whether the space's signal comes out of this tensor (rather than being read by it); that of experts is what
        the router gives."""
        if self.in_experts:
            return False
        if self.tensor.role in TABLES:
            return self.axis == 1
        return self.axis == 0


@dataclass(frozen=True)
class Reader:
    """The matrix that reads the units of a space.

    Attributes:
        name: its canonical name.
        key: what the evidence calls its inputs: its role, ``experts.E.ROLE`` in an expert.
        values: [out, units * span].
        span: its columns that one unit covers.
    """

    name: str
    key: str
    values: Tensor
    span: int


_READERS: dict[Kind, str] = {"ffn": "down", "kv": "out", "heads": "out"}


class BlockView:
    """What a method sees of one place: its canonical tensors and its spaces.

    Args:
        architecture: the dense architecture.
        place: block index, or None for the stem.
        tensors: canonical tensors of the place, by name.
        dense: reads those of the dense model, where ``tensors`` may be edited already.
    """

    def __init__(
        self,
        architecture: Architecture,
        place: Block,
        tensors: Mapping[str, Tensor],
        dense: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.architecture, self.place, self.tensors = architecture, place, tensors
        self._dense = dense

    @cached_property
    def dense(self) -> Mapping[str, Tensor]:
        """The tensors of the dense model."""
        return self.tensors if self._dense is None else self._dense()

    def spaces(self, kind: Kind) -> list[Space]:
        return spaces_of(self.architecture.sizes, kind, self.place)

    def matrix(self, role: str, expert: Expert = None) -> Tensor | None:
        """The [out, in] matrix of a role, None where the block has none."""
        return self.tensors.get(canonical_name(self.place, role, "weight", expert))

    def reader(self, space: Space) -> Reader:
        """The matrix of this place that reads the units of a space of FFN neurons or heads."""
        role = _READERS[space.kind]
        name = canonical_name(self.place, role, "weight", space.expert)
        key = role if space.expert is None else f"experts.{space.expert}.{role}"
        values = self.tensors[name]
        return Reader(name, key, values, values.shape[1] // space.size)

    def members(self, space: Space) -> Iterator[Member]:
        """Every tensor of this place that the space runs through."""
        sizes = self.architecture.sizes
        for name, values in self.tensors.items():
            tensor = self.architecture.tensors[name]
            if tensor.is_index:
                continue
            for index, axis in enumerate(tensor.axes):
                if space.kind in KINDS_OF_AXIS.get(axis, ()) and space_name(space.kind, tensor) == space.name:
                    yield Member(tensor, values, index, sizes.span(axis, space.kind, tensor.block))
        if space.kind == "experts":
            yield from self._in_experts()

    def _in_experts(self) -> Iterator[Member]:
        routed = [t for t in map(self.architecture.tensors.__getitem__, self.tensors) if isinstance(t.expert, int)]
        for first in (tensor for tensor in routed if tensor.expert == 0):
            alike = [t for t in routed if (t.role, t.kind) == (first.role, first.kind)]
            rows = [self.tensors[t.name].flatten() for t in sorted(alike, key=_number)]
            yield Member(first, torch.stack(rows), 0, 1, in_experts=True)


def _number(tensor: CanonicalTensor) -> int:
    return tensor.expert if isinstance(tensor.expert, int) else -1
