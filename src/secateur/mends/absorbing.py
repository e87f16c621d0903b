"""Biases that take over what channels say on average that go (MaskSparsity, arXiv:2201.06776; FLAP for any network)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.graph.edit import kept
from secateur.graph.following import Tensors, zeroed
from secateur.graph.host import Batch, Host
from secateur.graph.readers import norms_behind, readers
from secateur.graph.spaces import Gone, Graph


def absorbed(host: Host, graph: Graph, gone: Gone, batches: Sequence[Batch] | None, example: Batch) -> Tensors:
    """New biases, or means of the batch norms behind, of what reads channels that go.

    Without data a channel is taken for the constant that its shift alone gives, behind whatever follows: exact where
    its scale is zero, except at borders padded with zeros. With data it is its mean. A reader with neither bias nor
    norm is left as it is.

    Args:
        host, graph, gone: the uncut network, and what goes.
        batches: data; None for none.
        example: what the network is run on then.
    """
    stays, norms = kept(graph, gone), norms_behind(host.network)
    told = {}
    for reader in readers(host.network):
        norm = norms.get(reader.out)
        place = reader.bias or (norm.inputs["mean"].name if norm is not None else "")
        if reader.dim in stays.get(reader.weight, {}) and place and not reader.depthwise and not reader.transposed:
            told[reader] = place
    speaking = host if batches is not None else host.with_tensors(_quiet(host, graph, gone))
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches if batches is not None else [example]:
        _, seen = speaking.run(batch, [reader.x for reader in told])
        for reader in told:
            means = reader.channels(seen[reader.x]).double().mean((0, 1))
            sums[reader.weight] = sums.get(reader.weight, 0) + means
        count += 1
    found: Tensors = {}
    for reader, place in told.items():
        weight = host.tensor(reader.weight).detach().double()
        lost = zeroed(weight.clone(), {reader.dim: _rest(stays[reader.weight][reader.dim], weight.shape[reader.dim])})
        by_channel = lost.flatten(2).sum(2) if lost.ndim > 2 else lost
        mean = (sums[reader.weight] / count).view(reader.groups, -1)
        shift = (by_channel.reshape(reader.groups, -1, by_channel.shape[1]) @ mean[:, :, None]).flatten()
        old = found.get(place, host.tensor(place).detach())
        found[place] = (old.double() + (shift if reader.bias else -shift)).to(old)
    return found


def _rest(index: Tensor, size: int) -> Tensor:
    """Positions that are not in an index."""
    there = torch.ones(size, dtype=torch.bool)
    there[index] = False
    return there.nonzero().flatten()


def _quiet(host: Host, graph: Graph, gone: Gone) -> Tensors:
    """What makes the channels that go without anything but its shifts."""
    shifts = {
        step.inputs[key].name
        for step in host.network.operations
        for key in ("bias", "mean", "var")
        if key in step.inputs and step.inputs[key].is_state
    }
    reads = {(e.name, e.dim) for space in graph.spaces for e in space.entries if e.roles == {"consumer"}}
    found = {}
    for name, dims in kept(graph, gone).items():
        made = {dim: index for dim, index in dims.items() if (name, dim) not in reads}
        if name not in shifts and made:
            found[name] = zeroed(host.tensor(name).detach().clone(), made)
    return found
