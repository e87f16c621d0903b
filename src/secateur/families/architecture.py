"""An architecture: a family file applied to one configuration.

It lists every canonical tensor with its axes, every packed tensor of the stock class, and derives the configuration
and the architecture of any other sizes. Built on the meta device: no weight is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from secateur.errors import InternalError, refuse
from secateur.families.additions import additions, is_matrix
from secateur.families.branches import StandIn, gone_modules
from secateur.families.packing import Packed, Shape
from secateur.families.roles import ATTENTION_WRITERS, branches_of
from secateur.families.schema import Entry, Family, holds, load_family
from secateur.families.sizes import BlockSizes, Expert, Sizes
from secateur.families.stock import example_config, meta_model, stock_config
from secateur.families.tensors import Block, CanonicalTensor, canonical_name


class Architecture:
    """A transformer of one family at given sizes.

    Args:
        raw: the content of ``config.json``.
        family: its family; looked up from ``model_type`` when omitted.
        layers: sizes that differ from those of the configuration (the per-layer layout).

    Raises:
        RequestError: unknown architecture, or a configuration the stock class refuses.
    """

    def __init__(self, raw: Mapping[str, Any], family: Family | None = None, layers: Sizes | None = None) -> None:
        self.raw = dict(raw)
        self.origin = family or load_family(str(raw.get("model_type")))
        self.config = stock_config(self.raw)
        self.family = self.origin.of(self.config)
        self.per_layer = layers is not None
        model = meta_model(self.config)
        self.stock_shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        self.buffers = sorted(set(model.state_dict()) - set(self.stock_shapes))
        self._places = {name: self._place(name) for name in self.stock_shapes}
        self.stock_sizes = self._read_sizes()
        self.sizes = layers or self.stock_sizes
        self.tensors: dict[str, CanonicalTensor] = {}
        self.packed: dict[str, Packed] = {}
        self.unmapped: dict[str, Shape] = {}
        for name in self.stock_shapes:
            self._map(name)
        self._say_what_needs_them()
        self._offer()
        self.catalogue = dict(self.tensors)
        self.gone: dict[str, StandIn] = gone_modules(self)
        self._drop()
        if self.sizes.shortcuts:
            self._add_shortcuts()
        self._check_shapes()

    @classmethod
    def example(cls, model_type: str) -> Architecture:
        """A family's own architecture at the sizes that the stock configuration has by default."""
        return cls(example_config(model_type, not load_family(model_type).has_head))

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _size(self, key: str, default: int = 0) -> int:
        name = self.family.sizes.get(key)
        value = getattr(self.config, name, None) if isinstance(name, str) else name
        return default if value is None else int(value)

    def _read_sizes(self) -> Sizes:
        residual, heads = self._size("residual"), self._size("heads")
        if residual <= 0 or heads <= 0:
            refuse("bad-config", "config.json", f"hidden size {residual}, {heads} attention heads")
        kv = self._size("kv", heads)
        if kv <= 0 or heads % kv:
            refuse("bad-config", "config.json", f"{heads} attention heads do not share {kv} key/value heads evenly")
        dense = BlockSizes(self._size("ffn", self.family.defaults.get("ffn", 0) * residual), kv, heads // kv)
        sparse = replace(dense, ffn=self._size("expert_ffn"), experts=self._size("experts"))
        with_experts = {block for block, local in self._places.values() if self._entry(block, local).experts}
        shared = self._shared_width()
        return Sizes(
            residual=residual,
            head=self._size("head", residual // heads),
            vocab=int(self.config.vocab_size),
            positions=next((s[0] for n, s in self.stock_shapes.items() if self._roles(n) == ("positions",)), 0),
            active_experts=self._size("active_experts"),
            tied=self.family.has_head and bool(getattr(self.config, "tie_word_embeddings", False)),
            blocks=tuple(
                replace(sparse, shared=shared.get(i, 0)) if i in with_experts else dense
                for i in range(self._size("blocks"))
            ),
            mean_free=int(self.family.norm == "layer"),
        )

    def _shared_width(self) -> dict[Block, int]:
        """Neurons of the expert that every token visits, of every block that has one, as the stock class builds it."""
        widths: dict[Block, int] = {}
        for name, (block, local) in self._places.items():
            entry = self._entry(block, local)
            if entry.shared and entry.roles == ("down",) and name.endswith("weight"):
                widths[block] = self.stock_shapes[name][0 if self._transposed(entry, block) else 1]
        return widths

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> tuple[Block, str]:
        """Block of a parameter of the stock class, and its name there."""
        prefix = self.family.blocks + "."
        if not name.startswith(prefix):
            return None, name
        number, _, local = name.removeprefix(prefix).partition(".")
        return int(number), local

    def _entry(self, block: Block, local: str) -> Entry:
        """What the family file says of a parameter; an entry without roles where it says nothing."""
        table = self.family.stem if block is None else self.family.block
        module, _, kind = local.rpartition(".")
        found = table.get(module) if kind in ("weight", "bias") else table.get(local)
        return found or Entry(roles=())

    def _roles(self, name: str) -> tuple[str, ...]:
        return self._entry(*self._places[name]).roles

    def _transposed(self, entry: Entry, block: Block) -> bool:
        if entry.transposed is not None:
            return entry.transposed
        return self.family.transposed and block is not None

    def _map(self, name: str) -> None:
        block, local = self._places[name]
        entry, shape = self._entry(block, local), self.stock_shapes[name]
        if not entry.roles:
            self.unmapped[name] = shape
            return
        kind = local.rpartition(".")[2]
        if kind not in ("weight", "bias"):
            kind = entry.kind
        experts: Iterable[Expert] = (None,)
        if entry.experts and block is not None:
            experts = range(self.sizes.blocks[block].experts or 1)  # of an FFN that is gone, to know that it was there
        elif entry.shared:
            experts = ("shared",)
        fixed = shape if len(entry.roles) == 1 and not entry.experts else None
        parts = []
        for expert in experts:
            group = [
                CanonicalTensor(canonical_name(block, role, kind, expert), role, kind, block, expert, fixed)
                for role in entry.roles
            ]
            twice = next((tensor.name for tensor in group if tensor.name in self.tensors), None)
            if twice is not None:
                refuse("family-mismatch", f"{self.family.model_type}: parameter {name}", f"it is a second {twice}")
            self.tensors.update({tensor.name: tensor for tensor in group})
            parts.append(tuple(tensor.name for tensor in group))
        turn = {None: None, "kv": (1, self.sizes.head), "ffn": (0, 1)}[entry.turns]
        self.packed[name] = Packed(name, tuple(parts), entry.experts, self._transposed(entry, block), turn)

    def _say_what_needs_them(self) -> None:
        """Which branches of its block each tensor belongs to."""
        roles: dict[Block, set[str]] = {}
        for tensor in self.tensors.values():
            roles.setdefault(tensor.block, set()).add(tensor.role)
        needed = {
            (place, role): branches_of(role, here)
            for place, here in roles.items()
            if place is not None
            for role in here
        }
        for name, tensor in self.tensors.items():
            if tensor.block is not None:
                self.tensors[name] = replace(tensor, branches=needed[tensor.block, tensor.role])

    def _add(self, packed: Packed, parts: list[CanonicalTensor]) -> None:
        """A tensor that the stock class has not."""
        self.tensors.update({part.name: part for part in parts})
        self.packed[packed.name] = packed
        self._places[packed.name] = self._place(packed.name)

    def _offer(self) -> None:
        """What the per-layer layout may add beside a matrix that has a module of its own."""
        held = [(packed, [self.tensors[part] for part in packed.canonical]) for packed in self.packed.values()]
        for packed, parts in additions([pair for pair in held if is_matrix(*pair)]):
            if parts[0].name not in self.tensors:
                self._add(packed, parts)

    def _drop(self) -> None:
        """Leave out what is not there at these sizes."""
        self.tensors = {name: tensor for name, tensor in self.catalogue.items() if tensor.exists(self.sizes)}
        self.packed = {n: p for n, p in self.packed.items() if all(part in self.tensors for part in p.canonical)}
        self.unmapped = {name: shape for name, shape in self.unmapped.items() if not self.is_gone(name)}
        self.buffers = [name for name in self.buffers if not self.is_gone(name)]

    def is_gone(self, name: str) -> bool:
        """Whether a parameter or buffer of the stock class lies in a module that is not there."""
        return any(name.startswith(f"{module}.") for module in self.gone)

    def _add_shortcuts(self) -> None:
        """The maps between the bases of the stream, beside the modules that write it."""
        blocks = range(len(self.sizes.blocks))
        writers = {(block, role): self.writer_of(role, block) for block in blocks for role in self.shortcut_roles}
        for (block, role), writer in writers.items():
            tensor = CanonicalTensor(canonical_name(block, role, "weight"), role, "weight", block, None)
            self.catalogue[tensor.name] = tensor
            self._add(Packed(f"{writer}.shortcut", ((tensor.name,),)), [tensor])
        del self._by_place, self._roles_by_place  # made when the writers were looked up

    def _check_shapes(self) -> None:
        for name, packed in self.packed.items():
            expected, found = packed.shape(self.shapes), self.stock_shapes.get(name)
            if expected != found and not self.per_layer:
                message = f"the family file says {list(expected)}, the stock class {list(found or ())}"
                refuse("family-mismatch", f"{self.family.model_type}: parameter {name}", message)

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads it."""
        return "AutoModelForCausalLM" if self.family.has_head else "AutoModel"

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every canonical tensor at these sizes."""
        return {name: tensor.shape(self.sizes) for name, tensor in self.tensors.items()}

    @cached_property
    def places(self) -> tuple[Block, ...]:
        """The stem, then every block: the order of every sweep."""
        return (None, *range(len(self.sizes.blocks)))

    @cached_property
    def _by_place(self) -> dict[Block, list[Packed]]:
        tied = canonical_name(None, "head", "weight") if self.sizes.tied else ""
        found: dict[Block, list[Packed]] = {place: [] for place in self.places}
        for name, packed in self.packed.items():
            if tied not in packed.canonical:
                found[self._places[name][0]].append(packed)
        return found

    def packed_of(self, block: Block) -> list[Packed]:
        """Packed tensors of one block, or of the stem (without a tied head)."""
        return self._by_place[block]

    def tensors_of(self, block: Block) -> list[CanonicalTensor]:
        """Canonical tensors of one block, or of the stem (without a tied head)."""
        return [self.tensors[name] for packed in self.packed_of(block) for name in packed.canonical]

    @cached_property
    def _roles_by_place(self) -> dict[Block, frozenset[str]]:
        return {place: frozenset(tensor.role for tensor in self.tensors_of(place)) for place in self.places}

    def roles_of(self, block: Block) -> frozenset[str]:
        """Roles that are present in one place (a tied head apart)."""
        return self._roles_by_place[block]

    @cached_property
    def roles(self) -> frozenset[str]:
        """Roles that are present anywhere."""
        return frozenset(tensor.role for tensor in self.tensors.values())

    def embedding_gain(self, dtype: torch.dtype) -> float:
        """What the stock class multiplies token embeddings by, as far as it depends on the width of the stream.

        Args:
            dtype: the model's, to which the stock class rounds it.
        """
        if not self.family.scaled_embedding:
            return 1.0
        return float(torch.tensor(math.sqrt(self._size("residual")), dtype=dtype))

    @property
    def query_heads(self) -> int:
        """Query heads of a block, the largest number of any."""
        return max((block.kv * block.group for block in self.sizes.blocks), default=0)

    def is_index(self, packed: Packed) -> bool:
        """Whether a packed tensor is an index beside a matrix rather than a parameter."""
        return self.tensors[packed.canonical[0]].is_index

    @property
    def ports(self) -> dict[str, dict[str, list[int]]]:
        """Modules that read or write less of a signal than the stock class: [entries, of how many] by index kind."""
        found: dict[str, dict[str, list[int]]] = {}
        for name, packed in self.packed.items():
            module, _, kind = name.rpartition(".")
            tensors = [self.tensors[part] for part in packed.canonical]
            if self.is_index(packed):
                whole = sum(self.sizes.axis(tensor.axes[0], tensor.block) for tensor in tensors)
                found.setdefault(module, {})[kind] = [packed.shape(self.shapes)[0], whole]
        return found

    def attention_writer(self, block: Block) -> str:
        """The role by which the attention of a block writes the stream."""
        return next(role for role in ATTENTION_WRITERS if role in self.roles_of(block))

    # -- modules ---------------------------------------------------------------------------------------------------

    def module_of(self, role: str, block: Block) -> str:
        """Name of the stock module that holds a role."""
        wanted = canonical_name(block, role, "weight")
        for packed in self.packed_of(block):
            if wanted in packed.canonical:
                return packed.name.removesuffix(".weight")
        raise InternalError("no-role", f"module of role {role!r} in {self.family.model_type}", "there is none")

    def norms_on_stream(self, block: Block) -> list[str]:
        """Roles of the norms that read the stream in one block, in the order of the forward pass.

        Of two that read the same stream side by side, the first.
        """
        if self.parallel:
            return ["attention_norm"]
        return [role for role in ("attention_norm", "ffn_norm") if role in self.roles_of(block)]

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN of a block read the same stream and add to it together."""
        return self.family.parallel is not None and holds(self.family.parallel, self.config)

    @property
    def shortcut_roles(self) -> list[str]:
        """The changes of basis in a block: behind the attention and behind the FFN, or one behind both."""
        return ["attention_shortcut"] if self.parallel else ["attention_shortcut", "ffn_shortcut"]

    def writer_of(self, role: str, block: Block) -> str:
        """The module whose output the stream takes up where a shortcut is."""
        if role == "attention_shortcut":
            return self.module_of(self.attention_writer(block), block)
        for packed in self.packed_of(block):
            written = self.tensors[packed.canonical[0]]
            if written.role == "down" and written.kind == "weight":
                module = packed.name.removesuffix(".weight")
                # experts are weighed and added up by the module around them
                return module if written.expert is None else module.rsplit(".", 2)[0]
        raise InternalError("no-role", f"the writer of the FFN in block {block}", "there is none")
