"""Single weights as units: the matrices they lie in, and the signals that these read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import groupby
from typing import Final, Literal

from secateur.errors import refuse
from secateur.families import Architecture, Block, CanonicalTensor, canonical_name
from secateur.families.roles import MATRICES, branch_of

Part = Literal["all", "attention", "ffn", "experts"]
PARTS: Final = "which matrices of the blocks: all, attention, ffn or those of the routed experts"

INPUTS: Final = "inputs"
"""In the name of evidence: all distinct inputs of the matrices of a block."""

_SAME_INPUT: Final = {"k": "q", "v": "q", "latent_kv": "q", "up": "gate"}
"""Roles that read what another reads, where that is there."""
_CHOICES: Final = ("router", "shared_router", "sinks")
"""Matrices of a block that choose between others: too few weights for what each does."""


def matrices_of(architecture: Architecture, place: Block, part: Part = "all") -> list[CanonicalTensor]:
    """The matrices of a block whose weights can go one by one; none of the stem. ``experts`` are the routed ones.

    Embeddings, head, norms, biases and what chooses between experts stay whole.
    """
    if place is None:
        return []
    return [
        tensor
        for tensor in architecture.tensors_of(place)
        if tensor.kind == "weight"
        and tensor.role in MATRICES
        and tensor.role not in _CHOICES
        and len(tensor.axes) == 2
        and part in ("all", branch_of(tensor.role), "experts" if isinstance(tensor.expert, int) else None)
    ]


def all_matrices(architecture: Architecture, part: Part = "all") -> list[CanonicalTensor]:
    """Those of all blocks, in order.

    Raises:
        RequestError: there are none of that part.
    """
    found = [tensor for place in architecture.places for tensor in matrices_of(architecture, place, part)]
    if not found:
        refuse("bad-option", f"part={part}", "this model has no such matrices", "leave part out")
    return found


def input_key(architecture: Architecture, tensor: CanonicalTensor) -> str:
    """What evidence calls the inputs of a matrix: a role, ``experts.E.ROLE`` in an expert; matrices may share it."""
    other = _SAME_INPUT.get(tensor.role, "")
    there = canonical_name(tensor.block, other, "weight", tensor.expert) in architecture.tensors
    role = other if there else tensor.role
    return role if tensor.expert is None else f"experts.{tensor.expert}.{role}"


def input_roles(architecture: Architecture, place: Block) -> list[str]:
    """The roles at which all distinct inputs of a block's matrices can be seen."""
    keys = (input_key(architecture, tensor) for tensor in matrices_of(architecture, place))
    return list(dict.fromkeys(key.rpartition(".")[2] for key in keys))


def every_input(architecture: Architecture, place: Block, wanted: Collection[str]) -> frozenset[str]:
    """Names of evidence with ``inputs.KIND`` spelled out: that kind at every distinct input of the block's matrices."""
    found: set[str] = set()
    for name in wanted:
        group, _, kind = name.rpartition(".")
        found |= {f"{role}.{kind}" for role in input_roles(architecture, place)} if group == INPUTS else {name}
    return frozenset(found)


def block_of(name: str) -> int:
    """The block of a canonical name."""
    return int(name.split(".")[1])


def units_of(names: Iterable[str], unit: Literal["block", "matrix"]) -> list[list[str]]:
    """Names of matrices, block by block or each alone."""
    if unit == "matrix":
        return [[name] for name in names]
    return [list(group) for _, group in groupby(names, key=block_of)]
