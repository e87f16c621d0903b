"""Write safetensors files of known headers one tensor at a time, in any order.

The headers are computed before the first tensor, the files preallocated, and every tensor lands at its place: memory
never holds more than two of them, and a run that was cut off goes on in the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from secateur.checkpoints.folder import DTYPES, INDEX, TensorHeader
from secateur.checkpoints.headers import FileHeader
from secateur.errors import InternalError

_CHUNK: Final = 2**24  # bytes
_HANDS: Final = 2  # tensors written or hashed at a time: one waits for the disk while the other is hashed


@dataclass(frozen=True)
class _Slot:
    path: Path
    offset: int
    header: TensorHeader

    @property
    def bytes(self) -> int:
        return self.header.bytes


class TensorWriter:
    """The weight files of an output folder.

    Args:
        folder: where they go; made when absent.
        headers: name, file, data type and shape of every tensor to come.
        index: whether files of other names than the single one are listed in an index.
        metadata: of every file, strings by name.
    """

    def __init__(
        self,
        folder: Path,
        headers: Iterable[TensorHeader],
        index: bool = True,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._slots: dict[str, _Slot] = {}
        by_file: dict[str, list[TensorHeader]] = {}
        for header in headers:
            by_file.setdefault(header.file, []).append(header)
        for file, members in sorted(by_file.items()):
            self._prepare(folder / file, members, (metadata or {}).get(file))
        if index and list(by_file) != ["model.safetensors"]:
            weight_map = {name: slot.header.file for name, slot in sorted(self._slots.items())}
            total = sum(slot.bytes for slot in self._slots.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _prepare(self, path: Path, members: list[TensorHeader], metadata: Mapping[str, str] | None) -> None:
        start = FileHeader.of(members, metadata)
        for header in members:
            self._slots[header.name] = _Slot(path, start.offsets[header.name], header)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.ftruncate(descriptor, start.bytes)
            os.pwrite(descriptor, start.text, 0)
        finally:
            os.close(descriptor)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; returns the SHA-256 of its bytes."""
        slot = self._slots[name]
        if tuple(tensor.shape) != slot.header.shape or tensor.dtype != DTYPES[slot.header.dtype]:
            found = f"{list(tensor.shape)} of {tensor.dtype}"
            raise InternalError(
                "shape", f"writing {name} as {list(slot.header.shape)} of {slot.header.dtype}", f"the cut gave {found}"
            )
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        sha = hashlib.sha256()
        descriptor = os.open(slot.path, os.O_WRONLY)
        try:
            for start in range(0, len(data), _CHUNK):
                piece = data[start : start + _CHUNK]
                sha.update(piece)
                written = 0
                while written < len(piece):
                    written += os.pwrite(descriptor, piece[written:], slot.offset + start + written)
        finally:
            os.close(descriptor)
        return sha.hexdigest()

    def write_all(self, tensors: Mapping[str, Callable[[], Tensor]]) -> dict[str, str]:
        """Make and put in place several tensors; returns the SHA-256 of each."""
        with ThreadPoolExecutor(_HANDS) as pool:
            digests = pool.map(lambda item: self.write(item[0], item[1]()), tensors.items())
            return dict(zip(tensors, digests, strict=True))

    def digests(self) -> dict[str, str]:
        """SHA-256 of what the files hold, of every tensor."""
        with ThreadPoolExecutor(_HANDS) as pool:
            return dict(zip(self.names, pool.map(self.digest, self.names), strict=True))

    def digest(self, name: str) -> str:
        """SHA-256 of what the file holds in a tensor's place."""
        slot, sha = self._slots[name], hashlib.sha256()
        with slot.path.open("rb") as handle:
            handle.seek(slot.offset)
            left = slot.bytes
            while left:
                piece = handle.read(min(left, _CHUNK))
                if not piece:
                    return "truncated"
                sha.update(piece)
                left -= len(piece)
        return sha.hexdigest()

    @property
    def names(self) -> list[str]:
        return list(self._slots)
