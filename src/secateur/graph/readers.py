"""Where a network reads channels with a matrix: which weight does, what it sees, and the matrix that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from secateur.graph.ir import Network, Operation, Value


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight of the state that is multiplied with channels, as a matrix of rows per group.

    Attributes:
        step: a convolution, or a product with a matrix.
        weight, bias: names in the state; the bias may be missing.
        dim: axis of the weight along which it reads.
        transposed: whether the weight's first axis is the one that it reads along.
    """

    step: Operation
    weight: str
    bias: str
    dim: int
    transposed: bool

    @property
    def x(self) -> Value:
        """What it reads."""
        return self.step.inputs["a" if "a" in self.step.inputs else "x"]

    @property
    def out(self) -> Value:
        """What it makes."""
        return self.step.outputs[0]

    @property
    def groups(self) -> int:
        """Blocks of rows that read blocks of channels."""
        return int(self.step.attrs.get("groups", 1))

    @cached_property
    def is_convolution(self) -> bool:
        return self.step.op == "convolution"

    @cached_property
    def depthwise(self) -> bool:
        """Whether every row reads a single channel."""
        return self.groups > 1 and self.step.inputs["weight"].shape[1] == 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [groups, rows, columns]: columns are (channel of the group, place in the kernel).

        Of a transposed convolution the rows are (channel, place in the kernel) and the columns channels.
        """
        if self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The weight that a matrix is."""
        return (matrix.transpose(1, 2) if self.transposed else matrix).reshape(like.shape)

    def columns(self, positions: Tensor) -> Tensor:
        """Columns of the matrix at some positions of the weight's axis, in order; the same in every group."""
        place = math.prod(self.step.inputs["weight"].shape[2:]) if self.is_convolution and not self.transposed else 1
        return (positions[:, None] * place + torch.arange(place)).flatten()

    def channels(self, x: Tensor) -> Tensor:
        """What it reads with the channels as last axis, [samples, places, channels]."""
        if self.is_convolution:
            rank = len(self.step.inputs["weight"].shape) - 2
            x = x if x.ndim == rank + 2 else x[None]
            return x.flatten(2).transpose(1, 2)
        return x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])

    def rows(self, x: Tensor, places: int | None = None) -> Tensor:
        """Everything that the matrix is multiplied with, [groups, products, columns].

        Args:
            x: what it reads.
            places: how many of every sample, drawn with a fixed seed: the same of signals of one shape. All if None.
        """
        if not self.is_convolution or self.transposed:
            found = self.channels(x)
            found = (found if places is None else _drawn(found, 1, places)).flatten(0, 1)
            return found.reshape(len(found), self.groups, -1).transpose(0, 1)
        attrs, kernel = self.step.attrs, self.step.inputs["weight"].shape[2:]
        rank = len(kernel)
        x = x if x.ndim == rank + 2 else x[None]
        x = functional.pad(x, [each for pair in reversed(attrs["pads"]) for each in pair])
        for axis, (size, stride, dilation) in enumerate(zip(kernel, attrs["stride"], attrs["dilation"], strict=True)):
            x = x.unfold(axis + 2, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x.movedim(1, 1 + rank)  # [samples, *places, channels, *window], all of it views
        x = x.flatten(1, rank) if places is None else _drawn(x, rank, places)
        x = x.reshape(-1, self.groups, x.shape[2] // self.groups * math.prod(kernel))
        return x.transpose(0, 1)

    def pieces(self, x: Tensor, places: int | None = None, entries: int = 1 << 24) -> Iterator[Tensor]:
        """The same, so many samples at a time that no piece has more entries than that."""
        window = math.prod(self.step.inputs["weight"].shape[2:]) if self.is_convolution and not self.transposed else 1
        samples = max(1, entries // max(1, x[:1].numel() * window))
        for part in torch.split(x, samples):
            yield self.rows(part, places)

    def by_row(self, values: Tensor) -> Tensor:
        """Numbers of the outputs for the rows of the matrix, [groups, rows, 1]."""
        if self.transposed and self.is_convolution:
            values = values.repeat_interleave(math.prod(self.step.inputs["weight"].shape[2:]))
        return values.reshape(self.groups, -1, 1)


def _drawn(x: Tensor, rank: int, places: int) -> Tensor:
    """Some places of every sample of [samples, *places, ...], [samples, places, ...]."""
    sizes = x.shape[1 : 1 + rank]
    generator = torch.Generator().manual_seed(len(x))
    flat = torch.randint(math.prod(sizes), (len(x), places), generator=generator)
    index = torch.unravel_index(flat.to(x.device), sizes)
    return x[(torch.arange(len(x), device=x.device)[:, None], *index)]


def readers(network: Network) -> list[Reader]:
    """All products with a matrix of the state, in the order of the run."""
    found = []
    for step in network.operations:
        weight, turned = _weight(step)
        if weight is None or not weight.is_state:
            continue
        bias = step.inputs.get("bias")
        dim = 0 if turned else 1
        found.append(Reader(step, weight.name, bias.name if bias is not None and bias.is_state else "", dim, turned))
    return found


def _weight(step: Operation) -> tuple[Value | None, bool]:
    """The matrix of a step, and whether it reads along its first axis."""
    if step.op == "convolution":
        turned = bool(step.attrs.get("transposed"))
        known = step.attrs["groups"] == 1 if turned else "pads" in step.attrs
        return (step.inputs["weight"] if known else None), turned
    if step.op == "linear":
        return (step.inputs["weight"] if len(step.inputs["weight"].shape) == 2 else None), False
    if step.op == "matmul" and len(step.inputs["b"].shape) == 2:
        return step.inputs["b"], True
    return None, False


def norms_behind(network: Network) -> Mapping[Value, Operation]:
    """Batch norms by the value that they, and nothing else, read."""
    users = _users(network)
    return {
        step.inputs["x"]: step
        for step in network.operations
        if step.op == "batch_norm" and {"mean", "var"} <= set(step.inputs) and len(users[step.inputs["x"]]) == 1
    }


def destination(network: Network, value: Value) -> Value:
    """Where a value ends up behind the batch norm that reads it alone, and the sum with others that it enters then."""
    users = _users(network)
    for op in ("batch_norm", "elementwise"):
        behind = users.get(value, [])
        made = len([each for each in behind[0].inputs.values() if not each.is_state]) if behind else 0
        if len(behind) == 1 and behind[0].op == op and (made == 1 if op == "batch_norm" else made > 1):
            value = behind[0].outputs[0]
    return value


def _users(network: Network) -> dict[Value, list[Operation]]:
    """Steps by what they read."""
    found: dict[Value, list[Operation]] = {}
    for step in network.operations:
        for value in step.inputs.values():
            found.setdefault(value, []).append(step)
    return found
