"""Messages between processes: JSON with tensors in it. Nothing that comes over the network is ever executed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from secateur.engine.processes import Shared

_TENSOR: Final = "@tensor"
_OBJECT: Final = "@object"
_LENGTH: Final = 8  # bytes in front of the JSON that say how long it is
SMALL: Final = 2**16
"""Bytes up to which a tensor travels inside its message."""


def is_small(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize <= SMALL


def encode(content: Any) -> tuple[bytes, list[Tensor]]:
    """A message and the tensors that travel beside it; shared objects go by their number."""
    inside: list[bytes] = []
    beside: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach()
            if is_small(tensor):
                inside.append(raw(tensor.cpu()).numpy().tobytes())
            else:
                beside.append(tensor)
            return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
        if isinstance(value, Shared):
            return {_OBJECT: value.number}
        if isinstance(value, dict):
            return {str(key): plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, set | frozenset):
            return sorted(value)
        return value

    said = json.dumps(plain(content)).encode()
    return b"".join((len(said).to_bytes(_LENGTH, "little"), said, *inside)), beside


def decode(message: bytes, receive: Callable[[torch.dtype, list[int]], Tensor], objects: dict[int, Any]) -> Any:
    """The content of a message.

    Args:
        receive: the next tensor beside it, of a data type and shape.
        objects: by their number.
    """
    at = _LENGTH + int.from_bytes(message[:_LENGTH], "little")

    def tensor(dtype: torch.dtype, shape: list[int]) -> Tensor:
        nonlocal at
        size = math.prod(shape) * dtype.itemsize
        if size > SMALL:
            return receive(dtype, shape)
        if not size:
            return torch.empty(shape, dtype=dtype)
        found, at = bytearray(message[at : at + size]), at + size
        return torch.frombuffer(found, dtype=dtype).reshape(shape)

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_TENSOR}:
                dtype, shape = value[_TENSOR]
                return tensor(getattr(torch, dtype), shape)
            if value.keys() == {_OBJECT}:
                return objects[value[_OBJECT]]
            return {key: full(each) for key, each in value.items()}
        return [full(each) for each in value] if isinstance(value, list) else value

    return full(json.loads(message[_LENGTH:at]))


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def blank(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    """A tensor to receive into."""
    return torch.empty(math.prod(shape), dtype=dtype, device=device).reshape(tuple(shape))
