"""Trained weights back into files: names, data types and shards of the folder they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from secateur.checkpoints import Checkpoint, TensorWriter, require_finite
from secateur.checkpoints.checkpoint import EMBEDDING
from secateur.checkpoints.folder import DTYPES
from secateur.errors import InternalError


def write_weights(source: Checkpoint, model: nn.Module, folder: Path) -> dict[str, str]:
    """Write a model over the tensors of its source, in a folder of its own.

    Tensors that are no parameter of the stock model are copied as they are.

    Returns:
        SHA-256 of every tensor by its name on disk.

    Raises:
        InternalError: what the files hold is not what was written.
    """
    state, headers = model.state_dict(), source.folder.headers
    writer = TensorWriter(folder, headers.values())
    digests: dict[str, str] = {}

    def put(name: str, tensor: Tensor) -> None:
        rounded = tensor.detach().cpu().to(DTYPES[headers[name].dtype])
        require_finite(name, rounded)
        digests[name] = writer.write(name, rounded)

    for place in source.architecture.places:
        canonical = canonical_of(source, state, place)
        for packed in source.packed[place]:
            put(packed.name, packed.pack(canonical))
        if source.repeated_head is not None and EMBEDDING in canonical:
            put(source.repeated_head, canonical[EMBEDDING])
    for name, tensor in source.folder.read(header.name for header in source.passthrough):
        digests[name] = writer.write(name, tensor)
    if writer.digests() != digests:
        raise InternalError("reload-check", f"weights in {folder}", "the files do not hold what was written")
    return digests


def canonical_of(source: Checkpoint, state: Mapping[str, Tensor], place: int | None) -> dict[str, Tensor]:
    """Canonical tensors of one place, as views of a stock model's state."""
    found: dict[str, Tensor] = {}
    for packed in source.architecture.packed_of(place):
        found.update(packed.unpack(state[packed.name], source.architecture.shapes))
    return found


def check_reloaded(source: Checkpoint, trained: nn.Module, reloaded: nn.Module) -> None:
    """The model as it loads from the written folder has the trained weights, rounded to the data types of the files.

    Raises:
        InternalError: naming what differs.
    """
    ours, theirs = trained.state_dict(), reloaded.state_dict()
    dtypes = source.dtypes
    for place in source.architecture.places:
        expected, found = canonical_of(source, ours, place), canonical_of(source, theirs, place)
        for name, tensor in expected.items():
            rounded = tensor.detach().cpu().to(DTYPES[dtypes[name]] if name in dtypes else tensor.dtype)
            if not rounded.equal(found[name].detach().cpu().to(rounded.dtype)):
                raise InternalError("reload-check", f"tensor {name}", "it is not what was trained after reloading")
