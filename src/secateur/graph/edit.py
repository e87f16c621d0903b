"""Edits of the original module: tensors sliced by name, and the numbers that its attributes hold derived anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.spaces import Gone, Graph
from secateur.graph.state import tensor_at

Literal = tuple[str, str]
"""An attribute by the class of its module and its name."""

_OF_SHAPE: Final[Mapping[str, tuple[str, int]]] = {
    "out_features": ("weight", 0),
    "in_features": ("weight", 1),
    "num_channels": ("weight", 0),
    "num_parameters": ("weight", 0),
    "embedding_dim": ("weight", 1),
    "input_size": ("weight_ih_l0", 1),
    "hidden_size": ("weight_hh_l0", 1),
}
"""Attributes of stock modules that repeat a size of one of their tensors."""
_NOT_CHANNELS: Final = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "training"})


def kept(graph: Graph, gone: Gone) -> dict[str, dict[int, Tensor]]:
    """Positions that stay in every axis that loses some, by name and dimension."""
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, axes in graph.axes.items():
        for dim, axis in enumerate(axes):
            lost = gone[axis]
            if lost.any():
                found[name][dim] = torch.from_numpy(np.flatnonzero(~lost))
    return dict(found)


def cut(module: nn.Module, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> frozenset[Literal]:
    """Cut a module in place.

    Args:
        module: as it was when the graph was made; tensors are replaced, not written to.
        gone: which atoms go.
        literals: attributes to change though their number also stands for something that stays.

    Returns:
        Such attributes, whether changed or not.
    """
    doubtful = _literals(module, graph, gone, frozenset(literals))
    shapes = {}
    for name, dims in kept(graph, gone).items():
        for alias in (name, *graph.network.aliases.get(name, ())):
            shapes[alias] = tensor_at(module, alias).shape
        _replace(module, graph, name, dims)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        _stock(module.get_submodule(path), {n: s for n, s in shapes.items() if n.rpartition(".")[0] == path})
    for fact in graph.facts:
        for path in dict.fromkeys((fact.place, fact.weight.rpartition(".")[0])):
            owner = module.get_submodule(path)
            if isinstance(getattr(owner, fact.name, None), int):
                setattr(owner, fact.name, int((~gone[fact.axis]).sum()))
    return doubtful


def _replace(module: nn.Module, graph: Graph, name: str, dims: Mapping[int, Tensor]) -> None:
    """Slice one tensor, under all its names."""
    old = tensor_at(module, name)
    new = old.detach()
    for dim, index in dims.items():
        new = new.index_select(dim, index.to(new.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for alias in (name, *graph.network.aliases.get(name, ())):
        path, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(path), leaf, new)


def _stock(owner: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Attributes of a module that repeat sizes of its own tensors, given their old shapes."""
    old = {name.rpartition(".")[2]: shape for name, shape in shapes.items()}
    for attribute, (leaf, dim) in _OF_SHAPE.items():
        if leaf in old and len(old[leaf]) > dim and getattr(owner, attribute, None) == old[leaf][dim]:
            setattr(owner, attribute, getattr(owner, leaf).shape[dim])
    for leaf in ("weight", "running_mean"):
        if leaf in old and getattr(owner, "num_features", None) == old[leaf][0]:
            owner.num_features = getattr(owner, leaf).shape[0]
    if "weight" in old and tuple(getattr(owner, "normalized_shape", ())) == tuple(old["weight"]):
        owner.normalized_shape = tuple(owner.weight.shape)  # type: ignore[union-attr]
    if "weight" in old and isinstance(getattr(owner, "transposed", None), bool):
        groups, (first, second) = owner.groups, old["weight"][:2]  # type: ignore[misc]
        ins, outs = ("in_channels", 0), ("out_channels", 1)
        if not owner.transposed:
            ins, outs = ("out_channels", 0), ("in_channels", 1)
        del first, second
        weight, many = owner.weight.shape, _groups(owner, old["weight"], groups)  # type: ignore[union-attr]
        setattr(owner, ins[0], weight[ins[1]])
        setattr(owner, outs[0], weight[outs[1]] * many)


def _groups(owner: nn.Module, old: torch.Size, groups: Any) -> int:
    """Groups of a cut convolution, where it is depth-wise."""
    return int(owner.weight.shape[0] // (old[0] // groups)) if old[1] == 1 and groups > 1 else int(groups)  # type: ignore[union-attr,operator]


def _literals(module: nn.Module, graph: Graph, gone: Gone, wanted: frozenset[Literal]) -> frozenset[Literal]:
    """Change plain numbers of modules that name the size of an axis their operations see, and that changes."""
    doubtful = set()
    for place, axes in graph.steps.items():
        sizes: dict[int, set[int]] = defaultdict(set)
        for axis in axes:
            sizes[len(axis)].add(int((~gone[axis]).sum()))
        changed = {old: new for old, new in sizes.items() if old > 1 and new != {old}}
        owner = module.get_submodule(place)
        for name, value in _numbers(owner, changed):
            literal = (type(owner).__name__, name)
            sure = all(len(changed[number]) == 1 for number in _flat(value) if number in changed)
            if not sure:
                doubtful.add(literal)
            if sure or literal in wanted:
                setattr(owner, name, _with(value, changed))
    return frozenset(doubtful)


def _numbers(owner: nn.Module, changed: Mapping[int, Any]) -> Iterator[tuple[str, Any]]:
    """Attributes that hold one of some numbers."""
    for name, value in list(vars(owner).items()):
        if not name.startswith("_") and name not in _OF_SHAPE and name not in _NOT_CHANNELS:
            numbers = _flat(value)
            if numbers and any(number in changed for number in numbers):
                yield name, value


def _flat(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    plain = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return list(value) if plain else []


def _with(value: Any, changed: Mapping[int, set[int]]) -> Any:
    def number(old: int) -> int:
        return min(changed[old]) if old in changed else old

    return number(value) if isinstance(value, int) else type(value)(number(old) for old in value)
