"""Parameters and buffers of a module by name, one entry for what is shared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from secateur.graph.ir import Kind, Network, Value


def parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules in a module with their paths, shared ones once for each path, in the order of the state dict."""
    found: list[tuple[str, nn.Module]] = []

    def walk(path: str, part: nn.Module) -> None:
        found.append((path, part))
        for name, child in part._modules.items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)

    walk("", module)
    return found


def read_state(modules: Sequence[tuple[str, nn.Module]], network: Network) -> dict[int, Value]:
    """Enter the tensors of all :func:`parts` into a network; returns their values by the ``id`` of the tensor."""
    found: dict[int, Value] = {}
    names: dict[int, list[str]] = {}
    tables: tuple[tuple[str, Kind], ...] = (("_parameters", "parameter"), ("_buffers", "buffer"))
    for table, kind in tables:
        for path, part in modules:
            for leaf, tensor in getattr(part, table).items():
                if tensor is not None:
                    name = f"{path}.{leaf}" if path else leaf
                    if leaf in part._non_persistent_buffers_set:
                        network.transient.add(name)
                    if id(tensor) in found:
                        names[id(tensor)].append(name)
                    else:
                        names[id(tensor)] = [name]
                        found[id(tensor)] = Value(tuple(tensor.shape), kind, name, tensor.element_size())
    for key, value in found.items():
        network.state[value.name] = value
        if len(names[key]) > 1:
            network.aliases[value.name] = tuple(names[key][1:])
    return found


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), leaf)
    return found


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards every module is as it was: its mode, and whatever its code kept on it while it ran."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(part, dict(part.__dict__), [dict(getattr(part, name)) for name in tables]) for part in modules]
    try:
        yield
    finally:
        for part, attributes, contents in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for name, content in zip(tables, contents, strict=True):
                table = getattr(part, name)
                table.clear()
                table.update(content)


def shadow(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares all tensors."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
