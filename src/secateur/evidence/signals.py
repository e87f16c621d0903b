"""What runs through a network's channels on data: sizes of the units' signals, and their products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from secateur.evidence.batches import Example, batch_size
from secateur.evidence.moments import Moments
from secateur.graph.host import Batch, Host
from secateur.graph.ir import Value
from secateur.graph.readers import Reader, readers
from secateur.graph.spaces import ChannelSpace

_AT_ONCE = 16
_ROWS_PER_COLUMN = 64
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


def product_moments(
    host: Host, known: Sequence[Reader], batches: Sequence[Batch], at_once: int = 1 << 30
) -> Iterator[tuple[Reader, list[Tensor]]]:
    """Of every reader the mean of x x^T of what its matrix is multiplied with, group by group, [n, n] float64.

    Args:
        host: what is run.
        known: readers of its network.
        batches: what it is run on, again for every few readers.
        at_once: bytes of products and signals of the readers that are watched together.
    """
    samples = sum(map(batch_size, batches))
    for some in _few(known, batches, at_once):
        sums: dict[Reader, list[Moments]] = {}
        for batch in batches:
            _, seen = host.run(batch, [reader.x for reader in some])
            for reader in some:
                for piece in reader.pieces(seen[reader.x], places_for(reader, samples)):
                    made = sums.setdefault(reader, [Moments(piece.shape[2], piece.device) for _ in piece])
                    for moments, part in zip(made, piece, strict=True):
                        moments.add(part)
        for reader, made in sums.items():
            for moments in made:
                moments.close_shard()
            yield reader, [moments.second / max(1, moments.count) for moments in made]


def total_variances(host: Host, values: Iterable[Value], batches: Sequence[Batch]) -> dict[Value, float]:
    """Of every value the variances of its channels over samples and places, summed."""
    rest, found = list(dict.fromkeys(values)), dict[Value, float]()
    for start in range(0, len(rest), _AT_ONCE):
        some = rest[start : start + _AT_ONCE]
        sums: dict[Value, list[Tensor]] = {value: [] for value in some}
        for batch in batches:
            for value, x in host.run(batch, some)[1].items():
                x = (x.transpose(0, 1 if x.ndim > 3 else -1) if x.ndim > 1 else x[None]).flatten(1).double()
                sums[value].append(torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])]))
        for value, parts in sums.items():
            first, second, count = torch.stack(parts).sum(0)
            found[value] = float((second / count - (first / count).square()).sum())
    return found


def places_for(reader: Reader, samples: int) -> int | None:
    """Places of every sample that say enough of the products of a matrix's columns; None for all."""
    window = math.prod(reader.step.inputs["weight"].shape[2:]) if reader.is_convolution else 1
    channels = reader.channels(torch.empty(reader.x.shape, device="meta"))
    width = channels.shape[2] // reader.groups * (1 if reader.transposed else window)
    enough = -(-_ROWS_PER_COLUMN * width // samples)
    return None if channels.shape[1] <= enough else enough


def _few(known: Sequence[Reader], batches: Sequence[Batch], at_once: int) -> Iterator[list[Reader]]:
    """Readers whose products and signals fit into so many bytes, and at least one."""
    rows = max(map(batch_size, batches), default=1)
    some: list[Reader] = []
    room = at_once
    for reader in known:
        width = math.prod(reader.step.inputs["weight" if "weight" in reader.step.inputs else "b"].shape[1:])
        signal = 4 * math.prod(reader.x.shape) // max(1, reader.x.shape[0] if reader.x.shape else 1) * rows
        need = 16 * reader.groups * width**2 + signal
        if some and need > room:
            yield some
            some, room = [], at_once
        some.append(reader)
        room -= need
    if some:
        yield some
