"""What only the per-layer layout knows: biases and indices beside matrices of the stock class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from secateur.families.packing import Packed
from secateur.families.roles import BIASES, PORTS, index_kind
from secateur.families.tensors import CanonicalTensor, canonical_name

Held = tuple[Packed, list[CanonicalTensor]]
"""A tensor of a module, and the canonical ones that it holds."""


def is_matrix(packed: Packed, parts: list[CanonicalTensor]) -> bool:
    """Whether a tensor is the weight of a module of its own, with two axes."""
    return packed.name.endswith(".weight") and not packed.stacked and len(parts[0].axes) == 2


def additions(matrices: list[Held]) -> Iterator[Held]:
    """All that could stand beside some matrices, there only at sizes that ask for it (``CanonicalTensor.asked``)."""
    for matrix in matrices:
        yield from _biases(*matrix)
    for matrix in matrices:
        yield from _indices(*matrix)


def _beside(like: Packed, kind: str, parts: Iterable[CanonicalTensor], asked: frozenset[str]) -> Held:
    """Tensors of another kind in the module of a matrix."""
    made = [replace(p, name=canonical_name(p.block, p.role, kind), kind=kind, fixed=None, asked=asked) for p in parts]
    name = f"{like.name.rpartition('.')[0]}.{kind}"
    return Packed(name, (tuple(part.name for part in made),)), made


def _biases(packed: Packed, parts: list[CanonicalTensor]) -> Iterator[Held]:
    """The bias that a block may get; not of an expert."""
    role = parts[0].role
    if role in BIASES and parts[0].expert is None:
        yield _beside(packed, "bias", parts[:1], frozenset({BIASES[role]}))


def _indices(packed: Packed, parts: list[CanonicalTensor]) -> Iterator[Held]:
    """The indices of a matrix that may read or write less of a signal; one for all parts of a module that it reads."""
    for dimension in (0, 1):
        fields = frozenset(PORTS[part.role, dimension] for part in parts if (part.role, dimension) in PORTS)
        if not fields or parts[0].expert is not None or (packed.turn is not None and not dimension):
            continue
        kind = index_kind(parts[0].role, dimension)
        yield _beside(packed, kind, parts if dimension == 0 else parts[:1], fields)
