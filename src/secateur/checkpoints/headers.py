"""What a safetensors header says, and the header of a file to be written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch

from secateur.families.packing import Shape

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHT_DTYPES: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    name: str
    file: str
    dtype: str
    shape: Shape

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class FileHeader:
    """The first bytes of a safetensors file, and where its tensors lie.

    Attributes:
        text: the length of the JSON and the JSON itself.
        offsets: first byte of every tensor in the file, by name.
        bytes: size of the file.
    """

    text: bytes
    offsets: dict[str, int]
    bytes: int

    @classmethod
    def of(cls, members: Iterable[TensorHeader], metadata: Mapping[str, str] | None = None) -> FileHeader:
        """The header of a file with these tensors: those of wide types first, so that all are aligned."""
        content: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position, starts = 0, {}
        for header in sorted(members, key=lambda h: (-h.itemsize, h.name)):
            end = position + header.bytes
            content[header.name] = {
                "dtype": header.dtype,
                "shape": list(header.shape),
                "data_offsets": [position, end],
            }
            starts[header.name], position = position, end
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        return cls(text, {name: len(text) + start for name, start in starts.items()}, len(text) + position)
