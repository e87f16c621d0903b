"""Give a base the delta of a file: the folder of the fine-tune, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from secateur.archives.delta_file import DeltaFile, DeltaHeader, Sparse
from secateur.archives.sparse import Code, random_indices, unpack_indices
from secateur.checkpoints import Checkpoint, Folder, TensorWriter, require_finite
from secateur.checkpoints.checkpoint import EMBEDDING
from secateur.checkpoints.folder import DTYPES, RECORD, TensorHeader, read_json
from secateur.deltas.packing import LOOSE, digest_of, like_base, loose_of
from secateur.deltas.selection import Selection
from secateur.deltas.sources import assemble, factor_names, wide
from secateur.engine.progress import Progress
from secateur.errors import InternalError, refuse
from secateur.families import Block
from secateur.families.tensors import place_name

Read = Callable[[str], Tensor | None]


def apply_delta(base: Checkpoint, source: DeltaFile, folder: Path, told: Progress) -> dict[str, str]:
    """Write the folder of the fine-tune, its dropped entries those of the base.

    Returns:
        SHA-256 of every tensor by its name on disk.

    Raises:
        RequestError: the file is damaged or was made on another base.
    """
    header, architecture = source.header, base.architecture
    places = [place_name(place) for place in architecture.places]
    if sorted(set(header.base) - {LOOSE}) != sorted(places):
        _other_base(source, "it has other blocks")
    folder.mkdir(parents=True)
    with source.open() as read:
        _write_files(source, read, base.folder.path, folder)
        try:
            target, writer = _target(base, header, folder)
            digests = _Applier(base, source, read, target, writer).run(told)
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            source.damaged(f"its tensors do not fit its header ({' '.join(str(error).split())[:160]})")
    if writer.digests() != digests:
        raise InternalError("reload-check", f"weights in {folder}", "the files do not hold what was written")
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    told_of = {"secateur": header.secateur, "method": header.method, "ratio": header.ratio, "options": header.options}
    record |= {"delta": told_of, "tensors": dict(sorted(digests.items()))}
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return digests


def _other_base(source: DeltaFile, found: str) -> NoReturn:
    refuse("other-base", f"delta {str(source.path)!r} on this base", found, "name the base that it was made on")


def _write_files(source: DeltaFile, read: Read, base: Path, folder: Path) -> None:
    """The companions of the weights, out of the file or from beside the base."""
    for name, companion in source.header.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if companion.stored:
            data = read(f"companion:{name}")
            path.write_bytes(b"" if data is None else data.numpy().tobytes())
        elif (base / name).is_file():
            shutil.copyfile(base / name, path)
        else:
            _other_base(source, f"it has no {name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != companion.sha256:
            _other_base(source, f"its {name} is another")


def _target(base: Checkpoint, header: DeltaHeader, folder: Path) -> tuple[Checkpoint, TensorWriter]:
    """The folder to come as a checkpoint, its weights not written yet."""
    found = header.weights
    weights = list(base.folder.headers.values()) if found is None else [TensorHeader(*weight) for weight in found]
    writer = TensorWriter(folder, weights)
    skeleton = Folder(folder)
    if header.untied:
        skeleton.config["tie_word_embeddings"] = False
    target = Checkpoint(skeleton, base.architecture.origin)
    if target.problems:
        raise ValueError(str(target.problems[0]))
    return target, writer


class _Applier:
    """Writes the tensors of the fine-tune."""

    def __init__(
        self, base: Checkpoint, source: DeltaFile, read: Read, target: Checkpoint, writer: TensorWriter
    ) -> None:
        self.base, self.source, self.header, self.read = base, source, source.header, read
        self.target, self.writer = target, writer
        self.digests: dict[str, str] = {}

    def run(self, told: Progress) -> dict[str, str]:
        """Place by place; SHA-256 of every tensor by its name on disk."""
        places = self.target.architecture.places
        told.start("apply", len(places))
        for done, place in enumerate(places, 1):
            base = self.base.read(place)
            self._require(place_name(place), base)
            tensors = self._place(place, base)
            for packed in self.target.packed[place]:
                whole = packed.pack(tensors)
                require_finite(packed.name, whole, "what the delta gives does not fit the data type of the weights")
                self._write(packed.name, whole)
            if place is None and self.target.repeated_head is not None:
                self._write(self.target.repeated_head, tensors[EMBEDDING])
            told.step(done)
        loose = loose_of(self.base)
        if loose:
            self._require(LOOSE, loose)
        for header in self.target.passthrough:
            name, dtype = f"{LOOSE}{header.name}", DTYPES[header.dtype]
            self._write(header.name, self._rows(name, loose.get(name), header.shape, dtype))
        return dict(sorted(self.digests.items()))

    def _require(self, place: str, tensors: Mapping[str, Tensor]) -> None:
        if digest_of(tensors) != self.header.base.get(place):
            _other_base(self.source, f"the tensors of {place.rstrip(':')} are others")

    def _write(self, name: str, tensor: Tensor) -> None:
        self.digests[name] = self.writer.write(name, tensor)

    def _place(self, place: Block, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors of one place of the fine-tune."""
        architecture, headers = self.target.architecture, self.target.folder.headers
        scales = {name: scale for name, (scale, _) in self.header.adapters.items()}
        deltas = assemble(architecture, place, self._pieces(place, base), scales)
        found = {}
        for packed in self.target.packed[place]:
            dtype = DTYPES[headers[packed.name].dtype]
            for name in packed.canonical:
                if name in deltas:
                    compute = deltas[name].dtype
                    found[name] = (base[name].to(compute) + deltas[name]).to(dtype)
                else:
                    found[name] = self._rows(name, base.get(name), architecture.shapes[name], dtype)
        return found

    def _pieces(self, place: Block, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was pruned of one place, spread again and divided by its q."""
        architecture, found = self.base.architecture, {}
        shapes = {name: (tuple(tensor.shape), wide(tensor.dtype)) for name, tensor in base.items()}
        for packed in architecture.packed_of(place):
            if packed.name in self.header.adapters:
                rows, columns = packed.shape(architecture.shapes)[:: -1 if packed.transposed else 1]
                (one, other), (_, rank) = factor_names(packed.name), self.header.adapters[packed.name]
                if rank > max(rows, columns):
                    raise ValueError(f"rank {rank} of {packed.name}")
                shapes |= {one: ((rank, columns), torch.float32), other: ((rows, rank), torch.float32)}
        for name, (shape, dtype) in shapes.items():
            entry = self.header.pruned.get(name)
            if entry is not None:
                found[name] = self._piece(name, entry, shape, dtype)
        return found

    def _piece(self, name: str, entry: Sparse, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = shape[entry.axis] if entry.axis is not None else torch.Size(shape).numel()
        if entry.count > size:
            raise ValueError(f"{entry.count} of {size} entries of {name}")
        indices = (
            random_indices(size, entry.count, entry.seed)
            if entry.coding == "seed"
            else unpack_indices(entry.coding, self._code(name), size, entry.count, entry.low)
        )
        values = self.read(f"values:{name}")
        if values is None:
            return torch.zeros(shape, dtype=dtype)
        scaled = (values.double() * 2.0**entry.exponent / entry.q).to(dtype)
        return Selection(size, indices, entry.axis).spread(scaled, shape)

    def _code(self, name: str) -> Code:
        found = self.read(f"index:{name}")
        code: Code = torch.zeros(0, dtype=torch.uint8).numpy() if found is None else found.numpy()
        return code

    def _rows(self, name: str, base: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the base with the rows that changed."""
        entry = self.header.rows.get(name)
        found, rows = like_base(base, tuple(shape), dtype)
        if entry is None:
            if not shape or rows != shape[0]:
                raise ValueError(f"the base has no {name}, and the file has none")
            return found
        if entry.size != (shape[0] if shape else 1):
            raise ValueError(f"{entry.size} rows of {name}")
        changed = unpack_indices(entry.coding, self._code(name), entry.size, entry.count, entry.low)
        values = self.read(f"rows:{name}")
        if values is not None:
            found.view(entry.size, *shape[1:])[torch.from_numpy(changed)] = values.to(dtype)
        return found
