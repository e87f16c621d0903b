"""Which keys hold the sizes of attention and FFN, and a configuration of a few kilobytes with the same structure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from secateur.errors import refuse
from secateur.families.packing import Shape
from secateur.inference.specimen import UNKNOWN, Raw, Specimen

ATTENTION: Final = re.compile(r"att(n|ention)|mixer|qkv|query|(^|\.)[qkvo]_(proj|lin)$")
_LEAVES: Final = {
    "q": re.compile(r"^(q|query|wq|q_proj|q_lin|linear_q|query_proj)$"),
    "k": re.compile(r"^(k|key|wk|k_proj|k_lin|linear_k|key_proj)$"),
    "v": re.compile(r"^(v|value|wv|v_proj|v_lin|linear_v|value_proj)$"),
    "out": re.compile(r"^(o|out|wo|o_proj|out_proj|c_proj|proj|dense|out_lin|linear_out|output|output_proj)$"),
}
_FUSED: Final = re.compile(r"qkv|c_attn|query_key_value|w_?pack|in_proj", re.IGNORECASE)
_SMALL_WIDTH: Final = (72, 64, 96)
_SMALL_INNER: Final = (56, 40, 24, 88)


def is_attention(local: str) -> bool:
    """Whether a module of a block, by its name, belongs to the attention."""
    return ATTENTION.search(local) is not None


def attention_roles(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Roles of the attention's matrices by their modules' names; none where a part is missing or there are two."""
    found: dict[str, tuple[str, ...]] = {}
    for local in modules:
        leaf = local.rpartition(".")[2]
        if _FUSED.search(leaf):
            found[local] = ("q", "k", "v")
        else:
            role = next((role for role, pattern in _LEAVES.items() if pattern.match(leaf)), None)
            if role is not None:
                found[local] = (role,)
    roles = sorted(role for group in found.values() for role in group)
    return found if roles == ["k", "out", "q", "v"] else {}


@dataclass
class Measures:
    """Sizes of the attention and keys of the FFN, read off a specimen.

    Attributes:
        heads, groups, head: query heads, key/value heads, size of a head of the real model.
        head_key: key of the head's size, None where it is tied to the stream's width.
        inner_keys: keys of FFN widths, with the value of each.
        experts_key: key of the number of routed experts.
    """

    specimen: Specimen
    heads: int = 0
    groups: int = 0
    head: int = 0
    head_key: str | None = None
    inner_keys: dict[str, int] = field(default_factory=dict)
    experts_key: str | None = None

    def __post_init__(self) -> None:
        self._measure_attention()
        self._measure_ffn()

    @cached_property
    def in_blocks(self) -> dict[str, Shape]:
        """Shapes of parameters by their name inside a block, of the first block that has them."""
        found: dict[str, Shape] = {}
        for name, shape in self.specimen.shapes.items():
            if name.startswith(self.specimen.blocks + "."):
                found.setdefault(self.local(name), shape)
        return found

    def local(self, name: str) -> str:
        """Name of a parameter inside its block."""
        return name.removeprefix(self.specimen.blocks + ".").partition(".")[2]

    def matrices(self, attention: bool) -> dict[str, Shape]:
        """Two-dimensional weights of the attention, or of the rest, by module."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.in_blocks.items()
            if name.endswith(".weight") and len(shape) == 2 and is_attention(name.removesuffix(".weight")) == attention
        }

    @property
    def width(self) -> int:
        return int(self.specimen.short[self.specimen.width_key])

    def _measure_attention(self) -> None:
        spec, matrices = self.specimen, self.matrices(attention=True)
        self.heads = int(spec.short[spec.heads_key])
        stated = spec.groups_key and spec.short[spec.groups_key]
        self.groups = int(stated or self.heads)
        roles = {role: local for local, group in attention_roles(matrices).items() for role in group}
        if not roles:
            self.head = self.width // self.heads
            return
        rows = {role: self._rows(matrices[local]) for role, local in roles.items()}
        if roles["q"] == roles["k"]:
            for groups in dict.fromkeys((self.groups, self.heads, 1)):
                if rows["q"] % (self.heads + 2 * groups) == 0:
                    self.groups, self.head = groups, rows["q"] // (self.heads + 2 * groups)
                    break
        elif rows["q"] % self.heads == 0:
            self.head = rows["q"] // self.heads
            self.groups = max(1, rows["k"] // max(1, self.head))
        if not self.head:
            refuse(UNKNOWN, f"architecture {spec.model_type!r}", "its heads have no even size")
        self.head_key = spec.head_key(self.head, spec.blocks)

    def _rows(self, shape: Shape) -> int:
        """The side of a matrix that is not the stream's."""
        return shape[0] if shape[1] == self.width else shape[1]

    def _measure_ffn(self) -> None:
        spec = self.specimen
        taken = {spec.width_key, spec.heads_key, spec.groups_key, self.head_key}
        for key, moved in spec.responses.items():
            inside = all(name.startswith(spec.blocks + ".") for name, _ in moved)
            if key in taken or not moved or not inside:
                continue
            locals_ = {(self.local(name), d) for name, d in moved}
            if any(is_attention(name) for name, _ in locals_):
                continue
            value = spec.short[key]
            sizes = {self.in_blocks[name][d] for name, d in locals_}
            if not sizes & {value, 2 * value}:
                continue  # a factor, not a size
            if any(len(self.in_blocks[name]) == 3 and d == 0 for name, d in locals_):
                self.experts_key = key
            else:
                self.inner_keys[key] = value
        if not self.inner_keys:
            unset = spec.unset_inner_key()
            if unset is not None:
                self.inner_keys[unset] = 0

    # -- small -----------------------------------------------------------------------------------------------------

    def small_configurations(self) -> list[Raw]:
        """Small configurations with the structure of the real one, the preferred one first."""
        heads, groups = (4, 1) if self.groups == 1 else (4, 4) if self.groups == self.heads else (8, 4)
        return [
            self._small(heads, groups, _SMALL_INNER, width, fewer)
            for fewer in (True, False)
            for width in ((heads * self.head,) if self.head_key is None else (*_SMALL_WIDTH, heads * self.head))
        ]

    def other_small(self, small: Raw) -> Raw:
        """A configuration that differs from a small one in every size."""
        heads, groups = (6, 1) if self.groups == 1 else (6, 6) if self.groups == self.heads else (6, 2)
        width = 6 * self.head if self.head_key is None else int(small[self.specimen.width_key]) + 24
        experts = self.experts_key is not None and small[self.experts_key] != self.specimen.short[self.experts_key]
        return self._small(heads, groups, tuple(size + 16 for size in _SMALL_INNER), width, experts)

    def _small(self, heads: int, groups: int, inner: tuple[int, ...], width: int, fewer_experts: bool) -> Raw:
        spec = self.specimen
        changes = {spec.heads_key: heads, spec.width_key: width, **dict(zip(self.inner_keys, inner, strict=False))}
        if spec.groups_key is not None and spec.short[spec.groups_key] == self.groups:
            changes[spec.groups_key] = groups
        if self.head_key is not None:
            changes[self.head_key] = self.head
        if fewer_experts and self.experts_key is not None:
            changes[self.experts_key] = 4
            if spec.active_key is not None:
                changes[spec.active_key] = min(2, int(spec.short[spec.active_key]))
            changes |= {key: 1 for key in ("n_group", "topk_group") if spec.short.get(key)}
        return spec.small(changes)
