"""The calibration signal between two blocks: in memory when small, in a mapped file when large."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.data.windows import PADDING
from secateur.engine.blocks import BlockRunner, Call
from secateur.errors import refuse

SHARDS = 8
"""Logical shards of the calibration data; each is accumulated whole, sums are combined in their order."""
BATCH_TOKENS = 4096
IN_MEMORY = 128 * 2**20  # bytes


class Activations:
    """Hidden states of all windows at the input of one block.

    Where several processes share the windows, each has whole shards of them: the first process the first ones. Rows
    and batches are counted from its own first window.

    Args:
        ids: [count, length] token ids of all windows.
        runner: stock model whose stem is loaded.
        path: where a large signal is kept.
        group: rows that always share a batch.
        part: which process this is, of how many.

    Attributes:
        first: window of all at which this process begins.
        earlier: batches of the processes before, as slices of all windows.
    """

    def __init__(
        self, ids: Tensor, runner: BlockRunner, path: Path, group: int = 1, part: tuple[int, int] = (0, 1)
    ) -> None:
        self.runner, (rank, processes) = runner, part
        count, length = ids.shape
        rows = max(1, BATCH_TOKENS // length // group) * group
        bounds = [count // group * shard // SHARDS * group for shard in range(SHARDS + 1)]
        begin, end = (SHARDS * number // processes for number in (rank, rank + 1))
        self.first = bounds[begin]
        self.ids = ids[self.first : bounds[end]]
        self.earlier = [batch for shard in _batches(bounds[: begin + 1], rows, 0) for batch in shard]
        self.shards = _batches(bounds[begin : end + 1], rows, self.first)
        width = runner.architecture.sizes.residual
        self.values = _signal(path, (*self.ids.shape, width), runner.dtype, runner.device)
        self.padded = bool((ids == PADDING).any())
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def capture(self) -> None:
        """Fill with the first block's inputs and remember every block's arguments.

        Arguments are kept once per batch shape as long as the stock model passes equal ones.
        """
        for batch in self.batches:
            hidden, calls = self.runner.capture(self.ids[batch])
            require_finite_signal(hidden, "the embedding", self.first + batch.start)
            self.values[batch] = hidden.to(self.values.device)
            self._remember(batch, calls)

    def _remember(self, batch: slice, calls: list[Call]) -> None:
        for (start, stop), known in self._calls.items():
            if stop - start == batch.stop - batch.start and all(map(_same, known, calls)):
                calls = known
                break
        self._calls[batch.start, batch.stop] = calls

    def there(self, batch: slice) -> Tensor | None:
        """Where the texts of a batch have tokens, [rows, length]; None where they are all of one length."""
        found = (self.ids[batch] != PADDING).to(self.runner.device)
        return None if found.all() else found

    @property
    def batches(self) -> list[slice]:
        return [batch for shard in self.shards for batch in shard]

    def call(self, batch: slice, block: int) -> Call:
        """Arguments of a block for one batch."""
        return self._calls[batch.start, batch.stop][block]

    def call_for(self, batch: slice, rows: slice, block: int) -> Call:
        """Arguments of a block for some rows of a batch."""
        call, many = self.call(batch, block), batch.stop - batch.start
        if (rows.start, rows.stop) == (batch.start, batch.stop):
            return call
        part = slice(rows.start - batch.start, rows.stop - batch.start)
        return Call(_rows(call.args, many, part), _rows(call.kwargs, many, part))

    @property
    def sampled_before(self) -> tuple[int, int] | None:
        """Rows that samples see in the processes before, of signals with windows, whose first token is passed over, and
        of others; None where texts differ in length."""
        length = self.ids.shape[1]
        return None if self.padded else (self.first * max(1, length - 1), self.first * length)

    def save(self, path: Path, block: int) -> None:
        """Keep a copy of the signal in front of ``block``, replacing an older one in one step."""
        temporary = path.with_suffix(".new")
        where = torch.tensor([block, self.first])
        save_file({"values": self.values.contiguous(), "block": where}, temporary)
        temporary.replace(path)

    def restore(self, path: Path, limit: int) -> int:
        """Take the signal from a copy that stands no further than in front of ``limit``; returns where it stands.

        A copy of other windows is left alone.
        """
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as handle:
            block, first = handle.get_tensor("block").tolist()
            same = first == self.first and tuple(handle.get_slice("values").get_shape()) == self.values.shape
            if block > limit or not same:
                return 0
            self.values.copy_(handle.get_tensor("values"))
        return int(block)


def _batches(bounds: Sequence[int], rows: int, first: int) -> list[list[slice]]:
    """The batches of the shards between some bounds, counted from ``first``."""
    return [
        [slice(start - first, min(start + rows, stop) - first) for start in range(begin, stop, rows)]
        for begin, stop in pairwise(bounds)
    ]


def _signal(path: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where the signal lies: on a GPU if it takes less than a quarter of what is free there; else stored."""
    if device.type == "cuda" and math.prod(shape) * dtype.itemsize < torch.cuda.mem_get_info(device)[0] // 4:
        return torch.empty(shape, dtype=dtype, device=device)
    return stored(path, shape, dtype)


def require_finite_signal(signal: Tensor, where: str, first: int) -> None:
    """Refuse a signal [windows, tokens, width] with NaN or infinity, naming where it came out and the window.

    Args:
        first: number of the first window among all.
    """
    if torch.isfinite(signal.sum()):  # one pass; a sum may overflow where no value does
        return
    bad = torch.nonzero(~torch.isfinite(signal))
    if len(bad):
        window, token = first + int(bad[0, 0]), int(bad[0, 1])
        found = f"values of {where} are not finite, first in calibration window {window} at token {token}"
        refuse("not-finite", "the forward pass", found, "try --dtype float32, or look at the checkpoint")


def real(signal: Tensor, there: Tensor | None) -> Tensor:
    """The rows of a signal [windows, tokens, width] or [windows * tokens, width] at which there is a token."""
    return signal if there is None else signal.reshape(-1, signal.shape[-1])[there.flatten()]


def stored(path: Path, shape: tuple[int, ...], dtype: torch.dtype, limit: int = IN_MEMORY) -> Tensor:
    """An uninitialised tensor, in memory or, of more than ``limit`` bytes, in a mapped file."""
    elements = math.prod(shape)
    if elements * dtype.itemsize <= limit:
        return torch.empty(shape, dtype=dtype)
    with path.open("ab") as handle:  # a mapped file with holes would end the process where the disk is full
        os.posix_fallocate(handle.fileno(), 0, elements * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(shape)


def _rows(value: Any, many: int, part: slice) -> Any:
    """The rows ``part`` of everything that has one for each of ``many`` windows."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim > 1 and value.shape[0] == many > 1 else value
    if isinstance(value, list | tuple):
        return type(value)(_rows(item, many, part) for item in value)
    if isinstance(value, dict):
        return {key: _rows(item, many, part) for key, item in value.items()}
    return value


def _same(one: Call, other: Call) -> bool:
    return _equal(one.args, other.args) and _equal(one.kwargs, other.kwargs)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and bool(torch.equal(one, other)))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return one is other or bool(one == other)
