"""Parameters and buffers of a module by name, one entry for what is shared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from secateur.graph.ir import Network, Value


def read_state(module: nn.Module, network: Network) -> dict[int, Value]:
    """Enter a module's tensors into a network; returns their values by the ``id`` of the tensor."""
    found: dict[int, Value] = {}
    names: dict[int, list[str]] = {}
    parameters = module.named_parameters(remove_duplicate=False)
    for name, tensor in chain(parameters, module.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
        if id(tensor) not in found:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            found[id(tensor)] = Value(tuple(tensor.shape), kind, name)  # type: ignore[arg-type]
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
def restored(module: nn.Module) -> Iterator[None]:
    """Afterwards every module is as it was: its mode, and whatever its code kept on it while it ran."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(part, dict(part.__dict__), [dict(getattr(part, name)) for name in tables]) for part in module.modules()]
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
