"""The structure of ONNX models: which tensors there are, what branches read, what is a weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_FLOATS: Final = (1, 10, 11, 16)
"""ONNX's numbers of float32, float16, float64 and bfloat16."""
_LITERALS: Final[Mapping[str, Sequence[int]]] = {
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Pow": (1,),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
}
"""Inputs of floating point that are settings and no weights, by operator."""


def branches(node: Any) -> list[Any]:
    """The graphs inside a node."""
    single = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [*single, *(graph for attribute in node.attribute for graph in attribute.graphs)]


def tensors_of(graph: Any) -> Iterator[Any]:
    """All tensors of a graph, with those of its branches and loops."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in branches(node):
            yield from tensors_of(inner)


def holders(graph: Any) -> Iterator[tuple[Any, str]]:
    """Tensors that may be weights, with their names: initialisers and the values of ``Constant`` nodes."""
    for tensor in graph.initializer:
        yield tensor, tensor.name
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output:
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield attribute.t, node.output[0]


def all_holders(graph: Any, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """Tensors that may be weights, with those of branches inside."""
    for tensor, name in holders(graph):
        yield tensor, prefix + name
    for node in graph.node:
        for number, inner in enumerate(branches(node)):
            yield from all_holders(inner, f"{prefix}{node.output[0]}/{number}/")


def literals_of(graph: Any) -> set[str]:
    """Tensors of floating point that are settings of operators and no weights."""
    return {node.input[i] for node in graph.node for i in _LITERALS.get(node.op_type, ()) if i < len(node.input)}


def is_weight(tensor: Any) -> bool:
    """Whether a tensor has numbers of floating point, and more than a scalar."""
    return tensor.data_type in _FLOATS and len(tensor.dims) > 0 and max(tensor.dims, default=1) > 1


def unwrap(graph: Any) -> None:
    """Let nodes read a shared weight itself where they read a copy of it that an ``Identity`` makes."""
    held = {tensor.name for tensor in graph.initializer}
    fixed = {each.name for each in graph.output} | {name for node in graph.node for name in captured(node)}
    copies: dict[str, str] = {}
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if node.op_type == "Identity" and node.input[0] in held and node.output[0] not in fixed:
            copies[node.output[0]] = node.input[0]
            del graph.node[i]
    for node in graph.node:
        node.input[:] = [copies.get(name, name) for name in node.input]
    for i in reversed(range(len(graph.value_info))):
        if graph.value_info[i].name in copies:
            del graph.value_info[i]


def empty(tensor: Any) -> None:
    for field in ("raw_data", "float_data", "int32_data", "double_data", "data_location", "external_data"):
        tensor.ClearField(field)


def fill(tensor: Any, array: Array) -> None:
    """Give a tensor other numbers of its own type."""
    from onnx import numpy_helper

    made = numpy_helper.from_array(np.ascontiguousarray(array), tensor.name)
    empty(tensor)
    tensor.dims[:] = made.dims
    tensor.data_type = made.data_type
    tensor.raw_data = made.raw_data


def names_used(graph: Any) -> set[str]:
    """All names of values in a graph, with those in its branches."""
    names = {tensor.name for tensor in graph.initializer} | {each.name for each in graph.input}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for inner in branches(node):
            names |= names_used(inner)
    return names


def captured(node: Any) -> Collection[str]:
    """What the branches of a node read from outside."""
    found: dict[str, None] = {}
    for graph in branches(node):
        own = {tensor.name for tensor in graph.initializer} | {each.name for each in graph.input}
        for inner in graph.node:
            reads = [*inner.input, *captured(inner)]
            found |= dict.fromkeys(name for name in reads if name and name not in own)
            own |= set(inner.output)
        found |= dict.fromkeys(each.name for each in graph.output if each.name not in own)
    return found
