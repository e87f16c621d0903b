"""The network that generates the logits of all gates (DISP-LLM, arXiv:2410.11988, sec. 3.3): a GRU over the vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.gates.vectors import Gate

_CODE, _HIDDEN = 32, 64


class LogitGenerator(nn.Module):
    """Fixed random codes, one per vector, through a bidirectional GRU and a linear head each.

    It starts near zero: with the offset of the gates, all are open.

    Args:
        gates: the vectors, in the order of the forward pass.
        generator: of codes and first weights.
    """

    def __init__(self, gates: list[Gate], generator: torch.Generator) -> None:
        super().__init__()
        self.names = [gate.name for gate in gates]
        self.register_buffer("codes", torch.randn(len(gates), _CODE, generator=generator))
        self.recurrent = nn.GRU(_CODE, _HIDDEN, bidirectional=True)
        self.norm = nn.LayerNorm(2 * _HIDDEN)
        self.heads = nn.ModuleList(nn.Linear(2 * _HIDDEN, gate.size, bias=False) for gate in gates)
        for part, width in ((self.recurrent, _HIDDEN), (self.heads, 2 * _HIDDEN)):
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)

    def forward(self) -> dict[str, Tensor]:
        """Logits of every vector, by name."""
        states, _ = self.recurrent(self.codes)
        states = nn.functional.gelu(self.norm(states))
        return {name: head(state) for name, head, state in zip(self.names, self.heads, states, strict=True)}
