"""Batches for a network that nobody here has seen: checked against its example inputs, labels told from inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_structure

from secateur.errors import refuse
from secateur.graph.host import Batch

_HINT = "give a list (or another iterable) of batches, each like example_inputs, or pairs (inputs, labels)"


@dataclass(frozen=True)
class Example:
    """A batch.

    Attributes:
        inputs: what the network is run on.
        labels: what is wanted of it; None where there is nothing.
    """

    inputs: Batch
    labels: Any = None


class Batches:
    """Batches that can be read again and again.

    A batch has the structure of the example inputs, or is a pair of that and of labels. Arrays become tensors.

    Args:
        source: iterable of batches; no iterator, for those can be read only once.
        example: inputs that the network was recorded on.
        labelled: whether every batch must have labels.
        device: where the tensors go.

    Raises:
        RequestError: nothing in it, or batches that do not fit the example inputs.
    """

    def __init__(
        self, source: Iterable[Any], example: Batch, labelled: bool = False, device: torch.device | None = None
    ) -> None:
        if not isinstance(source, Iterable) or isinstance(source, str | bytes | Tensor | np.ndarray):
            refuse("bad-data", "data", f"{type(source).__name__} is no iterable of batches", _HINT)
        if isinstance(source, Iterator):
            refuse("bad-data", "data", "an iterator can be read only once", "give a list, or a loader")
        self._source, self._example, self._labelled, self._device = source, example, labelled, device
        if not any(True for _ in islice(self, 1)):
            refuse("bad-data", "data", "there is no batch in it", _HINT)

    def __iter__(self) -> Iterator[Example]:
        for batch in self._source:
            yield self._read(tree_map(self._tensor, batch))

    def _tensor(self, leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic):
            leaf = torch.as_tensor(leaf)
        return leaf.to(self._device) if isinstance(leaf, Tensor) and self._device is not None else leaf

    def _read(self, batch: Any) -> Example:
        if not self._labelled and self._fits(batch):
            return Example(batch)
        if isinstance(batch, list | tuple) and len(batch) == 2 and self._fits(batch[0]):
            return Example(batch[0], batch[1])
        wanted = "a pair (inputs, labels)" if self._labelled else "like example_inputs"
        refuse("bad-data", "data", f"a batch that is not {wanted}: {_told(batch)}", f"{_HINT}: {_told(self._example)}")

    def _fits(self, inputs: Any) -> bool:
        """Whether structure, ranks and kinds of numbers are those of the example."""
        if tree_structure(inputs) != tree_structure(self._example):
            return False
        pairs = zip(tree_flatten(inputs)[0], tree_flatten(self._example)[0], strict=True)
        return all(_alike(mine, other) for mine, other in pairs)


def _alike(mine: Any, other: Any) -> bool:
    if not isinstance(other, Tensor):
        return not isinstance(mine, Tensor)
    return (
        isinstance(mine, Tensor) and mine.ndim == other.ndim and mine.is_floating_point() == other.is_floating_point()
    )


def _told(item: Any) -> str:
    """A batch in few words."""
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
    if isinstance(item, dict):
        return "{" + ", ".join(f"{key}: {_told(value)}" for key, value in item.items()) + "}"
    if isinstance(item, list | tuple):
        return "(" + ", ".join(map(_told, item)) + ")"
    return type(item).__name__


def noise(example: Batch, count: int, generator: torch.Generator, rows: int | None = None) -> list[Example]:
    """Batches of the example's shapes with numbers drawn from N(0, 1), for want of data.

    Args:
        example: all its tensors must hold real numbers.
        count: number of batches.
        generator: what they are drawn from.
        rows: of a batch; as many as the example has if None.
    """
    there = batch_size(example)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            refuse("no-noise", "calibration on noise", f"inputs of type {leaf.dtype}", "give data")
        wide = rows is not None and leaf.ndim > 0 and len(leaf) == there
        return torch.randn((rows, *leaf.shape[1:]) if wide else leaf.shape, generator=generator).to(leaf)

    return [Example(tree_map(drawn, example)) for _ in range(count)]


def samples(examples: Iterable[Example]) -> Iterator[Example]:
    """Batches of one sample each, cut along the first axis of all tensors that have as many rows as the first one."""
    for example in examples:
        rows = batch_size(example.inputs)
        for row in range(rows):
            one = partial(_part, span=slice(row, row + 1), rows=rows)
            yield Example(tree_map(one, example.inputs), tree_map(one, example.labels))


def first(examples: Iterable[Example], count: int) -> list[Batch]:
    """Inputs of the first ``count`` samples, batch by batch."""
    found: list[Batch] = []
    left = count
    for example in examples:
        rows = batch_size(example.inputs)
        found.append(tree_map(partial(_part, span=slice(0, left), rows=rows), example.inputs))
        left -= rows
        if left <= 0:
            break
    return found


def batch_size(inputs: Any) -> int:
    """Rows of the first tensor."""
    return next((len(leaf) for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _part(leaf: Any, span: slice, rows: int) -> Any:
    return leaf[span] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows else leaf
