"""Sizes that differ from block to block: what a ranking of all units leaves of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateur.budgets.path import SizesPath
from secateur.families import Kind, Sizes
from secateur.families.sizes import FIELD_OF
from secateur.spaces import Space, all_spaces


class GlobalRanking(SizesPath):
    """The sizes that remain when the n best of all units of some kinds stay, n rising.

    Every block keeps at least one grain of each kind, and as many experts as a token visits. The routed experts of a
    block share one width, the mean of what each would keep.

    Args:
        base: sizes to start from.
        scores: one number per unit of every space, by its name, by kind; higher stays.
        grains: sizes of each kind are multiples of it.
    """

    def __init__(self, base: Sizes, scores: Mapping[Kind, Mapping[str, Tensor]], grains: Mapping[Kind, int]) -> None:
        self._base, self._grains = base, grains
        self._spaces = [space for kind in scores for space in all_spaces(base, kind)]
        every = [scores[space.kind][space.name].double() for space in self._spaces]
        owners = torch.cat([torch.full((s.size,), i) for i, s in enumerate(self._spaces)])
        self._owners = owners[torch.sort(torch.cat(every), descending=True, stable=True).indices]
        self._steps = max(1, len(self._owners) // 4096)

    def __len__(self) -> int:
        return len(self._owners) // self._steps + 1

    def point(self, index: int) -> Sizes:
        count = len(self._owners) if index == len(self) - 1 else index * self._steps
        kept = torch.bincount(self._owners[:count], minlength=len(self._spaces)).tolist()
        blocks = list(self._base.blocks)
        for kind in self._grains:
            for place in range(len(blocks)):
                here = [(s, n) for s, n in zip(self._spaces, kept, strict=True) if (s.place, s.kind) == (place, kind)]
                shared = [(s, n) for s, n in here if s.expert == "shared"]
                others = [(s, n) for s, n in here if s.expert != "shared"]
                change: dict[str, Any] = {}
                if others:
                    mean = sum(n for _, n in others) / len(others)
                    change[FIELD_OF[kind]] = self._rounded(mean, others[0][0])
                if shared:
                    change["shared"] = self._rounded(shared[0][1], shared[0][0])
                blocks[place] = replace(blocks[place], **change)
        return replace(self._base, blocks=tuple(blocks))

    def _rounded(self, count: float, space: Space) -> int:
        """The nearest multiple of the grain, at least one; everything stays everything."""
        grain = self._grains[space.kind]
        if count >= space.size:
            return space.size
        least = self._base.active_experts if space.kind == "experts" else 1
        return min(max(round(count / grain), least) * grain, space.size)


def relative(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores over the mean of their space, so that spaces compare."""
    return {name: values.double() / values.double().abs().mean().clamp(min=1e-300) for name, values in scores.items()}
