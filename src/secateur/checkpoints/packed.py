"""Packed weight files: safetensors in which tensors with zeros are stored in fewer bytes.

A file ``packed*.safetensors`` takes the place of one ``model*.safetensors``, so that transformers, which knows no
packed tensors, finds no weights instead of wrong ones. A tensor that has no smaller form lies in it as ever; one that
has lies there as ``NAME:values`` and ``NAME:where``, and its form stands in the file's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from secateur.checkpoints.forms import Bits, Form
from secateur.checkpoints.headers import DTYPES, WEIGHT_DTYPES, TensorHeader
from secateur.errors import refuse

MODEL: Final = "model"
PACKED: Final = "packed"
_KEY: Final = "secateur_packed"
_NO_NAME: Final = frozenset("/\\\0")
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Record(BaseModel):
    """What the metadata of a packed file says.

    Attributes:
        version: of this format.
        file: name of the file that it takes the place of.
        tensors: form of every tensor that is not stored as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    file: str
    tensors: dict[str, Form]

    @property
    def metadata(self) -> dict[str, str]:
        """As a safetensors file holds it."""
        return {_KEY: self.model_dump_json()}


def packed_name(file: str) -> str:
    """Name of the packed file that takes a file's place."""
    return PACKED + (file.removeprefix(MODEL) if file.startswith(MODEL) else f"-{file}")


def part_names(name: str) -> tuple[str, str]:
    """Under which names a tensor's values and the places of its values are stored."""
    return f"{name}:values", f"{name}:where"


def bits_of(tensor: Tensor) -> Bits:
    """A tensor of weights as unsigned integers in one dimension; shares its memory."""
    flat = tensor.contiguous().view(-1)
    found: Bits = flat.view(_BITS[tensor.element_size()]).numpy().view(f"u{tensor.element_size()}")
    return found


def tensor_of(bits: Bits, dtype: torch.dtype) -> Tensor:
    """The inverse of ``bits_of``."""
    if not len(bits):  # arrays without elements may have strides that torch does not take
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype)


def plain_file_name(name: object) -> bool:
    """Whether a name is one of a file in the folder itself."""
    return isinstance(name, str) and can_name(name) and not name.startswith(".")


def can_name(part: str) -> bool:
    """Whether a file or folder can be called so, on any system, without being another one."""
    try:
        length = len(part.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length < 256 and part not in (".", "..") and not _NO_NAME.intersection(part)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of weights.

    Attributes:
        header: as it is when it is read.
        file: in which it lies.
        form: in which it lies there; None: as it is.
        bytes: that it takes there.
    """

    header: TensorHeader
    file: str
    form: Form | None
    bytes: int


def dense_tensors(handle: Any, file: str) -> dict[str, Stored]:
    """The tensors of an open safetensors file, by name."""
    found = {}
    for name in handle.keys():  # noqa: SIM118  (not a mapping)
        view = handle.get_slice(name)
        dtype = view.get_dtype()
        if dtype not in DTYPES:
            refuse("dtype", f"tensor {name}", f"data type {dtype}", "dequantise the checkpoint first")
        header = TensorHeader(name, file, dtype, tuple(view.get_shape()))
        found[name] = Stored(header, file, None, header.bytes)
    return found


def packed_tensors(handle: Any, file: str) -> dict[str, Stored]:
    """The tensors of an open packed file, by name.

    Raises:
        RequestError: its record does not describe what it holds.
    """
    record = _record(handle, file)
    if not plain_file_name(record.file) or not record.file.endswith(".safetensors"):
        _refuse(file, f"the file name {record.file!r} leaves the folder")
    there = dense_tensors(handle, file)
    parts = {part for name in record.tensors for part in part_names(name)}
    absent = sorted(parts - set(there))
    if absent:
        _refuse(file, f"{absent[0]} is not in it")
    found = {
        name: replace(stored, header=replace(stored.header, file=record.file))
        for name, stored in there.items()
        if name not in parts
    }
    for name, form in record.tensors.items():
        values, where = (there[part] for part in part_names(name))
        dtype, number = values.header.dtype, values.header.shape
        fits = len(number) == 1 and dtype in WEIGHT_DTYPES
        if name in found or not fits or (where.header.dtype, where.header.shape) != ("U8", (form.where,)):
            _refuse(file, f"the record of tensor {name} does not fit what is stored")
        header = TensorHeader(name, record.file, dtype, form.shape)
        found[name] = Stored(header, file, form, values.bytes + where.bytes)
    return found


def read_stored(handle: Any, stored: Stored) -> Tensor:
    """A tensor of an open file as it was before it was packed.

    Raises:
        RequestError: what is stored does not fit its record.
    """
    name = stored.header.name
    if stored.form is None:
        found: Tensor = handle.get_tensor(name)
        return found
    values, where = (handle.get_tensor(part) for part in part_names(name))
    try:
        bits = stored.form.decode(bits_of(values), where.numpy())
    except ValueError as error:
        _refuse(stored.file, f"tensor {name} holds {error}")
    return tensor_of(bits, DTYPES[stored.header.dtype]).view(stored.header.shape)


def _record(handle: Any, file: str) -> Record:
    text = (handle.metadata() or {}).get(_KEY)
    if text is None:
        _refuse(file, "its metadata does not say how it is packed")
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(file, f"its record is not understood ({'.'.join(map(str, first['loc']))}: {first['msg']})")


def _refuse(file: str, found: str) -> NoReturn:
    refuse("bad-packed", f"reading {file}", found, "fetch or write it again")


def packed_parts(header: TensorHeader, form: Form | None, nonzeros: int) -> Iterator[TensorHeader]:
    """Headers of what a tensor is in its packed file."""
    file = packed_name(header.file)
    if form is None:
        yield TensorHeader(header.name, file, header.dtype, header.shape)
        return
    values, where = part_names(header.name)
    yield TensorHeader(values, file, header.dtype, (form.stored(nonzeros),))
    yield TensorHeader(where, file, "U8", (form.where,))
