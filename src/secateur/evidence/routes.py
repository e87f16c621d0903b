"""Which experts a router chooses, and with how much weight."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.evidence.totals import Later, Total


class Routes:
    """Counts over tokens of the experts chosen together, and the sums of their weights.

    Counts are whole numbers, exact in any order; weights are summed in float64, shard by shard.

    Args:
        experts: of the block.
        device: where to count.
        later: see :class:`Total`.
    """

    def __init__(self, experts: int, device: torch.device, later: Later | None = None) -> None:
        self._together = Total((experts, experts), device, later=later)
        self._mass = Total((experts,), device, later=later)

    @property
    def totals(self) -> list[Total]:
        return [self._together, self._mass]

    @property
    def together(self) -> Tensor:
        return self._together.value

    @property
    def mass(self) -> Tensor:
        return self._mass.value

    def add(self, chosen: Tensor, weights: Tensor) -> None:
        """Add the experts [tokens, k] that tokens are sent to, and what each is weighed with there."""
        marks = torch.zeros(len(chosen), len(self._mass.running), dtype=torch.float64, device=chosen.device)
        self._together.running += (marks.scatter(1, chosen, 1).t() @ marks.scatter(1, chosen, 1)).round()
        self._mass.running += marks.scatter(1, chosen, weights.to(marks)).sum(0)

    def close_shard(self) -> None:
        """Add the running shard to the totals."""
        for total in self.totals:
            total.close_shard()

    def named(self, name: str) -> dict[str, Tensor]:
        """``NAME.coactivation``: [E, E], how many tokens visit both, on the diagonal each; ``NAME.mass``: [E]."""
        return {f"{name}.coactivation": self.together, f"{name}.mass": self.mass}
