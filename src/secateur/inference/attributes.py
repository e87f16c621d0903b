"""What the forward pass of a module reads from itself besides its parameters, and which size each of these is."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from secateur.errors import RequestError
from secateur.families import Architecture, Family, Sizes
from secateur.families.stock import meta_model
from secateur.inference.anatomy import Anatomy
from secateur.inference.specimen import Raw

_AXES: Final = ("query_heads", "kv_heads", "group", "heads", "kv", "ffn", "residual")


class _Config:
    """A configuration that remembers which of its numbers are asked for."""

    def __init__(self, config: Any, asked: set[str]) -> None:
        self.__dict__["_told"] = (config, asked)

    def __getattr__(self, name: str) -> Any:
        config, asked = self.__dict__["_told"]
        value = getattr(config, name)
        if type(value) is int:
            asked.add(f"config.{name}")
        return value


def _watched(module: nn.Module, asked: set[str]) -> type:
    """The class of a module, remembering which numbers of its own it asks for."""
    stock = type(module)

    def look(self: Any, name: str) -> Any:
        value = stock.__getattribute__(self, name)
        if name == "config":
            return _Config(value, asked)
        if type(value) is int and name in stock.__getattribute__(self, "__dict__"):
            asked.add(name)
        return value

    return type(stock.__name__, (stock,), {"__getattribute__": look})


def numbers_read(anatomy: Anatomy) -> dict[str, set[str]]:
    """Numbers that modules of the blocks read from themselves in a forward pass, by the module's name in its block."""
    found: dict[str, set[str]] = {}
    stock: list[tuple[nn.Module, type]] = []
    for name, module in anatomy.model.get_submodule(anatomy.blocks).named_modules():
        local = name.partition(".")[2]
        told = isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm) or hasattr(module, "nf")
        if not local or told or isinstance(module, nn.ModuleList):  # the resized class tells these itself
            continue
        stock.append((module, type(module)))
        module.__class__ = _watched(module, found.setdefault(local, set()))
    try:
        anatomy.run()
    finally:
        for module, kind in stock:
            module.__class__ = kind
    return found


def sizes_read(anatomy: Anatomy, family: Family, other: Raw) -> dict[str, dict[str, str]]:
    """``Family.attributes``: the axis whose length each number is, told by two models of different sizes.

    Args:
        anatomy: a small model.
        family: its family.
        other: configuration of another small model, different in every size.
    """
    try:
        here, there = Architecture(anatomy.raw, family), Architecture(other, family)
        second = meta_model(there.config).get_submodule(family.blocks)
        asked = numbers_read(anatomy)
    except (RequestError, TypeError):  # a family may do without: then layers do not differ
        return {}
    first = anatomy.model.get_submodule(family.blocks)
    found: dict[str, dict[str, str]] = {}
    for local, names in asked.items():
        block = next((i for i, b in enumerate(first) if _has(b, local)), None)
        if block is None or block >= len(second) or not _has(second[block], local):
            continue
        one, two = first[block].get_submodule(local), second[block].get_submodule(local)
        for name in sorted(names):
            axis = _axis(_value(one, name), _value(two, name), here.sizes, there.sizes, block)
            if axis is not None:
                found.setdefault(local, {})[name] = axis
    return found


def _has(block: nn.Module, local: str) -> bool:
    return any(name == local for name, _ in block.named_modules())


def _value(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)  # blocks of another sort may not have it
    return module


def _axis(one: int | None, two: int | None, here: Sizes, there: Sizes, block: int) -> str | None:
    if one == two or one is None:
        return None
    return next((axis for axis in _AXES if (one, two) == (here.axis(axis, block), there.axis(axis, block))), None)
