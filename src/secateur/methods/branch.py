"""The branches of the blocks as units: what a model is without some of them, for methods that try it or weigh it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from secateur.families import Sizes
from secateur.families.roles import ATTENTION_WRITERS
from secateur.methods.base import Study

WRITERS = {"attention": ATTENTION_WRITERS, "ffn": ("down",)}
"""The roles by which each branch writes the stream."""
GONE: Mapping[str, Mapping[str, Any]] = {"attention": {"kv": 0}, "ffn": {"ffn": 0, "experts": 0, "shared": 0}}
"""Sizes of a block without a branch."""


@dataclass(frozen=True, order=True)
class Branch:
    """What can go at once: branches of one block."""

    block: int
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"blocks.{self.block}" + (f".{self.parts[0]}" if len(self.parts) == 1 else "")

    def silent(self, study: Study) -> dict[str, Tensor]:
        """The matrices by which it writes the stream, silenced: edits for a trial without it."""
        roles = tuple(role for part in self.parts for role in WRITERS[part])
        tensors = study.view(self.block, roles).tensors
        return {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}


def without(sizes: Sizes, gone: Sequence[Branch]) -> Sizes:
    """Sizes without some branches: blocks that lose both at once leave, the others stay in their place."""
    blocks = dict(enumerate(sizes.blocks))
    for unit in gone:
        if len(unit.parts) > 1:
            del blocks[unit.block]
            continue
        (part,) = unit.parts
        blocks[unit.block] = replace(blocks[unit.block], **GONE[part])
    return replace(sizes, blocks=tuple(blocks.values()))
