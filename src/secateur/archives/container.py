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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.archives.bitsback import Form
from secateur.errors import refuse

_MAGIC: Final = b"SECBITS1"
_HASH: Final = 32


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
    files: list[tuple[str, int]]
    weights: list[tuple[str, str, str, tuple[int, ...]]]
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
        for name in (*header.clear, *(name for name, _ in header.files), *(file for _, file, _, _ in header.weights)):
            if not inside(name):
                _damaged(path, f"the file name {name!r} leaves the folder")
        return cls(header, np.frombuffer(data[start:end], "<u4").astype(np.uint32))


def inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _damaged(path: Path, found: str) -> NoReturn:
    refuse("bad-archive", f"archive {str(path)!r}", found, "fetch or write it again")
