"""Random gates with a gradient: values in [0, 1] of which a logit is learned."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Estimator = Literal["soft", "ste", "reinmax"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
OFFSET, TEMPERATURE = 3.0, 0.4


def gate(logits: Tensor, estimator: Estimator, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Gates of some logits, as the network gets them and as 0 or 1 for counting; both carry gradients.

    ``soft``: sigmoid of the logits and a Gumbel sample, as the released code has it; counted where above a half, by the
    straight-through estimator. ``ste``: the same, 0 or 1 in the network too. ``reinmax``: a Bernoulli draw b with the
    gradient 2 q (1 - q) - p (1 - p) / 2, q = (b + p) / 2, which is exact in the mean up to second order (ReinMax,
    arXiv:2304.08612, as the paper asks for).

    Args:
        logits: any shape; a gate is open where logit + 3 is above 0.
        estimator: which of them.
        generator: of the noise; None: no noise.
    """
    scaled = (logits + OFFSET) / TEMPERATURE
    if estimator == "reinmax":
        chance = torch.sigmoid(scaled)
        hard = (_uniform(logits, generator) < chance).to(chance) if generator else (chance > 0.5).to(chance)
        values = _reinmax(scaled, chance, hard)
        return values, values
    if generator:
        scaled = scaled - torch.log(-torch.log(_uniform(logits, generator))) / TEMPERATURE
    soft = torch.sigmoid(scaled)
    hard = (soft > 0.5).to(soft) + (soft - soft.detach())
    return (soft if estimator == "soft" else hard), hard


def _reinmax(scaled: Tensor, chance: Tensor, hard: Tensor) -> Tensor:
    """The value of ``hard`` with ReinMax's gradient with respect to ``scaled``."""
    middle = ((hard + chance) / 2).detach()
    slope = 2 * middle * (1 - middle) - chance.detach() * (1 - chance.detach()) / 2
    return hard.detach() + slope * (scaled - scaled.detach())


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers inside (0, 1), drawn on the CPU so that every device sees the same."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return drawn.to(like)
