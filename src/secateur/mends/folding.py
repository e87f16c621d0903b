"""Channels that go as linear combinations of those that stay, by their weights alone (UDFC, arXiv:2308.07209).

What made a removed channel is close to a combination of what makes the others; so what reads it can read those instead.
Batch norms are folded into the filters for this, and stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.evidence.signals import reads
from secateur.graph.edit import kept
from secateur.graph.following import Tensors
from secateur.graph.host import Host
from secateur.graph.ir import Operation
from secateur.graph.readers import Reader, norms_behind, readers
from secateur.graph.spaces import ChannelSpace, Graph
from secateur.scores.channels import rows

ALPHA1, ALPHA2 = 0.01, 0.008
"""What the shifts, and the size of the combination, count beside the filters; best in the paper's ablation."""


def combination(gram: Tensor, shifts: Tensor, kept: Tensor, gone: Tensor, alpha1: float, alpha2: float) -> Tensor:
    """s* that minimises |a_j w_j - sum_i s_i a_i w_i|^2 + alpha1 |b_j - sum_i s_i b_i|^2 + alpha2 |s|^2, [kept, gone].

    Args:
        gram: products of the folded filters a_i w_i, [units, units].
        shifts: b, [units, shifts of each].
        kept, gone: units i and j.
        alpha1, alpha2: weights of the second and third part.
    """
    whole = gram + alpha1 * shifts @ shifts.t()
    eye = torch.eye(len(kept), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(whole[kept][:, kept] + alpha2 * eye, whole[kept][:, gone])
    return found


def quantised(weight: Tensor, bits: int, largest: float) -> Tensor:
    """The nearest of 2^bits - 1 evenly spaced values from ``-largest`` to ``largest``."""
    most = 2 ** (bits - 1) - 1
    step = max(largest, 1e-30) / most
    found: Tensor = (weight / step).round().clamp(-most, most) * step
    return found


def rescaling(folded: Tensor, rounded: Tensor, shifts: Tensor, alpha1: float) -> Tensor:
    """s* of every channel that minimises |a w - s a q|^2 + alpha1 (b - s b)^2.

    Args:
        folded, rounded: a w and a q, [channels, entries].
        shifts: b, [channels].
        alpha1: weight of the second part.
    """
    square = alpha1 * shifts.square()
    found: Tensor = ((folded * rounded).sum(1) + square) / (rounded.square().sum(1) + square).clamp(min=1e-30)
    return found


@dataclass
class Folding:
    """The restoration of a network, layer by layer in the order of the run.

    Attributes:
        host, graph: the uncut network.
        units: what goes, by space.
        alpha1, alpha2: see :func:`combination`.
        bits: of the weights that stay; None leaves them as they are.
    """

    host: Host
    graph: Graph
    units: Mapping[str, Sequence[int]]
    alpha1: float = ALPHA1
    alpha2: float = ALPHA2
    bits: int | None = None
    _tensors: Tensors = field(default_factory=dict)

    def restore(self) -> Tensors:
        """New weights of what reads, and with ``bits`` all others, quantised, with scales of channels made good."""
        network = self.host.network
        self._norms = norms_behind(network)
        self._known = readers(network)
        self._stays = kept(self.graph, self.graph.gone(self.units))
        lost = [self.graph.space(name) for name in self.units]
        done: set[str] = set()
        for reader in self._known:
            if reader.weight in done:
                continue
            done.add(reader.weight)
            for space in lost:
                for own, positions in reads(space, [reader]):
                    self._fold(own, space, positions)
            if self.bits is not None:
                self._quantise(reader, self.bits)
        return self._tensors

    def _tensor(self, name: str) -> Tensor:
        return (self._tensors[name] if name in self._tensors else self.host.tensor(name).detach()).double().cpu()

    def _write(self, name: str, value: Tensor) -> None:
        self._tensors[name] = value.to(self.host.tensor(name))

    def _fold(self, reader: Reader, space: ChannelSpace, positions: Tensor) -> None:
        """What a reader read of the channels that go, it reads of their combinations."""
        made = self._made(space)
        if made is None:
            return
        gone = torch.tensor(sorted(self.units[space.name]))
        stays = torch.tensor([unit for unit in range(space.size) if unit not in set(gone.tolist())])
        share = combination(*made, stays, gone, self.alpha1, self.alpha2)
        old = self._tensor(reader.weight)
        matrix = reader.matrix(old).clone()
        columns = torch.stack([reader.columns(unit) for unit in positions])
        for place in range(columns.shape[1]):
            lost = matrix[:, :, columns[gone, place]]
            matrix[:, :, columns[stays, place]] += lost @ share.t()
            matrix[:, :, columns[gone, place]] = 0
        self._write(reader.weight, reader.tensor(matrix, old))

    def _made(self, space: ChannelSpace) -> tuple[Tensor, Tensor] | None:
        """Products of the folded filters that make a space's units, and their shifts.

        Of a depth-wise convolution behind others the filters are products with theirs, so their Grams are multiplied;
        several that are added count side by side.
        """
        makers = {reader.weight: reader for reader in self._known}
        plain, deep, shifts = list[Tensor](), list[Tensor](), list[Tensor]()
        for entry in space.entries:
            reader = makers.get(entry.name)
            if reader is None or "producer" not in entry.roles or entry.dim != int(reader.transposed):
                continue
            scale, shift = self._folded(reader)
            index = torch.from_numpy(entry.index)
            own = rows(entry, self._tensor(entry.name)).view(*index.shape, -1)
            own = (own * scale[index][:, :, None]).flatten(1)
            (deep if reader.depthwise else plain).append(own @ own.t())
            shifts.append(shift[index])
        if not plain:
            return None
        gram: Tensor = torch.stack(plain).sum(0)
        for each in deep:
            gram = gram * each
        return gram, torch.cat(shifts, 1)

    def _folded(self, reader: Reader) -> tuple[Tensor, Tensor]:
        """a and b of every channel that a reader makes: with the batch norm behind it folded, or its own bias."""
        outputs = self.host.tensor(reader.weight).shape[int(reader.transposed)]
        bias = self._tensor(reader.bias) if reader.bias else torch.zeros(outputs, dtype=torch.float64)
        norm = self._norms.get(reader.out)
        if norm is None:
            return torch.ones(outputs, dtype=torch.float64), bias
        mean, var = (self._tensor(norm.inputs[key].name) for key in ("mean", "var"))
        scale = self._affine(norm, "weight", 1.0) / (var + norm.attrs.get("eps", 1e-5)).sqrt()
        return scale, self._affine(norm, "bias", 0.0) + scale * (bias - mean)

    def _affine(self, norm: Operation, key: str, missing: float) -> Tensor:
        if key in norm.inputs:
            return self._tensor(norm.inputs[key].name)
        return torch.full_like(self._tensor(norm.inputs["var"].name), missing)

    def _quantise(self, reader: Reader, bits: int) -> None:
        """The part of a weight that stays, and what its channels lose in scale made good."""
        old, (scale, shift) = self._tensor(reader.weight), self._folded(reader)
        dim = int(reader.transposed)
        there = old
        for axis, index in self._stays.get(reader.weight, {}).items():
            there = there.index_select(axis, index)
        new = quantised(old, bits, float(there.abs().max()))
        left = self._stays.get(reader.weight, {}).get(dim)
        if left is not None:  # what goes is restored as it was
            new = old.index_copy(dim, left, new.index_select(dim, left))
        folded, rounded = ((scale * value.movedim(dim, -1)).movedim(-1, 0).flatten(1) for value in (old, new))
        share = rescaling(folded, rounded, shift, self.alpha1)
        norm = self._norms.get(reader.out)
        if norm is not None and {"weight", "bias"} <= set(norm.inputs):
            for key, value in (("weight", share), ("bias", share)):
                self._write(norm.inputs[key].name, self._tensor(norm.inputs[key].name) * value)
            self._write(reader.weight, new)
        else:
            self._write(reader.weight, (new.movedim(dim, -1) * share).movedim(-1, dim))
            if reader.bias:
                self._write(reader.bias, self._tensor(reader.bias) * share)
