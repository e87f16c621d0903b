"""The gates of a decoder: one vector per place whose entries can be switched off, and what each entry costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from secateur.families import Architecture, Block, CanonicalTensor, Kind, Sizes, place_name
from secateur.families.roles import PORTS, dimensions_of

Sharing = Literal["none", "same", "structural"]
"""Which parts of the stream are chosen: each branch its own, one for the model, or that and key/value groups too."""
_STREAM = ("attention_read", "attention_write", "ffn_read", "ffn_write")


@dataclass(frozen=True)
class Gate:
    """A vector of gates.

    Attributes:
        name: what a plan calls the kept entries.
        field: the size it sets (of ``BlockSizes``; ``residual`` of ``Sizes``).
        size: number of entries.
        place: its block; None for the stream of the whole model.
    """

    name: str
    field: str
    size: int
    place: Block = None

    @property
    def kind(self) -> Kind:
        """The kind of units it chooses among."""
        if self.field in ("ffn", "shared"):
            return "ffn"
        return "kv" if self.field == "kv" else "residual"


class Gates:
    """All gates of an architecture and the parameters they stand for.

    Args:
        architecture: the dense one.
        sharing: ``none``: in every block, what attention and FFN read and write of the stream, and the FFN's neurons
            (experts take and give the whole stream); ``same``: one selection of the stream, and the neurons;
            ``structural``: that and the key/value groups.
    """

    def __init__(self, architecture: Architecture, sharing: Sharing) -> None:
        self.architecture, self._sharing = architecture, sharing
        self.gates: dict[str, Gate] = {}
        terms: dict[tuple[tuple[tuple[str, int], ...], int], int] = {}
        tensors = chain.from_iterable(map(architecture.tensors_of, architecture.places))
        for tensor in (tensor for tensor in tensors if not tensor.is_index):
            factors, fixed = [], 1
            shape = architecture.shapes[tensor.name]
            for position, dimension in enumerate(dimensions_of(tensor.role, tensor.kind)):
                found = self.along(tensor, dimension, position)
                if found is None:
                    fixed *= shape[position]
                else:
                    self.gates.setdefault(found.name, found)
                    factors.append((found.name, shape[position] // found.size))
            if factors:
                key = (tuple(factors), fixed)
                terms[key] = terms.get(key, 0) + 1
        self._terms = [(factors, fixed * count) for (factors, fixed), count in terms.items()]
        self.dense = int(self.params({name: gate.size for name, gate in self.gates.items()}))
        """Parameters of all matrices with gates, none closed."""

    def along(self, tensor: CanonicalTensor, dimension: int, position: int) -> Gate | None:
        """The gates along a dimension of a tensor; None where there are none."""
        sizes, axis, block = self.architecture.sizes, tensor.axes[position], tensor.block
        if axis == "ffn":
            middle = "ffn" if tensor.expert is None else f"experts.{tensor.expert}.ffn"
            field = "shared" if tensor.expert == "shared" else "ffn"
            return Gate(f"{place_name(block)}.{middle}", field, sizes.axis(axis, block, tensor.expert), block)
        if self._sharing == "none":
            field = PORTS.get((tensor.role, dimension), "")
            routed = block is not None and sizes.blocks[block].experts and field.startswith("ffn")
            if field not in _STREAM or routed:
                return None
            return Gate(f"{place_name(block)}.{field}", field, sizes.residual, block)
        if axis == "residual":
            return Gate("residual", "residual", sizes.residual)
        if self._sharing == "structural" and block is not None and axis in ("kv", "kv_heads", "heads", "query_heads"):
            return Gate(f"{place_name(block)}.kv", "kv", sizes.blocks[block].kv, block)
        return None

    def params(self, counts: Mapping[str, float | Tensor]) -> float | Tensor:
        """Parameters of all matrices with gates, given the open entries of each: an exact integer for integers."""
        total: float | Tensor = 0
        for factors, fixed in self._terms:
            product: float | Tensor = fixed
            for name, span in factors:
                product = product * counts[name] * span
            total = total + product
        return total

    def unit_costs(self) -> dict[str, float]:
        """Parameters that one entry of each vector stands for, with all others open."""
        full = {name: gate.size for name, gate in self.gates.items()}
        less = {name: self.params({**full, name: gate.size - 1}) for name, gate in self.gates.items()}
        return {name: self.dense - float(left) for name, left in less.items()}

    def sizes(self, counts: Mapping[str, int]) -> Sizes:
        """Sizes with so many open entries; the routed experts of a block share the first's."""
        whole = self.architecture.sizes
        blocks, residual = list(whole.blocks), whole.residual
        for name, gate in reversed(self.gates.items()):
            if gate.place is None:
                residual = counts[name]
            else:  # a branch that reads or writes everything is as the stock class has it
                value = counts[name] % gate.size if gate.field in _STREAM else counts[name]
                change: dict[str, int] = {gate.field: value}
                blocks[gate.place] = replace(blocks[gate.place], **change)  # type: ignore[arg-type]
        return replace(whole, residual=residual, blocks=tuple(blocks))

    def groups(self) -> dict[str, list[str]]:
        """Vectors that keep as many entries each: routed experts of a block, and in one place for all, all FFNs."""
        found: dict[str, list[str]] = {}
        for name, gate in self.gates.items():
            apart = gate.field == "shared" or ".experts." not in name
            found.setdefault(name if apart else f"{place_name(gate.place)}.experts", []).append(name)
        return found


def open_counts(hard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Number of open gates of every vector."""
    return {name: values.sum() for name, values in hard.items()}


def pooled(logits: Mapping[str, Tensor]) -> Tensor:
    """All logits in one ascending list."""
    return torch.cat([values.detach().cpu().double() for values in logits.values()]).sort().values
