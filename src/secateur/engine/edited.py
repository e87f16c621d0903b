"""A checkpoint with edits laid over it: what a later round of decisions starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.families import Block


class EditedCheckpoint(Checkpoint):
    """Reads as the source does, with some canonical tensors replaced.

    Args:
        source: the dense model.
        edits: canonical tensors in dense shape, by name; those the source does not have are passed over.
    """

    def __init__(self, source: Checkpoint, edits: Mapping[str, Tensor]) -> None:
        self.__dict__.update(source.__dict__)
        self._edits = edits

    def read(self, place: Block, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        found = super().read(place, names)
        return {name: self._edits.get(name, tensor) for name, tensor in found.items()}
