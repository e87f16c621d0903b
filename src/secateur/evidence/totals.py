"""Sums over the logical shards of the calibration data, added in the order of the shards whoever holds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Later = Callable[[Tensor], Tensor]
"""Copies the sum of a shard to where it waits."""


class Total:
    """A sum that is gathered shard by shard: what is added goes into the running shard, closed shards into the total.

    Where an earlier process holds the shards before these, their sums wait until its total comes, so that the
    additions are those of one process, in the same order.

    Args:
        shape, dtype, device: of the sum.
        later: given where the shards wait; there is no total then until ``continue_from``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        later: Later | None = None,
    ) -> None:
        self.running = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.running) if later is None else self.running[:0]
        self._later = later
        self._waiting: list[Tensor] = []

    def close_shard(self) -> None:
        """End the running shard and start the next."""
        if self._later is None:
            self.value += self.running
        else:
            self._waiting.append(self._later(self.running))
        self.running.zero_()

    def continue_from(self, before: Tensor) -> Tensor:
        """The total of the shards before these and of these, in place of ``before``."""
        for shard in self._waiting:
            before += shard.to(before.device)
        self._waiting = []
        return before
