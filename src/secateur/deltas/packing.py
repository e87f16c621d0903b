"""Write a sparse delta: place by place, the kept values of what is pruned and the changed rows of all else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from secateur.archives.delta_file import Companion, DeltaHeader, DeltaWriter, Rows, Sparse
from secateur.archives.sparse import pack_indices
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.companions import companions_of
from secateur.checkpoints.patterns import information_bits
from secateur.deltas.options import VALUES
from secateur.deltas.rescale import Rescale
from secateur.deltas.sources import Adapter
from secateur.deltas.trials import Pruner
from secateur.engine.progress import Progress
from secateur.families.tensors import place_name
from secateur.version import __version__

LOOSE: Final = "file:"
"""Before the name on disk of a tensor that has no canonical one."""
_TOP_EXPONENT: Final = 15  # float16 reaches just below 2 ** 16


@dataclass
class Account:
    """Where the bytes of a delta are, and how many entries it has.

    Attributes:
        q: what the kept values of each piece are divided by.
    """

    entries: int = 0
    kept: int = 0
    values_bytes: int = 0
    index_bytes: int = 0
    bound_bits: float = 0.0
    pruned: int = 0
    whole: int = 0
    unchanged: int = 0
    whole_bytes: int = 0
    files_bytes: int = 0
    q: dict[str, float] = field(default_factory=dict)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: names, data types, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def loose_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors of a folder that have no canonical name, by their names on disk behind ``file:``."""
    loose = checkpoint.folder.read(header.name for header in checkpoint.passthrough)
    return {f"{LOOSE}{name}": tensor for name, tensor in loose}


def write_delta(
    pruner: Pruner, rescale: Rescale, seed: int, path: Path, work: Path, told: Progress
) -> tuple[Account, int]:
    """Write the file; returns what is in it, and the bytes of its header."""
    tuned, base = pruner.tuned, pruner.tuned.base
    account, writer = Account(), DeltaWriter(work)
    pruned: dict[str, Sparse] = {}
    rows: dict[str, Rows] = {}
    digests: dict[str, str] = {}
    places = tuned.architecture.places
    told.start("pack", len(places))
    for done, place in enumerate(places, 1):
        ours, theirs = tuned.read(place), base.read(place)
        digests[place_name(place)] = digest_of(theirs)
        pieces = tuned.pieces(place, theirs, ours)
        _write_pieces(pruner, rescale, seed, pieces, writer, pruned, account)
        if not isinstance(tuned, Adapter):
            others = {name: tensor for name, tensor in ours.items() if name not in pieces}
            _write_rows(others, theirs, writer, rows, account)
        told.step(done)
    loose = loose_of(base)
    if loose:
        digests[LOOSE] = digest_of(loose)
    if not isinstance(tuned, Adapter):
        _write_rows(loose_of(tuned.checkpoint), loose, writer, rows, account)
    files = dict(_files(tuned.checkpoint.folder.path, base.folder.path, writer, account))
    weights, original = (
        [(h.name, h.file, h.dtype, h.shape) for h in found.folder.headers.values()]
        for found in (tuned.checkpoint, base)
    )
    tied = bool(tuned.checkpoint.folder.config.get("tie_word_embeddings", _tied_by_default(tuned.checkpoint)))
    header = DeltaHeader(
        version=1,
        secateur=__version__,
        method=pruner.method.name,
        ratio=pruner.ratio,
        options=pruner.method.model_dump(mode="json"),
        base=digests,
        untied=tied and not tuned.architecture.sizes.tied,
        weights=None if weights == original else weights,
        pruned=pruned,
        adapters={name: (scale, tuned.ranks[name]) for name, scale in tuned.adapters.items()},
        rows=rows,
        files=files,
    )
    return account, writer.finish(path, header)


def _write_pieces(
    pruner: Pruner,
    rescale: Rescale,
    seed: int,
    pieces: Mapping[str, Tensor],
    writer: DeltaWriter,
    entries: dict[str, Sparse],
    account: Account,
) -> None:
    """The kept values of what is pruned of one place, and which they are."""
    for name, delta in pieces.items():
        if not bool(delta.any()):
            account.unchanged += 1
            continue
        selection = pruner.select(name, pieces, seed)
        q = pruner.q(name, pieces, selection, rescale)
        values, exponent = stored_values(selection.take(delta), VALUES[pruner.method.values])
        account.values_bytes += writer.add(f"values:{name}", values)
        count, size = len(selection.indices), selection.size
        how: dict[str, Any] = {"count": count, "axis": selection.axis, "q": q, "exponent": exponent}
        if selection.seed is not None and count < size:
            entries[name] = Sparse(coding="seed", seed=selection.seed, **how)
        else:
            coding, code, more = pack_indices(selection.indices, size)
            account.index_bytes += writer.add(f"index:{name}", torch.from_numpy(code))
            entries[name] = Sparse(coding=coding, **how, **more)
        account.q[name] = q
        account.pruned += 1
        account.entries += delta.numel()
        account.kept += selection.entries(delta)
        account.bound_bits += 8 * values.nbytes + information_bits(size, count)


def stored_values(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Values in the type of the file, and the power of two to which they count.

    float16 has few exponents: its values are scaled so that the largest is just below its end.
    """
    if dtype != torch.float16 or not values.numel():
        return values.to(dtype), 0
    largest = float(values.abs().max())
    exponent = math.frexp(largest)[1] - _TOP_EXPONENT if largest else 0
    return (values.double() * 2.0**-exponent).to(dtype), exponent


def _write_rows(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    writer: DeltaWriter,
    entries: dict[str, Rows],
    account: Account,
) -> None:
    """The rows in which tensors differ from the base's, rows that this has not included."""
    for name, tensor in tensors.items():
        changed = changed_rows(tensor, base.get(name))
        if not len(changed) and name in base and base[name].shape == tensor.shape:
            account.unchanged += 1
            continue
        size = tensor.shape[0] if tensor.ndim else 1
        coding, code, more = pack_indices(changed, size)
        entries[name] = Rows(coding=coding, count=len(changed), size=size, **more)
        kept = tensor.reshape(size, *tensor.shape[1:])[torch.from_numpy(changed)]
        account.whole_bytes += writer.add(f"rows:{name}", kept) + writer.add(f"index:{name}", torch.from_numpy(code))
        account.whole += 1


def like_base(base: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """The base's tensor in another length and type, zeros where it has nothing; and how many rows it gave."""
    found = torch.zeros(shape, dtype=dtype)
    if base is None or base.ndim != len(shape) or not shape or base.shape[1:] != shape[1:]:
        return found, 0
    rows = min(len(base), shape[0])
    found[:rows] = base[:rows].to(dtype)
    return found, rows


def changed_rows(tensor: Tensor, base: Tensor | None) -> np.ndarray:
    """Rows of a tensor that are not the base's."""
    if not tensor.ndim:
        return np.zeros(1, np.int64)
    other, rows = like_base(base, tuple(tensor.shape), tensor.dtype)
    differs = (tensor != other).reshape(len(tensor), -1).any(1)
    differs[rows:] = True
    return np.flatnonzero(differs.numpy()).astype(np.int64)


def _tied_by_default(checkpoint: Checkpoint) -> bool:
    return bool(getattr(checkpoint.architecture.config, "tie_word_embeddings", False))


def _files(folder: Path, base: Path, writer: DeltaWriter, account: Account) -> Iterator[tuple[str, Companion]]:
    """The companions of the weights; those that are the same in the base's folder are only named."""
    for name in companions_of(folder):
        data, other = (folder / name).read_bytes(), base / name
        digest = hashlib.sha256(data).hexdigest()
        stored = not (other.is_file() and hashlib.sha256(other.read_bytes()).hexdigest() == digest)
        if stored:
            account.files_bytes += writer.add(f"companion:{name}", torch.frombuffer(bytearray(data), dtype=torch.uint8))
        yield name, Companion(sha256=digest, stored=stored)


def figures_of(account: Account) -> dict[str, Any]:
    """What is told of an account."""
    values = list(account.q.values())
    return {
        "entries": account.entries,
        "kept": account.kept,
        "dropped": round(1 - account.kept / account.entries, 9) if account.entries else 0.0,
        "tensors": {"pruned": account.pruned, "whole": account.whole, "unchanged": account.unchanged},
        "values_bytes": account.values_bytes,
        "index_bytes": account.index_bytes,
        "whole_bytes": account.whole_bytes,
        "files_bytes": account.files_bytes,
        "bound_bytes": math.ceil(account.bound_bits / 8),
        "q": {"smallest": min(values), "mean": sum(values) / len(values), "largest": max(values)} if values else None,
    }
