"""How much memory and time a prune will take, from headers and from what this machine does in a moment."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from secateur.budgets import Costs
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.folder import DTYPES
from secateur.engine.activations import BATCH_TOKENS, IN_MEMORY, SHARDS
from secateur.engine.verify import WHOLE_MODEL
from secateur.families import Sizes
from secateur.methods.base import Method

INTERPRETER: Final = 300 * 2**20
"""Anonymous memory of Python with torch and transformers."""
START: Final = 3.5e9
"""Elements that are squared while a model is opened, its stock class built on no memory, and a report written."""
_EIGEN: Final = 14  # FLOPs of eigenvectors in float64 over n^3, at the rate of float32 products
_BLOCK: Final = 2**24  # bytes read, written or hashed at a time
_LARGE: Final = 2**26
_NOMINAL: Final = 1e9  # bytes a second, where there are too few to matter


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, with the threads it has now.

    Attributes:
        read: bytes of the model's files.
        write: bytes of a new file, and their SHA-256.
        hash: bytes of a SHA-256.
        multiply: FLOPs of a float32 product.
        square: elements squared and summed in float64, as scores do.
        load: elements made float32 in memory that is new.
    """

    read: float
    write: float
    hash: float
    multiply: float
    square: float
    load: float

    @classmethod
    def of(cls, file: Path, folder: Path) -> Rates:
        """Measure for about half a second; of small files, whose bytes take no time, not what the disk does.

        Args:
            file: the largest file of a model.
            folder: where output will be written; an unnamed file is written there for a moment.
        """
        hashing, multiply, squares, loading = _processor()
        large = file.stat().st_size >= _LARGE
        reading, writing = (_reading(file), _writing(folder)) if large else (_NOMINAL, _NOMINAL)
        return cls(reading, 1 / (1 / writing + 1 / hashing), hashing, multiply, squares, loading)


@cache
def _processor() -> tuple[float, float, float, float]:
    """Rates of SHA-256, of products, of squares, and of new memory."""
    block, matrix = bytes(_BLOCK), torch.ones(768, 768)
    values = torch.ones(2**22, dtype=torch.bfloat16)

    def square() -> None:
        for chunk in torch.split(values, 2**15):
            chunk.float().square().sum(dtype=torch.float64)

    hashing = _rate(lambda: hashlib.sha256(block), _BLOCK)
    multiply = _rate(lambda: matrix @ matrix, 2 * 768**3)
    large = values.repeat(8)  # beyond what the heap keeps for the next one
    return hashing, multiply, _rate(square, values.numel()), _rate(large.float, large.numel())


def _writing(folder: Path) -> float:
    block, written = bytes(_BLOCK), 0
    with tempfile.TemporaryFile(dir=folder) as handle:

        def write() -> None:
            nonlocal written
            written += os.pwrite(handle.fileno(), block, written % 2**27)

        return _rate(write, _BLOCK)


def _reading(file: Path) -> float:
    size, place = file.stat().st_size, 0
    with file.open("rb") as handle:

        def read() -> None:
            nonlocal place
            handle.seek(place % (size - _BLOCK))
            handle.read(_BLOCK)
            place += 5 * _BLOCK

        return _rate(read, _BLOCK)


def _rate(work: Callable[[], object], amount: int, seconds: float = 0.1) -> float:
    """Amount per second; the first go is not counted."""
    work()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        done += amount
    return done / (time.perf_counter() - began)


class Foresight:
    """What a prune will take.

    Args:
        checkpoint: the model.
        method: with its options.
        costs: of the model.
        after: sizes that will remain.
        windows, length: of the calibration text.
        dtype: of the forward pass.
        device: where it computes; what lies on a GPU is not counted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        costs: Costs,
        after: Sizes,
        windows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._method, self._after = checkpoint, method, after
        architecture, headers = checkpoint.architecture, checkpoint.folder.headers
        self._before = architecture.sizes
        self._tokens, self._length = windows * length, length
        elements = {
            place: sum(headers[packed.name].elements for packed in checkpoint.packed[place])
            for place in architecture.places
        }
        self._stem = elements[None]
        self._blocks = [count for place, count in elements.items() if place is not None]
        self._block = max(self._blocks, default=0)
        kept = (costs.params(after) - self._stem) / max(1, len(after.blocks))
        mean = sum(self._blocks) / max(1, len(self._blocks))
        self._left = min(1.0, max(0.0, kept / max(1.0, mean)))
        """Share of a block that stays."""
        self._bytes, self._params = costs.bytes(after), costs.params(after)
        self._stored = max((DTYPES[d].itemsize for d in checkpoint.dtypes.values()), default=4)
        self._wide = dtype.itemsize
        self._here = device.type == "cpu"
        same = all(DTYPES[d] == dtype for d in checkpoint.dtypes.values())
        self._loaded = 0 if same or not self._here else dtype.itemsize
        """Bytes of a loaded element: those of a mapped file count for nothing."""

    # -- memory --------------------------------------------------------------------------------------------------------

    @property
    def peak_bytes(self) -> int:
        """Peak anonymous memory: the interpreter, and what the largest of the phases holds besides."""
        calibrated = self._method.data != "none"
        phases = [self._cutting, self._checking, *([self._walking] if calibrated else [])]
        return int(INTERPRETER + max(phases))

    @property
    def _cutting(self) -> float:
        """Two places after the cut, one being made while the last is let go; rotations are made in float32."""
        turned = self._after.residual != self._before.residual
        place = max(self._block * self._left, self._stem if turned else 0)
        return place * (2 * self._stored + (4 if turned else 0))

    @property
    def _checking(self) -> float:
        """The stem; then a block cut again from the source and loaded; a small model whole."""
        probe = 4 if self._stored != 4 else 0
        found = max(self._stem * probe, self._block * self._left * (self._stored + probe))
        if self._bytes <= WHOLE_MODEL:
            found = max(found, self._params * 4 + self._stem * probe + self._block * self._left * probe)
        return found

    @property
    def _walking(self) -> float:
        """Stem and one block, of a comparison with the dense model both; the signal; a batch; evidence; mends."""
        method, sizes = self._method, self._before
        names = frozenset[str]().union(method.evidence, *method.mends)
        models = 2 if any(name.endswith((".cross", ".target")) for name in names) else 1
        signal = min(self._tokens * sizes.residual * self._wide, IN_MEMORY)
        total: float = models * ((self._stem + self._block) * self._loaded + signal)
        if self._here:
            total += self._batch * self._wide * (3 * self._ffn + 6 * sizes.residual)
        grams = self._grams(names)
        total += sum(2 * 8 * width**2 for width in grams) + 3 * max((width**2 for width in grams), default=0)
        if method.mends:  # least squares in float64: a part of the Gram, its factor, the matrix before and behind
            total += 8 * (3 * (self._left * self._ffn) ** 2 + 4 * self._ffn * sizes.residual)
        return total

    @property
    def _ffn(self) -> int:
        return max((block.ffn for block in self._before.blocks), default=0)

    @property
    def _batch(self) -> int:
        """Tokens that a block sees at once."""
        shard = -(-self._tokens // (SHARDS * self._length)) * self._length
        return min(shard, max(self._length, BATCH_TOKENS // self._length * self._length))

    def _grams(self, names: frozenset[str]) -> list[int]:
        """Widths of the Gram matrices that are gathered together."""
        residual, ffn = self._before.residual, self._ffn
        found = []
        for name in names:
            role, _, kind = name.rpartition(".")
            if name == "stream":
                found += [residual, residual]
            elif kind in ("gram", "cross", "target"):
                found += {"inputs": [residual, residual, residual, ffn], "down": [ffn]}.get(role, [residual])
        return found

    # -- time ----------------------------------------------------------------------------------------------------------

    def seconds(self, measure: Callable[[], Rates]) -> float | None:
        """Seconds of the run, its report included; None for a method whose work does not follow from its sweeps."""
        if not self._method.timed or not self._here:
            return None
        rates = measure()
        source, out = self._checkpoint.folder.bytes, self._bytes
        width = max(self._stored, 1)
        scored = 0.0
        if self._method.data == "none" and self._method.roles:
            roles = set(self._method.roles)
            tensors = [t for t in self._checkpoint.architecture.tensors.values() if t.role in roles]
            shapes = self._checkpoint.architecture.shapes
            scored = float(sum(torch.Size(shapes[t.name]).numel() for t in tensors))
        left = self._left * self._block
        total = scored * width / rates.read + (START + scored) / rates.square
        total += source / rates.read + out / rates.write + self._left * sum(self._blocks) / rates.load  # the cut
        total += out / rates.read + out / rates.hash + (self._stem + 6 * left) / rates.load  # the check, of two blocks
        turned = self._after.residual != self._before.residual
        if turned:  # the eigenvectors of a basis, and the eigenvalues that are drawn
            flops = 2 * self._after.residual * (sum(self._blocks) + self._stem) + 2 * _EIGEN * self._before.residual**3
            total += flops / rates.multiply
        if self._method.data != "none":
            total += self._forward() / rates.multiply + source / rates.read
            total += (self._stem + sum(self._blocks) + self._summed()) / rates.load
        return total

    def _summed(self) -> float:
        """Elements of Gram matrices that are passed over: half of one for every batch, all for every shard, and mends.

        In units of an element that is made float32 in new memory, which takes about as long.
        """
        windows = self._tokens // max(1, self._length)
        shards = min(SHARDS, windows)
        batches = max(shards, self._tokens / self._batch)
        passes = batches + shards + (3 if self._method.mends else 0)
        names = frozenset[str]().union(self._method.evidence, *self._method.mends)
        return float(len(self._before.blocks) * passes * sum(width**2 for width in self._grams(names)))

    def _forward(self) -> float:
        """FLOPs of the walk: blocks, attention, the upper halves of Gram matrices, and least squares."""
        sizes, method, tokens = self._before, self._method, self._tokens
        blocks = len(sizes.blocks)
        heads = max((block.kv * block.group for block in sizes.blocks), default=0) * sizes.head
        total = float(tokens) * (2 * sum(self._blocks) + 4 * blocks * self._length * heads)
        names = frozenset[str]().union(method.evidence, *method.mends)
        total += blocks * tokens * sum(1.1 * width**2 for width in self._grams(names))
        if method.mends:  # in float64, half as fast
            kept, ffn = self._left * self._ffn, self._ffn
            total += 2 * blocks * (kept**3 / 3 + 2 * sizes.residual * kept * ffn)
            total += 2 * blocks * tokens * kept * sizes.residual  # what reads the neurons runs again
        return total
