"""Measured latency of a decoder at any sizes, from stock blocks with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from secateur.engine.blocks import BlockRunner
from secateur.families import Architecture, Sizes

_TOKENS, _REPEATS = 128, 7


class LatencyModel:
    """Seconds of a forward pass over 128 tokens: one stock block timed, times the depth, plus the stem.

    Args:
        architecture: the dense architecture.
        dtype: compute type.
        device: where to measure.
    """

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self._measured: dict[Sizes, float] = {}

    def __call__(self, sizes: Sizes) -> float:
        """Least seconds at ``sizes``; measured once each."""
        if sizes not in self._measured:
            self._measured[sizes] = self._measure(sizes)
        return self._measured[sizes]

    def _measure(self, sizes: Sizes) -> float:
        depth = len(sizes.blocks)
        target = self._architecture.resized(sizes.resized("blocks", 1), kept_blocks=[0])
        runner = BlockRunner(target, self._dtype, self._device)
        generator = torch.Generator().manual_seed(0)
        for place in target.places:
            shapes = {t.name: target.shapes[t.name] for t in target.tensors_of(place)}
            runner.load(place, {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()})
        ids = torch.randint(sizes.vocab, (1, _TOKENS), generator=generator)
        hidden, calls = runner.capture(ids)
        block, stem = [], []
        for _ in range(_REPEATS):
            block.append(self._seconds(partial(runner.run, 0, hidden, calls[0])))
            stem.append(self._seconds(partial(runner.logits, ids, hidden)))
        return depth * min(block) + min(stem)

    def _seconds(self, work: Callable[[], object]) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started
