"""Exact costs of a decoder as functions of its sizes: parameters, bytes, FLOPs, key/value cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from secateur.families import Architecture, Block, CanonicalTensor, Sizes, canonical_name
from secateur.families.roles import MATRICES, SHORTCUTS, TABLES

_HEAD = canonical_name(None, "head", "weight")
_INDEX_BYTES = 4


@dataclass(frozen=True)
class _Sort:
    """Tensors of one place that always have the same size."""

    tensor: CanonicalTensor
    routed: bool
    is_table: bool
    itemsize: int

    @classmethod
    def of(cls, tensor: CanonicalTensor, itemsize: int) -> _Sort:
        routed = isinstance(tensor.expert, int)
        is_table = tensor.role not in MATRICES or tensor.role in TABLES or len(tensor.axes) == 1
        return cls(replace(tensor, name="", expert=0 if routed else tensor.expert), routed, is_table, itemsize)


class Costs:
    """Costs of one architecture at any sizes.

    Args:
        architecture: lists the tensors.
        itemsizes: bytes of an element of each canonical tensor on disk.
        passthrough_bytes: bytes on disk that no cut changes (buffers, headers).
        passthrough_params: parameters of the stock model that the family file does not describe.
        repeats_head: whether the files hold a head beside the embedding it is tied to.
    """

    def __init__(
        self,
        architecture: Architecture,
        itemsizes: Mapping[str, int],
        passthrough_bytes: int = 0,
        passthrough_params: int = 0,
        repeats_head: bool = False,
    ) -> None:
        self._repeats_head, self._has_head = repeats_head, architecture.family.has_head
        self._fixed_bytes, self._fixed_params = passthrough_bytes, passthrough_params
        self._shortcut_roles = architecture.shortcut_roles
        self._inventory: dict[Block, Counter[_Sort]] = {place: Counter() for place in architecture.places}
        self._experts = [block.experts or 1 for block in architecture.sizes.blocks]
        widest = max(itemsizes.values())
        for tensor in architecture.catalogue.values():
            if tensor.name != _HEAD and tensor.role not in SHORTCUTS:
                beside = itemsizes.get(canonical_name(tensor.block, tensor.role, "weight"), widest)  # of a new bias
                self._inventory[tensor.block][_Sort.of(tensor, itemsizes.get(tensor.name, beside))] += 1
        self._latent = {  # attention of low rank keeps what its keys and values are made of
            t.block: architecture.shapes[t.name][0]
            for t in architecture.tensors.values()
            if (t.role, t.kind) == ("latent_kv", "weight")
        }
        self.itemsize = itemsizes.get(_HEAD, itemsizes[canonical_name(None, "embedding", "weight")])
        self.params = cache(self._params)
        self.bytes = cache(self._bytes)
        self.flops = cache(self._flops)

    def _sum(self, sizes: Sizes, place: Block, weigh: str) -> float:
        total, visits = 0.0, weigh == "flops"
        for sort, count in self._inventory[place].items():
            if not sort.tensor.exists(sizes) or (sort.tensor.is_index and weigh != "bytes"):
                continue
            amount = count * prod(sort.tensor.shape(sizes))
            if weigh == "bytes":
                amount *= _INDEX_BYTES if sort.tensor.is_index else sort.itemsize
            elif visits and sort.is_table:
                continue
            if sort.routed and place is not None:
                experts = sizes.blocks[place].experts
                amount = amount // self._experts[place] * (min(sizes.active_experts, experts) if visits else experts)
            total += amount
        return total + self._shortcuts(sizes, place, weigh)

    def _shortcuts(self, sizes: Sizes, place: Block, weigh: str) -> float:
        """The changes of basis in a block: triangles on disk, squares when they run."""
        if place is None or not sizes.shortcuts:
            return 0
        total = 0
        for role in self._shortcut_roles:
            before, behind = sizes.change_of_basis(role, place)
            if weigh == "flops":
                total += (before + sizes.mean_free) * (max(before, behind) + sizes.mean_free)
            else:
                total += sum(min(row + 1, behind) for row in range(before))
        return total * (self.itemsize if weigh == "bytes" else 1)

    def _total(self, sizes: Sizes, weigh: str) -> int:
        places: list[Block] = [None, *range(len(sizes.blocks))]
        head = sizes.vocab * sizes.width("stem_read", None)
        extra = head * (self.itemsize if weigh == "bytes" else 1)
        shared = sizes.tied and not (weigh == "bytes" and self._repeats_head)
        if not self._has_head or (shared and weigh != "flops"):
            extra = 0
        return round(sum(self._sum(sizes, place, weigh) for place in places)) + extra

    def _params(self, sizes: Sizes) -> int:
        """Parameters as counted from a file: shared storage once."""
        return self._total(sizes, "params") + self._fixed_params

    def block_params(self, sizes: Sizes) -> int:
        """Parameters inside the blocks."""
        return round(sum(self._sum(sizes, place, "params") for place in range(len(sizes.blocks))))

    def _bytes(self, sizes: Sizes) -> int:
        """Bytes of the safetensors files (headers as in the source)."""
        return self._total(sizes, "bytes") + self._fixed_bytes

    def _flops(self, sizes: Sizes) -> int:
        """FLOPs of a forward pass per token: two per multiply-add of every matrix a token meets, head included.

        The products of queries, keys and values with each other, which grow with the context, are not included.
        """
        return 2 * self._total(sizes, "flops")

    def kv_bytes(self, sizes: Sizes) -> int:
        """Bytes of key/value cache per token, in the data type of the weights.

        The stock cache holds whole heads, also where queries, keys or values are narrower. A model without a head
        decodes nothing and needs none.
        """
        if not self._has_head:
            return 0
        cached = (
            self._latent.get(i) or 2 * block.kv * sizes.head
            for i, block in enumerate(sizes.blocks)
            if block.has("attention")
        )
        return self.itemsize * sum(cached)
