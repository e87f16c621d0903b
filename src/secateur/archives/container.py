"""The file of a bits-back archive: a header in the clear, the words of the stack, and a hash of both.

8 bytes     SECBITS1
8 bytes     length of the header, little endian
header      JSON: what has to be known before the stack can be read
words       of the stack, 32 bits each, little endian
32 bytes    SHA-256 of all before
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, ValidationError

from secateur.archives.bitsback import Form
from secateur.checkpoints.headers import DTYPES
from secateur.checkpoints.packed import can_name, plain_file_name
from secateur.errors import refuse

_MAGIC: Final = b"SECBITS1"
_HASH: Final = 32


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError("no data type of safetensors")
    return dtype


Weight = tuple[str, str, Annotated[str, AfterValidator(_known)], tuple[NonNegativeInt, ...]]
"""Name, file, data type and shape of a tensor of a folder to come."""


class Header(BaseModel):
    """What has to be known before the stack can be read.

    Attributes:
        form: which rotations were free.
        clear: files of the folder that describe the model, by name: their text.
        files: the other files of the folder: path and bytes, in the order in which they lie on the stack.
        weights: name, file, data type and shape of every tensor of the folder.
        content: SHA-256 of all that is on the stack.
        saved: what each interface gave.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form
    clear: dict[str, str]
    files: list[tuple[str, NonNegativeInt]]
    weights: list[Weight]
    content: str
    saved: list[dict[str, int | str]]


@dataclass(frozen=True)
class Archive:
    """An archive: its header and the words of its stack."""

    header: Header
    words: NDArray[np.uint32]

    def save(self, path: Path) -> None:
        """Write it."""
        header = self.header.model_dump_json().encode()
        digest = hashlib.sha256()
        with path.open("wb") as handle:
            for piece in (_MAGIC, len(header).to_bytes(8, "little"), header, self.words.astype("<u4").tobytes()):
                digest.update(piece)
                handle.write(piece)
            handle.write(digest.digest())

    @classmethod
    def load(cls, path: Path) -> Archive:
        """Read one.

        Raises:
            RequestError: there is no such file, or it is no archive, or damaged.
        """
        if not path.is_file():
            refuse("no-archive", f"archive {str(path)!r}", "there is no such file", "secateur pack writes one")
        data = memoryview(path.read_bytes())
        if bytes(data[:8]) != _MAGIC:
            _damaged(path, "it does not begin as a bits-back archive does")
        start, end = 16 + int.from_bytes(data[8:16], "little"), len(data) - _HASH
        if start > end or (end - start) % 4 or hashlib.sha256(data[:end]).digest() != data[end:]:
            _damaged(path, f"its {len(data)} bytes are not those that were written")
        try:
            raw: dict[str, Any] = json.loads(bytes(data[16:start]))
            header = Header.model_validate(raw)
        except (ValueError, ValidationError) as error:
            _damaged(path, f"its header is not understood ({str(error).splitlines()[0]})")
        problem = misplaced([*header.clear, *(name for name, _ in header.files)], header.weights)
        if problem:
            _damaged(path, problem)
        return cls(header, np.frombuffer(data[start:end], "<u4").astype(np.uint32))


def misplaced(companions: Sequence[str], weights: Sequence[Weight]) -> str:
    """Why the files that an archive names cannot lie in one folder; empty where they can.

    Args:
        companions: paths of the files beside the weights.
        weights: tensors, with the files that they lie in.
    """
    stored = {file for _, file, _, _ in weights}
    names = [*companions, *stored]
    outside = next((name for name in names if not all(map(can_name, name.split("/")))), None)
    if outside is not None:
        return f"the file name {outside[:99]!r} leaves the folder"
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(set(names)) < len(names) or folders.intersection(names) or not all(map(plain_file_name, stored)):
        return "its files cannot lie beside each other"
    return ""


def _damaged(path: Path, found: str) -> NoReturn:
    refuse("bad-archive", f"archive {str(path)!r}", found, "fetch or write it again")
