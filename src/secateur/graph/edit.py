"""Edits of the original module: tensors sliced by name, and the numbers that its attributes hold derived anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.host import Literal
from secateur.graph.spaces import Gone, Graph
from secateur.graph.state import tensor_at

_OF_SHAPE: Final[Mapping[str, tuple[tuple[str, int], ...]]] = {
    "out_features": (("weight", 0),),
    "in_features": (("weight", 1),),
    "num_features": (("weight", 0), ("running_mean", 0)),
    "num_channels": (("weight", 0),),
    "num_parameters": (("weight", 0),),
    "embedding_dim": (("weight", 1),),
    "input_size": (("weight_ih_l0", 1),),
    "hidden_size": (("weight_hh_l0", 1),),
}
"""Attributes of stock modules that repeat a size of one of their tensors."""
_NOT_CHANNELS: Final = frozenset(
    {
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "output_padding",
        "groups",
        "training",
    }
)


def kept(graph: Graph, gone: Gone) -> dict[str, dict[int, Tensor]]:
    """Positions that stay in every axis that loses some, by name and dimension."""
    found: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, axes in graph.axes.items():
        for dim, axis in enumerate(axes):
            lost = gone[axis]
            if lost.any():
                found[name][dim] = torch.from_numpy(np.flatnonzero(~lost))
    return dict(found)


def made_only(graph: Graph, stays: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """The part of what stays that makes channels: silence in what reads them is stronger, and tried afterwards."""
    reads = {(e.name, e.dim) for space in graph.spaces for e in space.entries if e.roles == {"consumer"}}
    parts = {name: {d: i for d, i in dims.items() if (name, d) not in reads} for name, dims in stays.items()}
    return {name: dims for name, dims in parts.items() if dims}


def cut(module: nn.Module, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> frozenset[Literal]:
    """Cut a module in place.

    Args:
        module: as it was when the graph was made; tensors are replaced, not written to.
        gone: which atoms go.
        literals: what is known of attributes; the others go by their numbers.

    Returns:
        What may be true of the attributes whose numbers may name a size that changes.
    """
    doubtful = _literals(module, graph, gone, literals)
    shapes = {}
    for name, dims in kept(graph, gone).items():
        for alias in (name, *graph.network.aliases.get(name, ())):
            shapes[alias] = tensor_at(module, alias).shape
        _replace(module, graph, name, dims)
    for fact in graph.facts:
        for path in dict.fromkeys((fact.place, fact.weight.rpartition(".")[0])):
            owner = module.get_submodule(path)
            if isinstance(getattr(owner, fact.name, None), int):
                setattr(owner, fact.name, int((~gone[fact.axis]).sum()))
    for parts in graph.lists:
        owner = module.get_submodule(parts.place)
        old, new = [len(axis) for axis in parts.axes], [int((~gone[axis]).sum()) for axis in parts.axes]
        for name, value in list(vars(owner).items()):
            if isinstance(value, list | tuple) and list(value) == old:
                setattr(owner, name, type(value)(new))
    for path in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        _stock(module.get_submodule(path), {n: s for n, s in shapes.items() if n.rpartition(".")[0] == path})
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


def _stock(owner: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Attributes of a module that repeat sizes of its own tensors, given their old shapes."""
    old = {name.rpartition(".")[2]: shape for name, shape in shapes.items()}
    for attribute, places in _OF_SHAPE.items():
        for leaf, dim in places:
            if leaf in old and len(old[leaf]) > dim and getattr(owner, attribute, None) == old[leaf][dim]:
                setattr(owner, attribute, getattr(owner, leaf).shape[dim])
                break
    if "weight" not in old:
        return
    if tuple(getattr(owner, "normalized_shape", ())) == tuple(old["weight"]):
        owner.normalized_shape = tuple(owner.weight.shape)
    if isinstance(getattr(owner, "transposed", None), bool):  # a convolution; its groups are renumbered already
        first, second = owner.weight.shape[:2]
        sizes = (first, second * owner.groups)
        owner.in_channels, owner.out_channels = sizes if owner.transposed else sizes[::-1]


def _literals(module: nn.Module, graph: Graph, gone: Gone, known: Collection[Literal]) -> frozenset[Literal]:
    """Change plain numbers of modules that name the size of an axis which their operations see and which changes.

    Where nothing is known, a number stays if other axes of that size do not change alike.
    """
    follows = {(kind, name): change for kind, name, change in known}
    found: set[Literal] = set()
    for place, axes in graph.steps.items():
        sizes: dict[int, set[int]] = defaultdict(set)
        for axis in axes:
            sizes[len(axis)].add(int((~gone[axis]).sum()))
        changed = {old: new for old, new in sizes.items() if old > 1 and new != {old}}
        owner = module.get_submodule(place)
        for name, value in _numbers(owner, changed):
            kind = type(owner).__name__
            found |= {(kind, name, False), (kind, name, True)}
            if follows.get((kind, name), len(changed[value]) == 1):
                setattr(owner, name, min(changed[value]))
    return frozenset(found)


def _numbers(owner: nn.Module, changed: Collection[int]) -> Iterator[tuple[str, int]]:
    """Attributes that hold one of some numbers."""
    for name, value in list(vars(owner).items()):
        plain = isinstance(value, int) and not isinstance(value, bool) and value in changed
        if plain and not name.startswith("_") and name not in _OF_SHAPE and name not in _NOT_CHANNELS:
            yield name, value
