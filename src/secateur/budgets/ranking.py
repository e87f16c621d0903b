"""Sizes that differ from block to block: what a ranking of all units leaves of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from secateur.families import Kind, Sizes
from secateur.spaces import Space, all_spaces


class GlobalRanking(Sequence[Sizes]):
    """The sizes that remain when the n best of all units of a kind stay, n rising; the scores of a space count
    relative to their mean.

    Every block keeps at least one grain. The routed experts of a block share one width, the mean of what each would
    keep.

    Args:
        base: sizes to start from.
        kind: of the units.
        scores: one number per unit of every space, by its name; higher stays.
        grain: sizes are multiples of it.
    """

    def __init__(self, base: Sizes, kind: Kind, scores: Mapping[str, Tensor], grain: int = 1) -> None:
        self._base, self._grain = base, grain
        self._spaces = all_spaces(base, kind)
        self._field = {"ffn": "ffn", "kv": "kv", "heads": "group"}[kind]
        relative = []
        for space in self._spaces:
            values = scores[space.name].double()
            relative.append(values / values.abs().mean().clamp(min=1e-300))
        owners = torch.cat([torch.full((s.size,), i) for i, s in enumerate(self._spaces)])
        self._owners = owners[torch.sort(torch.cat(relative), descending=True, stable=True).indices]
        self._steps = max(1, len(self._owners) // 4096)

    def __len__(self) -> int:
        return len(self._owners) // self._steps + 1

    @overload
    def __getitem__(self, index: int) -> Sizes: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sizes]: ...
    def __getitem__(self, index: int | slice) -> Sizes | list[Sizes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        count = len(self._owners) if index == len(self) - 1 else index * self._steps
        kept = torch.bincount(self._owners[:count], minlength=len(self._spaces)).tolist()
        blocks = list(self._base.blocks)
        for place in range(len(blocks)):
            here = [(s, n) for s, n in zip(self._spaces, kept, strict=True) if s.place == place]
            shared = [(s, n) for s, n in here if s.expert == "shared"]
            others = [(s, n) for s, n in here if s.expert != "shared"]
            if others:
                mean = sum(n for _, n in others) / len(others)
                change: dict[str, Any] = {self._field: self._rounded(mean, others[0][0])}
                blocks[place] = replace(blocks[place], **change)
            if shared:
                blocks[place] = replace(blocks[place], shared=self._rounded(shared[0][1], shared[0][0]))
        return replace(self._base, blocks=tuple(blocks))

    def _rounded(self, count: float, space: Space) -> int:
        """The nearest multiple of the grain, at least one; everything stays everything."""
        if count >= space.size:
            return space.size
        return min(max(round(count / self._grain), 1) * self._grain, space.size)
