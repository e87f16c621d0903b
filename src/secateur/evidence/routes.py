"""Which experts a router chooses, and with how much weight."""

from __future__ import annotations

import torch
from torch import Tensor


class Routes:
    """Counts over tokens of the experts chosen together, and the sums of their weights.

    Counts are whole numbers, exact in any order; weights are summed in float64, shard by shard.

    Args:
        experts: of the block.
        device: where to count.
    """

    def __init__(self, experts: int, device: torch.device) -> None:
        self.together = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        self.mass = torch.zeros(experts, dtype=torch.float64, device=device)
        self._shard = torch.zeros_like(self.mass)

    def add(self, chosen: Tensor, weights: Tensor) -> None:
        """Add the experts [tokens, k] that tokens are sent to, and what each is weighed with there."""
        marks = torch.zeros(len(chosen), len(self.mass), dtype=torch.float64, device=chosen.device)
        self.together += (marks.scatter(1, chosen, 1).t() @ marks.scatter(1, chosen, 1)).round()
        self._shard += marks.scatter(1, chosen, weights.to(marks)).sum(0)

    def close_shard(self) -> None:
        """Add the running shard's weights to the total."""
        self.mass += self._shard
        self._shard.zero_()

    def named(self, name: str) -> dict[str, Tensor]:
        """``NAME.coactivation``: [E, E], how many tokens visit both, on the diagonal each; ``NAME.mass``: [E]."""
        return {f"{name}.coactivation": self.together, f"{name}.mass": self.mass}
