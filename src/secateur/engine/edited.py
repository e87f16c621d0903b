"""A checkpoint edited, with more biases or cut: what rounds, mends and later steps of a run start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.cuts import cut_architecture, cut_place
from secateur.cuts.masks import masked
from secateur.families import Block, Layout, Sizes, canonical_name, resized
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


class CutCheckpoint(Checkpoint):
    """Reads as what a plan leaves of the source, under the names and in the shapes that it has then.

    Args:
        source: the model before.
        plan: of it, complete.
        layout: of what is left.
    """

    def __init__(self, source: Checkpoint, plan: Plan, layout: Layout) -> None:
        self.__dict__.update(source.__dict__)
        self._source, self._plan, self._survivors = source, plan, plan.survivors
        self.architecture = cut_architecture(source.architecture, plan, layout)
        own = {name: self._survivors.old_name(name) for name in self.architecture.tensors}
        self.__dict__["dtypes"] = {name: source.dtypes[old] for name, old in own.items() if old in source.dtypes}

    def read(self, place: Block, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = [tensor.name for tensor in self.architecture.tensors_of(place)] if names is None else list(names)
        if not wanted:
            return {}
        before = None if place is None else self._plan.blocks[place]
        read = self._source.read(before, [self._survivors.old_name(name) for name in wanted])
        cut = cut_place(self._source.architecture, self.architecture, before, read, self._plan)
        found = {self._survivors.new_name(name): tensor for name, tensor in cut.items()}
        return {name: found[name] for name in wanted if name in found}


def with_biases(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with the biases that a plan adds; the same where it adds none."""
    sizes = checkpoint.architecture.sizes
    blocks = list(sizes.blocks)
    for index, after in zip(plan.blocks, plan.after.blocks, strict=True):
        blocks[index] = replace(blocks[index], **{flag: getattr(after, flag) for flag in BIASES.values()})
    more = replace(sizes, blocks=tuple(blocks))
    return checkpoint if more == sizes else BiasedCheckpoint(checkpoint, more)
