"""A few thousand raw signals of a place, for what no moment can say."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 2048


class Samples:
    """Evenly spaced rows of a signal, at least ``limit`` of them and fewer than twice as many once there are enough.

    Whenever twice the limit is reached, every second row goes and the stride doubles, so what stays depends on the
    order of the signals alone. The first token of a window, which carries massive activations, is passed over.

    Args:
        limit: rows that are enough.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._stride, self._seen = limit, 1, 0
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, signal: Tensor) -> None:
        """Add a signal of shape [windows, tokens, width], or [..., width] without windows."""
        if signal.ndim == 3 and signal.shape[1] > 1:
            signal = signal[:, 1:]
        rows = signal.detach().reshape(-1, signal.shape[-1])
        first = -self._seen % self._stride
        self._seen += len(rows)
        taken = rows[first :: self._stride].cpu()
        self._rows.append((taken if taken.dtype == torch.float64 else taken.float()).clone())
        self._count += len(taken)
        while self._count >= 2 * self._limit:
            kept = torch.cat(self._rows)[::2].clone()
            self._rows, self._count, self._stride = [kept], len(kept), 2 * self._stride

    def close_shard(self) -> None:
        """Nothing: rows are kept in their order."""

    def named(self, name: str) -> dict[str, Tensor]:
        """``NAME.samples``: [rows, width]."""
        return {f"{name}.samples": torch.cat(self._rows)} if self._rows else {}
