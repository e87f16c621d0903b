"""Uncentred second moments of signals."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 4096  # rows of one float32 product; sums over chunks are float64


class GramCollector:
    """Accumulates G = sum over tokens of x x^T, products in float32 (float64 for float64 signals), sums in float64.

    Gathered one logical shard at a time: ``close_shard`` adds a shard's sum to the total, so the order of the
    float64 additions does not depend on how many processes share the shards.

    Args:
        width: dimensions of the signal.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._shard = torch.zeros_like(self.total)

    def add(self, signal: Tensor) -> None:
        """Add a signal of shape [..., width]."""
        rows = signal.detach().reshape(-1, signal.shape[-1])
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        for chunk in torch.split(rows, _CHUNK):
            self._shard += chunk.t() @ chunk

    def close_shard(self) -> None:
        """Add the running shard to the total and start the next."""
        self.total += self._shard
        self._shard.zero_()
