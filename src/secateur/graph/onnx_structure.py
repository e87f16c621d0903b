"""The structure of ONNX models: which tensors there are, what branches read, what is a weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
    drop(graph.value_info, lambda each: each.name in copies)


def reads(node: Any) -> list[str]:
    """What a node reads, with its branches."""
    return [name for name in [*node.input, *captured(node)] if name]


def sweep(graph: Any, before: Any, wanted: Collection[str]) -> None:
    """Drop from an edited graph what some names needed before the edit and do not need now.

    Nodes that nothing needed before stay, unless what they read is gone.

    Args:
        graph: changed in place; its nodes are in an order in which they run.
        before: the same as it was.
        wanted: names.
    """
    now = _needed(graph, wanted)
    lost = _needed(before, wanted) - now
    nodes, absent = [], set[str]()
    for node in graph.node:
        made = {name for name in node.output if name}
        if (made & lost and not made & now) or absent.intersection(reads(node)):
            absent |= made
        else:
            nodes.append(type(node).FromString(node.SerializeToString()))
    absent |= lost - {name for node in nodes for name in [*reads(node), *node.output]}
    del graph.node[:]
    graph.node.extend(nodes)
    weights = {tensor.name for tensor in graph.initializer} & absent  # old files list them among the inputs, too
    drop(graph.input, lambda each: each.name in weights)
    drop(graph.initializer, lambda each: each.name in weights)
    drop(graph.value_info, lambda each: each.name in absent)
    drop(graph.sparse_initializer, lambda each: each.values.name in absent)
    drop(graph.quantization_annotation, lambda each: each.tensor_name in absent)


def _needed(graph: Any, wanted: Collection[str]) -> set[str]:
    """Some names, and all that they are computed from."""
    found = set(wanted)
    for node in reversed(graph.node):
        if any(name in found for name in node.output if name):
            found.update(reads(node))
    return found


def drop(held: Any, which: Callable[[Any], bool]) -> None:
    """Delete some of the entries of a protobuf list."""
    for i in reversed(range(len(held))):
        if which(held[i]):
            del held[i]


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


def scope(node: Any) -> str | None:
    """Path of the module that a node was exported from, dotted; None where neither metadata nor names tell."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            paths = re.findall(r"'([^']*)'", str(entry.value))
            return str(paths[-2]) if len(paths) > 1 else None
    names = map(str, (node.name, *node.output[:1]))  # bytes, where they are no text
    name = next((name for name in names if "/" in name), "")
    found: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if found and part.startswith(f"{found[-1]}."):  # blocks/blocks.0 is one module in another
            found[-1:] = part.split(".")
        else:
            found.append(part)
    return ".".join(found) if name else None


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
