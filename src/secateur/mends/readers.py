"""Mends of any network behind a cut: what reads the channels that stay makes up for those that go.

Layers are mended in the order of the run, each on the inputs that the mended layers before it give, towards what the
uncut network has there (OBSPA, arXiv:2403.18955; the update is exact least squares).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.evidence.moments import CrossMoments, Moments
from secateur.evidence.signals import places_for
from secateur.graph.edit import kept
from secateur.graph.following import Tensors, follow, silent, zeroed
from secateur.graph.host import Batch, Host
from secateur.graph.ir import Operation
from secateur.graph.readers import Reader, norms_behind, readers
from secateur.graph.spaces import Gone, Graph
from secateur.mends.least_squares import DAMPING, refit

Statistics = Literal["keep", "own", "match"]
_CONSTANT = 1e-6


@dataclass
class Mender:
    """Least squares for the readers of what goes, and statistics of batch norms.

    Attributes:
        host, graph, gone: the uncut network, and what goes.
        damping: ridge over the mean of the Gram's diagonal; what it shrinks towards are the old weights.
        readers: whether weights are refitted.
        everywhere: also those that read nothing that goes: they make up for what happened before them.
        shifts: whether biases, or means of norms behind, take over what the mean inputs lose.
        norms: of batch norms that see another signal: statistics as they are, as they are now on the data, or so that
            mean and deviation of what the norm gives are those of the uncut network.
    """

    host: Host
    graph: Graph
    gone: Gone
    damping: float = DAMPING
    readers: bool = True
    everywhere: bool = True
    shifts: bool = True
    norms: Statistics = "keep"
    _tensors: Tensors = field(default_factory=dict)

    def mend(self, batches: Sequence[Batch]) -> Tensors:
        """All tensors that differ from the uncut network's, zero where something goes."""
        network, start = self.host.network, silent(self.host, self.graph, self.gone)
        self._stays = kept(self.graph, self.gone)
        self._norms = norms_behind(network)
        uses = Counter(reader.weight for reader in readers(network))
        known = {
            reader.step: reader for reader in readers(network) if uses[reader.weight] == 1 and not reader.depthwise
        }
        norms = [step for step in network.operations if step.op == "batch_norm" and {"mean", "var"} <= set(step.inputs)]
        self._known = known if self.readers else {}
        wanted = [*self._known, *(norms if self.norms != "keep" else [])]
        self._tensors = dict(start)
        return follow(self.host, start, batches, wanted, self._observe)

    def _observe(self, step: Operation, dense: Tensor, mended: Tensor) -> Tensors:
        made = (
            self._refitted(self._known[step], dense, mended)
            if step in self._known
            else self._restated(step, dense, mended)
        )
        self._tensors |= made
        return made

    def _tensor(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self.host.tensor(name).detach()

    def _refitted(self, reader: Reader, dense: Tensor, mended: Tensor) -> Tensors:
        """The weight of a reader, and its bias or the mean of the norm behind it."""
        stays = self._stays.get(reader.weight, {})
        if reader.dim not in stays and (not self.everywhere or torch.equal(dense, mended)):
            return {}
        old = self.host.tensor(reader.weight).detach()
        matrix = reader.matrix(old).double()
        norm = self._norms.get(reader.out)
        moved = reader.bias or (norm.inputs["mean"].name if norm is not None else "")
        if reader.transposed and reader.is_convolution:  # its windows may overlap: no bias is that of one
            moved = ""
        columns = reader.columns(stays.get(reader.dim, torch.arange(old.shape[reader.dim])))
        groups, shift = [], []
        for weight, (gram, cross, first, aim, count) in zip(matrix, self._moments(reader, dense, mended), strict=True):
            energy = float(gram.diagonal().sum())
            if self.shifts and moved:
                gram, cross = gram - torch.outer(first, first) / count, cross - torch.outer(aim, first) / count
            if float(gram.diagonal().sum()) > _CONSTANT * energy:
                groups.append(refit(weight, gram, columns.to(gram.device), self.damping, weight @ cross))
            else:  # inputs that do not vary, which a bias makes up for
                groups.append(zeroed(weight.clone(), {1: columns}))
            shift.append((weight @ aim - groups[-1] @ first) / count)
        made = {reader.weight: zeroed(reader.tensor(torch.stack(groups), old).to(old), stays)}
        if self.shifts and moved:
            sign, lost = (1 if reader.bias else -1), torch.cat(shift)
            value = self._tensor(moved)
            made[moved] = zeroed((value.double() + sign * lost).to(value), self._stays.get(moved, {}))
        return made

    def _moments(self, reader: Reader, dense: Tensor, mended: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of every group X'X'^T, X X'^T, the sums of X' and X, and their number; X' is what it reads now."""
        width = reader.matrix(self.host.tensor(reader.weight)).shape[2]
        own = [Moments(width, mended.device) for _ in range(reader.groups)]
        both = [CrossMoments(width, width, mended.device) for _ in range(reader.groups)]
        aims = torch.zeros(reader.groups, width, dtype=torch.float64, device=mended.device)
        places = places_for(reader, len(dense))
        for one, other in zip(reader.pieces(dense, places), reader.pieces(mended, places), strict=True):
            for group, (x, new) in enumerate(zip(one, other, strict=True)):
                own[group].add(new)
                both[group].add(x, new)
                aims[group] += x.sum(0, dtype=torch.float64)
        for group in range(reader.groups):
            own[group].close_shard()
            both[group].close_shard()
            yield own[group].second, both[group].total, own[group].first, aims[group], torch.tensor(own[group].count)

    def _restated(self, step: Operation, dense: Tensor, mended: Tensor) -> Tensors:
        """Mean and variance of a batch norm."""
        if torch.equal(dense, mended):
            return {}
        names = {key: step.inputs[key].name for key in ("mean", "var")}
        if not all(names.values()):
            return {}
        (mean, var), (old_mean, old_var) = (_statistics(x) for x in (mended, dense))
        if self.norms == "match":
            before = {key: self.host.tensor(name).double() for key, name in names.items()}
            share = (var / old_var.clamp(min=1e-12)).clamp(min=1e-12)
            mean = mean - (old_mean - before["mean"]) * share.sqrt()
            var = before["var"] * share
        found = {names["mean"]: mean, names["var"]: var}
        return {
            name: zeroed(value.to(self.host.tensor(name)), self._stays.get(name, {})) for name, value in found.items()
        }


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel, axis 1."""
    wide = x.transpose(0, 1).flatten(1).double()
    return wide.mean(1), wide.var(1, correction=0)
