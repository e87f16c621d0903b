"""An architecture: a family file applied to one configuration.

It lists every canonical tensor with its axes, every packed tensor of the stock class, and derives the configuration
and the architecture of any other sizes. Built on the meta device: no weight is allocated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from secateur.errors import InternalError, refuse
from secateur.families.packing import Packed, Shape
from secateur.families.roles import axes_of
from secateur.families.schema import Experts, Family, load_family
from secateur.families.sizes import BlockSizes, Sizes
from secateur.families.stock import meta_model, stock_config

Block = int | None
"""Index of a decoder block; None is the stem (embeddings, final norm, head)."""


@dataclass(frozen=True)
class CanonicalTensor:
    """A matrix, bias or norm weight in its canonical place.

    ``name`` is ``stem.ROLE.KIND``, ``blocks.I.ROLE.KIND`` or ``blocks.I.experts.E.ROLE.KIND``.
    """

    name: str
    role: str
    kind: str
    block: Block
    expert: int | None

    @property
    def axes(self) -> tuple[str, ...]:
        return axes_of(self.role, self.kind)


def canonical_name(block: Block, role: str, kind: str, expert: int | None = None) -> str:
    place = "stem" if block is None else f"blocks.{block}"
    return f"{place}.{role}.{kind}" if expert is None else f"{place}.experts.{expert}.{role}.{kind}"


class Architecture:
    """A decoder of one family at given sizes.

    Args:
        raw: the content of ``config.json``.
        family: its family; looked up from ``model_type`` when omitted.

    Raises:
        RequestError: unknown architecture, or a configuration the stock class refuses.
    """

    def __init__(self, raw: Mapping[str, Any], family: Family | None = None) -> None:
        self.raw = dict(raw)
        self.family = family or load_family(str(raw.get("model_type")))
        self.config = stock_config(self.raw)
        self.sizes = self._read_sizes()
        self.tensors: dict[str, CanonicalTensor] = {}
        self.packed: dict[str, Packed] = {}
        self.unmapped: dict[str, Shape] = {}
        self._block_of: dict[str, Block] = {}
        self._stock_shapes: dict[str, Shape] = {}
        self._map_parameters()

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _size(self, key: str, default: int) -> int:
        name = self.family.sizes.get(key)
        value = getattr(self.config, name, None) if name else None
        return default if value is None else int(value)

    def _read_sizes(self) -> Sizes:
        residual, heads = self._size("residual", 0), self._size("heads", 0)
        if residual <= 0 or heads <= 0:
            refuse("bad-config", "config.json", f"hidden size {residual}, {heads} attention heads")
        kv = self._size("kv", heads)
        if kv <= 0 or heads % kv:
            refuse("bad-config", "config.json", f"{heads} attention heads do not share {kv} key/value heads evenly")
        ffn = self._size("ffn", self.family.defaults.get("ffn", 0) * residual)
        return Sizes(
            residual=residual,
            heads_per_kv=heads // kv,
            head=self._size("head", residual // heads),
            vocab=int(self.config.vocab_size),
            positions=0,
            experts=self._size("experts", 0),
            active_experts=self._size("active_experts", 0),
            tied=bool(getattr(self.config, "tie_word_embeddings", False)),
            blocks=(BlockSizes(ffn=ffn, kv=kv),) * self._size("blocks", 0),
        )

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _map_parameters(self) -> None:
        prefix = self.family.blocks + "."
        for name, parameter in meta_model(self.config).named_parameters(remove_duplicate=False):
            shape = tuple(parameter.shape)
            if name.startswith(prefix):
                number, _, local = name.removeprefix(prefix).partition(".")
                self._map(name, local, int(number), self.family.block, shape)
            else:
                self._map(name, name, None, self.family.stem, shape)
        for name, packed in self.packed.items():
            expected, found = packed.shape(self.shapes), self._stock_shapes[name]
            if expected != found:
                message = f"the family file says {list(expected)}, the stock class {list(found)}"
                refuse("family-mismatch", f"{self.family.model_type}: parameter {name}", message)

    def _map(self, name: str, local: str, block: Block, table: Mapping[str, Any], shape: Shape) -> None:
        module, _, kind = local.rpartition(".")
        entry = table.get(module) if kind in ("weight", "bias") else table.get(local)
        self._stock_shapes[name] = shape
        if entry is None:
            self.unmapped[name] = shape
            return
        stacked = isinstance(entry, Experts)
        roles = entry.experts if isinstance(entry, Experts) else (entry,) if isinstance(entry, str) else entry
        kind = "weight" if stacked else kind
        experts: Iterable[int | None] = range(self.sizes.experts) if stacked else (None,)
        parts = []
        for expert in experts:
            group = [CanonicalTensor(canonical_name(block, r, kind, expert), r, kind, block, expert) for r in roles]
            self.tensors.update({tensor.name: tensor for tensor in group})
            parts.append(tuple(tensor.name for tensor in group))
        if roles == ("positions",):
            self.sizes = replace(self.sizes, positions=shape[0])
        transposed = self.family.transposed and block is not None
        self.packed[name] = Packed(name, tuple(parts), stacked, transposed)
        self._block_of[name] = block

    def shape(self, tensor: CanonicalTensor) -> Shape:
        """Shape of a canonical tensor at these sizes."""
        return tuple(self.sizes.axis(axis, tensor.block) for axis in tensor.axes)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: self.shape(tensor) for name, tensor in self.tensors.items()}

    @cached_property
    def places(self) -> tuple[Block, ...]:
        """The stem, then every block: the order of every sweep."""
        return (None, *range(len(self.sizes.blocks)))

    def packed_of(self, block: Block) -> list[Packed]:
        """Packed tensors of one block, or of the stem (without a tied head)."""
        tied = canonical_name(None, "head", "weight") if self.sizes.tied else ""
        return [p for n, p in self.packed.items() if self._block_of[n] == block and tied not in p.canonical]

    def tensors_of(self, block: Block) -> list[CanonicalTensor]:
        """Canonical tensors of one block, or of the stem (without a tied head)."""
        return [self.tensors[name] for packed in self.packed_of(block) for name in packed.canonical]

    def module_of(self, role: str, block: Block) -> str:
        """Name of the stock module that holds a role."""
        wanted = canonical_name(block, role, "weight")
        for name, packed in self.packed.items():
            if wanted in packed.canonical:
                return name.removesuffix(".weight")
        raise InternalError("no-role", f"module of role {role!r} in {self.family.model_type}", "there is none")

    # -- other sizes -----------------------------------------------------------------------------------------------

    def problems(self, sizes: Sizes, itemsize: int) -> list[str]:
        """Why the stock class does not admit ``sizes`` (empty: it does).

        Args:
            itemsize: bytes of a weight, for row alignment.
        """
        found = []
        for kind in ("residual", "ffn", "kv", "blocks"):
            if sizes.uniform(kind) is None:
                found.append(f"the native layout wants one {kind} size for all blocks")
            elif sizes.uniform(kind) != self.sizes.uniform(kind):
                found += self.refusals(kind)
        for rule in self.family.constraints:
            width = sizes.uniform(rule.size) or 0
            changed = sizes != self.sizes
            divisor = _heads(sizes) if rule.multiple_of else -(-(rule.multiple_of_bytes or 1) // itemsize)
            if changed and width % divisor:
                found.append(f"{rule.size} {width} is not a multiple of {divisor}: {rule.why}")
        return found

    def refusals(self, kind: str) -> list[str]:
        """Why the native layout cannot change ``kind`` at all (empty: it can)."""
        reasons = [
            rule.why
            for rule in self.family.fixed
            if rule.size == kind and (rule.when is None or getattr(self.config, rule.when, False))
        ]
        if kind == "residual" and self.unmapped:
            reasons.append(f"the family file does not describe {', '.join(sorted(self.unmapped))}")
        return reasons

    def native(self, kind: str) -> tuple[str, str]:
        """What the native layout makes of a cut of ``kind`` (exact, exact with 1 extra dimension, refused), and why."""
        reasons = self.refusals(kind)
        if reasons:
            return "refused", "; ".join(reasons)
        concerns = {"kv": "heads"}.get(kind, kind)
        limits = [rule.why for rule in self.family.constraints if concerns in (rule.size, rule.multiple_of)]
        spare = kind == "residual" and self.family.norm == "layer"
        return "exact with 1 extra dimension" if spare else "exact", "; ".join(limits)

    def resized(self, sizes: Sizes, kept_blocks: Iterable[int] | None = None) -> Architecture:
        """The architecture at other sizes, through a rewritten stock configuration.

        Args:
            sizes: new sizes, uniform over the blocks.
            kept_blocks: surviving blocks in order, for a depth cut.
        """
        raw = copy.deepcopy(self.raw)
        depth = len(self.sizes.blocks)
        kept = list(range(depth)) if kept_blocks is None else list(kept_blocks)
        wanted = {
            "residual": sizes.residual,
            "ffn": sizes.blocks[0].ffn if sizes.blocks else 0,
            "kv": sizes.blocks[0].kv if sizes.blocks else 0,
            "heads": _heads(sizes),
            "head": sizes.head,
            "blocks": len(sizes.blocks),
        }
        current = {
            "residual": self.sizes.residual,
            "ffn": self.sizes.blocks[0].ffn,
            "kv": self.sizes.blocks[0].kv,
            "heads": _heads(self.sizes),
            "blocks": depth,
        }
        for key, value in wanted.items():
            name = self.family.sizes.get(key)
            if name and (key == "head" or value != current[key]):
                raw[name] = value
        if "word_embed_proj_dim" in raw and sizes.residual != self.sizes.residual:
            raw["word_embed_proj_dim"] = sizes.residual
        if sizes.tied != self.sizes.tied:
            raw["tie_word_embeddings"] = sizes.tied
        if len(kept) != depth:
            for name, value in self.config.to_dict().items():
                # lists over the layers, also those the class derives from their indices, follow the survivors
                if isinstance(value, list) and len(value) == depth:
                    raw[name] = [value[i] for i in kept]
        return Architecture(raw, self.family)


def _heads(sizes: Sizes) -> int:
    return (sizes.blocks[0].kv if sizes.blocks else 0) * sizes.heads_per_kv
