"""One plain forward pass, and one whole prune with its phases, timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

RATIO = 0.25
BATCH_TOKENS = 4096


class Clock:
    """Wall and processor seconds of this process since it was made; the latter tell what a busy machine would have."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> Spent:
        """Seconds so far."""
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._processor)


class Spent(NamedTuple):
    """Seconds by the clock and of the processor."""

    wall: float
    processor: float


class Phases:
    """Progress that remembers when each sweep began and made its last step."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._now = ""

    def start(self, what: str, total: int) -> None:
        del total
        self._add(f"before {what}")
        self._now = what

    def step(self, done: int) -> None:
        del done
        self._add(self._now)

    def note(self, message: str) -> None:
        del message

    def end(self) -> dict[str, float]:
        """Seconds by phase, the rest included."""
        self._add("report and publish")
        return {what: round(spent, 2) for what, spent in self.seconds.items()}

    def _add(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now


def forward_seconds(model: Any, ids: Any) -> Spent:
    """One pass over all windows, logits of every token computed and dropped."""
    import torch

    rows = max(1, BATCH_TOKENS // ids.shape[1])
    clock = Clock()
    with torch.no_grad():
        for batch in ids.split(rows):
            model(input_ids=batch, use_cache=False)
    return clock.read()


def prune_seconds(
    model: Path, data: Path, windows: int, length: int, output: Path, method: str, **options: Any
) -> tuple[Spent, dict[str, float]]:
    """The whole call: calibrate, cut, write, verify."""
    import secateur

    phases, clock = Phases(), Clock()
    secateur.prune(
        model,
        method=method,
        ratio=RATIO,
        data=data,
        samples=windows,
        length=length,
        output=output,
        device="cpu",
        progress=phases,
        **options,
    )
    return clock.read(), phases.end()
