"""A checkpoint with edits laid over it, or with biases that it has not: what rounds and mends start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.cuts.masks import masked
from secateur.families import Block, Sizes, canonical_name, resized
from secateur.families.roles import BIASES
from secateur.plans import Plan


class EditedCheckpoint(Checkpoint):
    """Reads as the source does, with some canonical tensors replaced.

    Args:
        source: the dense model.
        edits: canonical tensors in dense shape, by name; those the source does not have are passed over.
        masks: which weights of a matrix are there, by name.
    """

    def __init__(
        self, source: Checkpoint, edits: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> None:
        self.__dict__.update(source.__dict__)
        self._source, self._edits, self._masks = source, edits, masks or {}

    def read(self, place: Block, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        found = {name: self._edits.get(name, tensor) for name, tensor in self._source.read(place, names).items()}
        return {name: masked(t, self._masks[name]) if name in self._masks else t for name, t in found.items()}


class BiasedCheckpoint(Checkpoint):
    """Reads as the source does, and biases that it has not, zero until edits say what they are.

    Args:
        source: the model.
        sizes: its own, with the flags of more biases.
    """

    def __init__(self, source: Checkpoint, sizes: Sizes) -> None:
        self.__dict__.update(source.__dict__)
        self._source = source
        self.architecture = resized(source.architecture, sizes, layout="per-layer")
        tensors = self.architecture.tensors.values()
        added = (tensor for tensor in tensors if tensor.name not in source.architecture.tensors)
        self._likes = {t.name: canonical_name(t.block, t.role, "weight", t.expert) for t in added}
        self.__dict__["dtypes"] = {**source.dtypes, **{name: source.dtypes[like] for name, like in self._likes.items()}}

    def read(self, place: Block, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = None if names is None else set(names)
        found = self._source.read(place, wanted)
        for tensor in self.architecture.tensors_of(place):
            if tensor.name in self._likes and (wanted is None or tensor.name in wanted):
                dtype = next(iter(found.values())).dtype if found else torch.float32
                found[tensor.name] = torch.zeros(self.architecture.shapes[tensor.name], dtype=dtype)
        return found


def with_biases(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with the biases that a plan adds; the same where it adds none."""
    sizes = checkpoint.architecture.sizes
    blocks = list(sizes.blocks)
    for index, after in zip(plan.blocks, plan.after.blocks, strict=True):
        blocks[index] = replace(blocks[index], **{flag: getattr(after, flag) for flag in BIASES.values()})
    more = replace(sizes, blocks=tuple(blocks))
    return checkpoint if more == sizes else BiasedCheckpoint(checkpoint, more)
