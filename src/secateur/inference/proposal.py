"""Propose a family: which module plays which role, from names, shapes and what modules read from one another.

A proposal is a guess. What it gets wrong, the self-check (:mod:`secateur.inference.selfcheck`) finds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from secateur.errors import RequestError, refuse
from secateur.families.packing import Shape
from secateur.inference.anatomy import Anatomy, same
from secateur.inference.measures import Measures, attention_roles, is_attention
from secateur.inference.specimen import UNKNOWN, Raw, Specimen

Table = dict[str, dict[str, Any]]
_GATE: Final = re.compile(r"gate|w1$|fc_1$|wi_0$|linear$")
_READERS: Final = frozenset(("q", "k", "v", "gate", "up", "router", "shared_router"))
_DOWN: Final = re.compile(r"down|w2|out|c_proj|fc2")


@dataclass
class Proposal:
    """Everything of a family but what only the self-check can tell.

    Attributes:
        raw: the fields of :class:`secateur.families.schema.Family`.
        small: the configuration of the small model.
        anatomy: the small model.
        fused: modules whose parts may take turns, with the turns to try.
        notes: why a kind of space cannot be cut, as far as it shows already.
        other: configuration of another small model, different in every size.
    """

    raw: dict[str, Any]
    small: Raw
    other: Raw
    anatomy: Anatomy
    fused: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def propose(specimen: Specimen) -> Proposal:
    """A family for a specimen.

    Raises:
        RequestError: no small model of the class runs, or it is no chain of causal blocks.
    """
    measures = Measures(specimen)
    anatomy = _small_model(specimen, measures)
    asked = f"architecture {specimen.model_type!r}"
    if not anatomy.chained:
        refuse(UNKNOWN, asked, "its blocks do not read one from the other")
    if not anatomy.causal:
        refuse(UNKNOWN, asked, "its tokens see those after them")
    return _Proposer(specimen, measures, anatomy).proposal()


def _small_model(specimen: Specimen, measures: Measures) -> Anatomy:
    last = ""
    for small in measures.small_configurations():
        try:
            return Anatomy(small, specimen.blocks)
        except RequestError as error:
            last = error.found
        except Exception as error:  # a stock class fails on odd sizes in many ways
            last = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    refuse(UNKNOWN, f"architecture {specimen.model_type!r}", f"no small model of its class runs ({last})")


class _Proposer:
    def __init__(self, specimen: Specimen, measures: Measures, anatomy: Anatomy) -> None:
        self.specimen, self.measures, self.anatomy = specimen, measures, anatomy
        self.width = int(anatomy.raw[specimen.width_key])
        self.block: Table = {}
        self.stem: Table = {}
        self.fused: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.kinds: set[tuple[str, float]] = set()

    # -- names -----------------------------------------------------------------------------------------------------

    def _of_blocks(self) -> Iterator[tuple[int, str, str, Shape]]:
        """Block, module in it, leaf and shape of every parameter inside the blocks."""
        for name, shape in self.anatomy.shapes.items():
            if name.startswith(self.specimen.blocks + "."):
                number, _, local = name.removeprefix(self.specimen.blocks + ".").partition(".")
                module, _, leaf = local.rpartition(".")
                yield int(number), module, leaf, shape

    def _full(self, block: int, module: str) -> str:
        return f"{self.specimen.blocks}.{block}.{module}"

    # -- the whole -------------------------------------------------------------------------------------------------

    def proposal(self) -> Proposal:
        self._attention()
        sizes = self._ffn()
        self._norms()
        self._stem()
        spec, measures = self.specimen, self.measures
        sizes |= {"residual": spec.width_key, "heads": spec.heads_key}
        sizes["blocks"] = spec.depth_key or spec.depth
        if measures.head_key is not None:
            sizes["head"] = measures.head_key
        if spec.groups_key is not None and spec.short[spec.groups_key] == measures.groups:
            sizes["kv"] = spec.groups_key
        elif measures.groups != measures.heads:
            sizes["kv"] = measures.groups
        if len(self.kinds) > 1:
            self.notes["residual"] = "its norms on the stream are of different kinds"
        kind, offset = min(self.kinds, default=("rms", 0.0))
        transposed = {name for name, entry in self.block.items() if entry.get("transposed")}
        matrices = {name for name, entry in self.block.items() if "norm" not in entry["roles"][0]}
        every = bool(matrices) and transposed == matrices
        for entry in self.block.values():
            if every or not entry.get("transposed"):
                entry.pop("transposed", None)
        raw = {
            "model_type": spec.model_type,
            "blocks": spec.blocks,
            "norm": kind,
            "norm_offset": offset,
            "scaled_embedding": self._scaled(),
            "parallel": {} if self._parallel() else None,
            "transposed": every,
            "stem": self.stem,
            "block": self.block,
            "sizes": sizes,
        }
        defaults = self._defaults(sizes)
        if defaults:
            raw["defaults"] = defaults
        return Proposal(
            raw, self.anatomy.raw, measures.other_small(self.anatomy.raw), self.anatomy, self.fused, self.notes
        )

    def _defaults(self, sizes: dict[str, Any]) -> dict[str, int]:
        """What the FFN's width is, times the stream's, where no key says so."""
        dense = [
            name
            for name, entry in self.block.items()
            if entry["roles"] == ["down"] and not entry.get("experts") and not entry.get("shared")
        ]
        if self.specimen.short.get(sizes.get("ffn", "")) is None and len(dense) == 1:
            (local,) = dense
            sides = self.measures.in_blocks[f"{local}.weight"]
            inner = sides[0] if sides[1] == self.measures.width else sides[1]
            if inner % self.measures.width == 0:
                return {"ffn": inner // self.measures.width}
        return {}

    def _roles(self) -> set[str]:
        return {role for entry in self.block.values() for role in entry["roles"]}

    # -- attention -------------------------------------------------------------------------------------------------

    def _attention(self) -> None:
        modules = {
            module: block
            for block, module, leaf, shape in self._of_blocks()
            if leaf == "weight" and len(shape) == 2 and is_attention(module) and self._is_matrix(block, module)
        }
        for local, roles in attention_roles(modules).items():
            self.block[local] = {"roles": list(roles), "transposed": self._transposed(modules[local], local)}
            if len(roles) > 1:
                self.fused[local] = "kv"
        if not attention_roles(modules):
            self.notes["kv"] = "its queries, keys and values are not found"

    def _is_matrix(self, block: int, module: str) -> bool:
        """Whether a module is a matrix rather than a norm with a weight for every head."""
        return self._full(block, module) not in self._all_norms

    @property
    def _all_norms(self) -> set[str]:
        return set(self.anatomy.norms())

    def _transposed(self, block: int, module: str) -> bool:
        return self.anatomy.transposed(self._full(block, module))

    # -- FFN -------------------------------------------------------------------------------------------------------

    def _ffn(self) -> dict[str, Any]:
        """Roles of the FFN's and the experts' parameters; returns the keys of their sizes."""
        inner_of = {int(self.anatomy.raw[k]): k for k in self.measures.inner_keys if self.anatomy.raw.get(k)}
        sizes: dict[str, Any] = {}
        stacked = {block for block, _, _, shape in self._of_blocks() if len(shape) == 3}
        groups: dict[bool, dict[str, tuple[int, Shape]]] = {False: {}, True: {}}
        experts: dict[str, tuple[int, Shape]] = {}
        for block, module, leaf, shape in self._of_blocks():
            local = f"{module}.{leaf}"
            if is_attention(module) or module in self.block:
                continue
            if len(shape) == 3:
                experts.setdefault(local, (block, shape))
            elif len(shape) == 2 and leaf == "weight" and self._is_matrix(block, module):
                groups[block in stacked].setdefault(module, (block, shape))
        count = next((shape[0] for _, shape in experts.values()), 0)
        for beside, modules in groups.items():
            inner = self._dense(modules, beside, count)
            if inner is not None:
                key = inner_of.get(inner)
                if key is not None:
                    sizes["shared" if beside else "ffn"] = key
                elif not beside and 0 in self.measures.inner_keys.values():
                    sizes["ffn"] = next(iter(self.measures.inner_keys))
        if experts:
            inner = self._stacked(experts)
            if inner in inner_of:
                sizes["expert_ffn"] = inner_of[inner]
            if self.measures.experts_key is not None:
                sizes["experts"] = self.measures.experts_key
            else:
                sizes["experts"] = count
            if self.specimen.active_key is not None:
                sizes["active_experts"] = self.specimen.active_key
        if "down" not in self._roles():
            self.notes["ffn"] = "its FFN is not found"
        return sizes

    def _dense(self, modules: dict[str, tuple[int, Shape]], beside: bool, experts: int) -> int | None:
        """Readers and writers of a dense FFN, or of the expert that every token visits; returns its width."""
        readers: dict[str, int] = {}
        writers: dict[str, int] = {}
        turned = {name: self._transposed(block, name) for name, (block, _) in modules.items()}
        for name, (_, shape) in modules.items():
            rows, columns = shape[::-1] if turned[name] else shape
            if columns == self.width and beside and rows == experts:
                self.block[name] = {"roles": ["router"]}
            elif columns == self.width and beside and rows == 1:
                self.block[name] = {"roles": ["shared_router"]}
            elif columns == self.width and rows != self.width:
                readers[name] = rows
            elif rows == self.width and columns != self.width:
                writers[name] = columns
        if len(writers) != 1:
            return None
        ((writer, inner),) = writers.items()
        plain = [name for name, rows in readers.items() if rows == inner]
        double = [name for name, rows in readers.items() if rows == 2 * inner]
        found: dict[str, list[str]] = {writer: ["down"]}
        if len(plain) == 1 and not double:
            found[plain[0]] = ["up"]
        elif len(plain) == 2 and not double:
            gate = next((n for n in plain if _GATE.search(n.rpartition(".")[2])), plain[0])
            found |= {name: ["gate" if name == gate else "up"] for name in plain}
        elif len(double) == 1 and not plain:
            found[double[0]] = ["gate", "up"]
            self.fused[double[0]] = "ffn"
        else:
            return None
        for name, roles in found.items():
            self.block[name] = {"roles": roles, "transposed": turned[name], **({"shared": True} if beside else {})}
        return inner

    def _stacked(self, experts: dict[str, tuple[int, Shape]]) -> int | None:
        """Parameters that hold a matrix for every expert; returns the width of an expert."""
        inner = {
            name: (shape[1] if shape[2] == self.width else shape[2])
            for name, (_, shape) in experts.items()
            if self.width in shape[1:]
        }
        down = [name for name in inner if _DOWN.search(name.rpartition(".")[2])]
        if len(down) != 1 or len(inner) != len(experts):
            return None
        width = inner[down[0]]
        others = [name for name in inner if name != down[0]]
        roles: dict[str, list[str]] = {down[0]: ["down"]}
        if len(others) == 1 and inner[others[0]] == 2 * width:
            roles[others[0]] = ["gate", "up"]
            self.fused[others[0]] = "ffn"
        elif len(others) == 1 and inner[others[0]] == width:
            roles[others[0]] = ["up"]
        elif len(others) == 2:
            gate = next((n for n in others if _GATE.search(n)), others[0])
            roles |= {name: ["gate" if name == gate else "up"] for name in others}
        else:
            return None
        for name, group in roles.items():
            _, shape = experts[name]
            writes = group == ["down"]
            self.block[name] = {"roles": group, "experts": True, "transposed": (shape[1] == self.width) != writes}
        flat = {f"{m}.{leaf}": shape for _, m, leaf, shape in self._of_blocks() if len(shape) == 2 and "bias" in leaf}
        for name, shape in flat.items():
            of = next((n for n in roles if name.startswith(n)), None)
            if of is not None and shape[0] == experts[of][1][0]:
                self.block[name] = {"roles": roles[of], "experts": True, "kind": "bias"}
                if name.endswith("bias") and of in self.fused:
                    self.fused[name] = "ffn"
        return width

    # -- norms -----------------------------------------------------------------------------------------------------

    def _norms(self) -> None:
        """Norms of the blocks by what they read and who reads them."""
        for name in self.anatomy.norms():
            if not name.startswith(self.specimen.blocks + "."):
                continue
            number, _, local = name.removeprefix(self.specimen.blocks + ".").partition(".")
            role = self._norm_role(f"{self.specimen.blocks}.{number}.", local)
            if role is None:
                continue
            if role in ("attention_norm", "ffn_norm"):
                self._note_kind(name)
            if f"{local}.weight" in self.measures.in_blocks:
                self.block[local] = {"roles": [role]}
            elif role in ("attention_norm", "ffn_norm"):
                self.notes["residual"] = "its norms have no weights to make up for a narrower stream"

    def _note_kind(self, name: str) -> None:
        found = self.anatomy.gain(name)
        if found is None:
            self.notes["residual"] = f"{name} is neither an RMSNorm nor a LayerNorm"
        else:
            self.kinds.add(found)

    def _norm_role(self, prefix: str, local: str) -> str | None:
        seen = self.anatomy.seen[prefix + local]
        parent = {n.removeprefix(prefix): s for n, s in self.anatomy.seen.items() if n.startswith(prefix)}
        if is_attention(local.rpartition(".")[0]):
            found = self._head_norm(prefix, local, parent)
            if found is not None or seen.read.shape[-1] != self.width:
                return found
        writes = {name for name, other in parent.items() if name != local and same(other.wrote, seen.read)}
        feeds = {name for name, other in parent.items() if name != local and same(other.read, seen.wrote)}
        inner = {name for name, entry in self.block.items() if set(entry["roles"]) & _READERS}
        attends = any(is_attention(name) and (name in inner or _has(name, inner)) for name in feeds)
        others = any(not is_attention(name) and (name in inner or _has(name, inner)) for name in feeds)
        if attends:
            return "attention_norm"
        if others:
            return "ffn_norm"
        if any(is_attention(name) for name in writes):
            return "attention_post_norm"
        if writes:
            return "ffn_post_norm"
        return None

    def _head_norm(self, prefix: str, local: str, parent: dict[str, Any]) -> str | None:
        """A norm of queries or keys, by what it reads."""
        seen = self.anatomy.seen[prefix + local]
        for role in ("q", "k") if "q" in self._roles() else ():
            source = next((n for n, entry in self.block.items() if entry["roles"] == [role]), None)
            named = re.search(rf"(^|_){role}|{'query' if role == 'q' else 'key'}", local.rpartition(".")[2])
            reads = source is not None and source in parent and _reordered(parent[source].wrote, seen.read)
            if reads or (named and seen.read.shape[-1] == self.measures.head):
                shape = self.measures.in_blocks.get(f"{local}.weight", ())
                if len(shape) == 2:
                    return f"{role}_norm_each"
                whole = source is not None and seen.read.shape[-1] == parent[source].wrote.shape[-1]
                return f"{role}_norm_all" if whole and seen.read.shape[-1] != self.measures.head else f"{role}_norm"
        return None

    def _parallel(self) -> bool:
        """Whether attention and FFN of a block read the same stream."""
        roles = self._roles()
        if "attention_norm" in roles and "ffn_norm" not in roles:
            readers = {n: e["roles"][0] for n, e in self.block.items() if e["roles"][0] in ("q", "up", "gate")}
            reads = [self.anatomy.seen.get(f"{self.specimen.blocks}.0.{name}") for name in readers]
            return len(reads) > 1 and all(s is not None and same(s.read, reads[0].read) for s in reads if reads[0])
        names = [n for r in ("attention_norm", "ffn_norm") for n, e in self.block.items() if e["roles"] == [r]]
        seen = [self.anatomy.seen.get(f"{self.specimen.blocks}.0.{name}") for name in names]
        return len(seen) == 2 and all(seen) and same(seen[0].read, seen[1].read)  # type: ignore[union-attr]

    # -- stem ------------------------------------------------------------------------------------------------------

    def _stem(self) -> None:
        spec, seen = self.specimen, self.anatomy.seen
        self.stem[spec.embedding] = {"roles": ["embedding"]}
        self.stem[spec.head] = {"roles": ["head"]}
        first = seen[f"{spec.blocks}.0"]
        for name in self.anatomy.norms():
            if name.startswith(spec.blocks + "."):
                continue
            role = None
            if spec.head in seen and same(seen[name].wrote, seen[spec.head].read):
                role = "final_norm"
                self._note_kind(name)
            elif same(seen[name].wrote, first.read):
                role = "embedding_norm"
            if role is not None and f"{name}.weight" in self.anatomy.shapes:
                self.stem[name] = {"roles": [role]}
            elif role is not None:
                self.notes["residual"] = "its norms have no weights to make up for a narrower stream"
        tables = {
            name.removesuffix(".weight")
            for name, shape in self.anatomy.shapes.items()
            if not name.startswith(spec.blocks + ".") and len(shape) == 2 and shape[1] == self.width
        } - set(self.stem)
        if len(tables) == 1:
            (name,) = tables
            found = seen.get(name)
            if (found is not None and found.read.dtype != found.wrote.dtype) or "pos" in name:
                self.stem[name] = {"roles": ["positions"]}

    def _scaled(self) -> bool:
        """Whether the stream starts as the root of its width times the token embeddings."""
        first = self.anatomy.seen[f"{self.specimen.blocks}.0"].read
        seen = self.anatomy.seen.get(self.specimen.embedding)
        if seen is None:
            return False
        table: Tensor = self.anatomy.weights[f"{self.specimen.embedding}.weight"]
        rows = table[seen.read]
        return any(
            bool(((found / rows).median() / math.sqrt(self.width) - 1).abs() < 1e-3)
            for found in (seen.wrote, first)
            if found.shape == rows.shape
        )


def _has(name: str, inner: set[str]) -> bool:
    """Whether a module holds one of some others."""
    return any(other.startswith(name + ".") for other in inner)


def _reordered(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in another order."""
    if first.numel() != second.numel():
        return False
    return bool((first.flatten().sort().values == second.flatten().sort().values).all())


def with_turns(raw: dict[str, Any], turns: dict[str, str]) -> dict[str, Any]:
    """The fields of a family with the parts of some modules taking turns."""
    changed = {name: {**raw["block"][name], "turns": turn} for name, turn in turns.items()}
    return {**raw, "block": {**raw["block"], **changed}}
