"""Blocks of an ONNX model left out, and its run in which their sums are overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.graph.blocks import Block, shortcuts
from secateur.graph.ir import Value
from secateur.graph.onnx_files import OnnxFile
from secateur.graph.onnx_network import Reading
from secateur.graph.onnx_structure import captured, sweep


def overwritten(model: OnnxFile, reading: Reading, instead: Mapping[Value, Value]) -> OnnxFile:
    """The model with some values replaced by others where they are made; every other operator still runs.

    Args:
        model: what was read, or the same with other numbers.
        reading: how it was read.
        instead: for values that one node makes, what is taken in their place.
    """
    proto = _copy(model)
    _identities(proto.graph, reading.names(instead))
    return model.changed(proto)


def bypassed(model: OnnxFile, reading: Reading, blocks: Sequence[Block]) -> OnnxFile:
    """The model without some blocks: what read their sums reads the shortcuts.

    What only the branches needed goes, with the arithmetic of their shapes. A sum that is an output of the model, or
    that branches of control flow read, keeps its name.

    Args:
        model, reading: see :func:`overwritten`.
        blocks: what goes.
    """
    proto = _copy(model)
    graph, sources = proto.graph, sources_of(reading, blocks)
    outputs = {each.name for each in graph.output}
    fixed = outputs.union(*(captured(node) for node in graph.node))
    for node in graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
    _identities(graph, {name: source for name, source in sources.items() if name in fixed})
    sweep(graph, model.proto.graph, outputs)
    return model.holding(proto)


def sources_of(reading: Reading, blocks: Sequence[Block]) -> dict[str, str]:
    """Names of the sums of some blocks, and of what stays that stands for each: the shortcut of a shortcut."""
    direct, found = reading.names(shortcuts(blocks)), {}
    for name, source in direct.items():
        while source in direct:
            source = direct[source]
        found[name] = source
    return found


def _copy(model: OnnxFile) -> Any:
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    return proto


def _identities(graph: Any, sources: Mapping[str, str]) -> None:
    """Let nodes that make one thing give what others make."""
    for node in graph.node:
        if len(node.output) == 1 and node.output[0] in sources:
            node.op_type, node.input[:] = "Identity", [sources[node.output[0]]]
            node.ClearField("attribute")
            node.ClearField("domain")
