"""Measured latency of a decoder at any sizes, from stock blocks with random weights."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from secateur.engine.blocks import BlockRunner
from secateur.families import Architecture, Layout, Sizes, resized

_TOKENS, _REPEATS = 128, 7


class LatencyModel:
    """Seconds of a forward pass over 128 tokens: one stock block of each size timed, times their number, plus the stem.

    Args:
        architecture: the dense architecture.
        layout: of what is measured.
        dtype: compute type.
        device: where to measure.
    """

    def __init__(self, architecture: Architecture, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._architecture, self._layout, self._dtype, self._device = architecture, layout, dtype, device
        self._measured: dict[Sizes, float] = {}

    def __call__(self, sizes: Sizes) -> float:
        """Least seconds at ``sizes``; measured once each."""
        if sizes not in self._measured:
            self._measured[sizes] = self._measure(sizes)
        return self._measured[sizes]

    def _measure(self, sizes: Sizes) -> float:
        total, stem = 0.0, 0.0
        for block, count in Counter(sizes.blocks).items():
            seconds, stem = self._measure_one(sizes, sizes.blocks.index(block))
            total += count * seconds
        return total + stem

    def _measure_one(self, sizes: Sizes, index: int) -> tuple[float, float]:
        """Seconds of one block and of the stem."""
        target = resized(self._architecture, sizes.kept_blocks([index]), [index], self._layout)
        runner = BlockRunner(target, self._dtype, self._device)
        generator = torch.Generator().manual_seed(0)
        for place in target.places:
            tensors = {}
            for tensor in target.tensors_of(place):
                shape = target.shapes[tensor.name]
                values = 0.02 * torch.randn(shape, generator=generator)
                tensors[tensor.name] = torch.arange(*shape, dtype=torch.int32) if tensor.is_index else values
            runner.load(place, tensors)
        ids = torch.randint(sizes.vocab, (1, _TOKENS), generator=generator)
        hidden, calls = runner.capture(ids)
        block, stem = [], []
        for _ in range(_REPEATS):
            block.append(self._seconds(partial(runner.run, 0, hidden, calls[0])))
            stem.append(self._seconds(partial(runner.outputs, ids, hidden)))
        return min(block), min(stem)

    def _seconds(self, work: Callable[[], object]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started
