"""What runs through a network's channels on data: sizes of the units' signals, and their products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.evidence.batches import Example
from secateur.graph.host import Host
from secateur.graph.readers import Reader, readers
from secateur.graph.spaces import ChannelSpace

Signal = Literal["mean", "variance"]


def reads(space: ChannelSpace, known: Sequence[Reader]) -> list[tuple[Reader, Tensor]]:
    """Readers of a space, with the positions of its units on the axis they read, [units, positions]."""
    where = {(entry.name, entry.dim): entry for entry in space.entries if "consumer" in entry.roles}
    return [
        (reader, torch.from_numpy(where[reader.weight, reader.dim].index))
        for reader in known
        if (reader.weight, reader.dim) in where
    ]


def channel_signals(
    host: Host, spaces: Sequence[ChannelSpace], data: Iterable[Example], signal: Signal
) -> dict[ChannelSpace, list[Tensor]]:
    """For every reader of a space how large the units' signals are that it sees: E|x|, or Var x; [units] each."""
    known = readers(host.network)
    needed = {r.x: r for space in spaces for r, _ in reads(space, known)}
    sums: dict[Reader, Tensor] = {}
    count: dict[Reader, int] = {}
    for example in data:
        _, seen = host.run(example.inputs, list(needed))
        for value, reader in needed.items():
            x = reader.channels(seen[value]).flatten(0, 1).double().cpu()
            own = torch.stack([x.abs().sum(0), x.sum(0), x.square().sum(0)])
            sums[reader] = sums[reader] + own if reader in sums else own
            count[reader] = count.get(reader, 0) + len(x)

    def of(reader: Reader, positions: Tensor) -> Tensor:
        first = needed[reader.x]
        size, mean, square = sums[first] / count[first]
        each = size if signal == "mean" else square - mean.square()
        per_group = each.view(reader.groups, -1).mean(0)  # the same place in every group goes
        found: Tensor = per_group[positions].mean(1)
        return found

    return {space: [of(reader, positions) for reader, positions in reads(space, known)] for space in spaces}
