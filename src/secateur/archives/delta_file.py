"""The file of a sparse delta: one safetensors file whose metadata say what its tensors are.

Tensors come in any order and their number of bytes is known only when they come: they are spooled to files beside the
output, one for each width of an element, which are joined behind the header at the end. The header holds the SHA-256 of
the whole file, its own 64 digits read as zeros.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.archives.container import Weight, misplaced
from secateur.checkpoints.folder import DTYPES
from secateur.errors import refuse

_KEY, _DIGEST = "secateur_delta", "sha256"
_BLANK: Final = "0" * 64
_CHUNK: Final = 2**22  # bytes
_LARGEST_HEADER: Final = 100_000_000  # bytes; what safetensors itself admits
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class Sparse(BaseModel):
    """How a pruned matrix is written.

    Attributes:
        coding: of the kept indices: drawn from ``seed``, or a code of :mod:`secateur.archives.sparse`.
        count: how many entries, rows or columns are kept.
        axis: 0 where whole rows are kept, 1 where columns are, None where entries are.
        low: of the code of gaps.
        exponent: values are multiples of two to it.
        q: what kept values are divided by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    coding: Literal["seed", "all", "bits", "gaps"]
    count: int = Field(ge=0)
    axis: Literal[0, 1] | None = None
    seed: int = Field(0, ge=0)
    low: int = Field(0, ge=0, le=62)
    exponent: int = Field(0, ge=-1100, le=1100)
    q: float = Field(1.0, gt=0, allow_inf_nan=False)


class Rows(BaseModel):
    """How a tensor that is not pruned is written: the rows that differ from the base's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coding: Literal["all", "bits", "gaps"]
    count: int = Field(ge=0)
    size: int = Field(ge=0)
    low: int = Field(0, ge=0, le=62)


class Companion(BaseModel):
    """A file beside the weights: its hash, and whether it is in the archive or the same as in the base's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    stored: bool


class DeltaHeader(BaseModel):
    """What a sparse delta is.

    Attributes:
        secateur: version that wrote it.
        method, ratio, options: how the entries were chosen.
        base: SHA-256 of the base's tensors, place by place.
        untied: whether the head was given a table of its own against what the configuration says.
        weights: name, file, data type and shape of every tensor of the fine-tune, where these are not the base's.
        pruned: matrices of which some entries are kept; factors of adapters are named after their parameter.
        adapters: weight of the product of two factors and their rank, by the parameter to which it is added.
        rows: other tensors that differ from the base's, by canonical name, or by name on disk behind ``file:``.
        files: companions of the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    secateur: str
    method: str
    ratio: float
    options: dict[str, Any]
    base: dict[str, str]
    untied: bool
    weights: list[Weight] | None
    pruned: dict[str, Sparse]
    adapters: dict[str, tuple[float, NonNegativeInt]]
    rows: dict[str, Rows]
    files: dict[str, Companion]


@dataclass
class DeltaWriter:
    """Takes tensors one by one, and makes one file of them at the end.

    Args:
        work: folder for the spools.
    """

    work: Path
    _slots: dict[str, tuple[str, tuple[int, ...], int, int]] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> int:
        """Append a tensor; returns its bytes. One without elements is left out."""
        if not tensor.numel():
            return 0
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        width = tensor.element_size()
        start = self._sizes.get(width, 0)
        with self._spool(width).open("ab" if start else "wb") as handle:
            handle.write(flat.data)
        self._slots[name] = (_NAMES[tensor.dtype], tuple(tensor.shape), width, start)
        self._sizes[width] = start + flat.nbytes
        return int(flat.nbytes)

    def _spool(self, width: int) -> Path:
        return self.work / f"spool-{width}"

    def finish(self, path: Path, header: DeltaHeader) -> int:
        """Write the file; returns the bytes of everything that is no tensor."""
        widths = sorted(self._sizes, reverse=True)  # aligned, since every spool is a multiple of its width
        begins = {width: sum(self._sizes[wider] for wider in widths if wider > width) for width in widths}
        text = header.model_dump_json(exclude_defaults=True)
        content: dict[str, Any] = {"__metadata__": {"format": "pt", _DIGEST: _BLANK, _KEY: text}}
        for name, (dtype, shape, width, start) in self._slots.items():
            begin = begins[width] + start
            size = torch.Size(shape).numel() * width
            content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        head = json.dumps(content, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        start_of_head = len(head).to_bytes(8, "little")
        digest = hashlib.sha256(start_of_head + head)
        spools = [self._spool(width) for width in widths]
        for spool in spools:
            with spool.open("rb") as handle:
                while piece := handle.read(_CHUNK):
                    digest.update(piece)
        with path.open("wb") as target:
            target.write(start_of_head + head.replace(_BLANK.encode(), digest.hexdigest().encode(), 1))
            for spool in spools:
                with spool.open("rb") as handle:
                    shutil.copyfileobj(handle, target, _CHUNK)
        for spool in spools:
            spool.unlink()
        return 8 + len(head)


class DeltaFile:
    """A sparse delta, opened for reading one tensor at a time.

    Args:
        path: the file.

    Raises:
        RequestError: there is no such file, it is none of ours, it is damaged, or a name in it leaves its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            refuse("no-delta", f"delta {str(path)!r}", "there is no such file", "secateur delta pack writes one")
        with path.open("rb") as handle:
            self.header = self._read(handle)
        problem = misplaced(list(self.header.files), self.header.weights or ())
        if problem:
            self.damaged(problem)

    def _read(self, handle: IO[bytes]) -> DeltaHeader:
        start = handle.read(8)
        length, size = int.from_bytes(start, "little"), self.path.stat().st_size
        if len(start) < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            self.damaged("it does not begin as a safetensors file does")
        head = handle.read(length)
        try:
            metadata = json.loads(head)["__metadata__"]
            digest, text = str(metadata[_DIGEST]), str(metadata[_KEY])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged("it is no delta that secateur wrote")
        found = hashlib.sha256(start + head.replace(digest.encode(), _BLANK.encode(), 1))
        while piece := handle.read(_CHUNK):
            found.update(piece)
        if found.hexdigest() != digest:
            self.damaged(f"its {size} bytes are not those that were written")
        try:
            return DeltaHeader.model_validate_json(text)
        except ValidationError as error:
            self.damaged(f"its header is not understood ({error.errors()[0]['msg']})")

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A function from names to tensors; one that was left out for having no elements is None."""
        with ExitStack() as stack:
            try:
                handle = stack.enter_context(safe_open(self.path, framework="pt"))
                names = set(handle.keys())
                yield lambda name: handle.get_tensor(name) if name in names else None
            except SafetensorError as error:
                self.damaged(str(error))

    def damaged(self, found: str) -> NoReturn:
        """Refuse the file."""
        refuse("bad-delta", f"delta {str(self.path)!r}", found, "fetch or write it again")
