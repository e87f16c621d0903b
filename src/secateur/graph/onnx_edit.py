"""Edits of an ONNX model: weights sliced by name, and the numbers that its nodes hold derived anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from secateur.graph.atoms import Axis
from secateur.graph.edit import kept
from secateur.graph.ir import Value
from secateur.graph.onnx_files import OnnxFile
from secateur.graph.onnx_network import Reading
from secateur.graph.onnx_structure import Array, drop, names_used, reads, sweep
from secateur.graph.spaces import Gone, Graph


def cut_onnx(model: OnnxFile, reading: Reading, graph: Graph, gone: Gone) -> OnnxFile:
    """The smaller model.

    Args:
        model: what was read, or the same with other numbers.
        reading: how it was read.
        graph: of ``reading.network``.
        gone: which atoms go.
    """
    editor = _Editor(model, reading, graph, gone)
    arrays = {}
    for name, dims in kept(graph, gone).items():
        array = model.arrays[name]
        for dim, index in dims.items():
            array = array.take(index.numpy(), axis=dim)
        arrays[name] = array
    for number in reading.nodes.values():
        editor.node(editor.proto.graph.node[number])
    editor.finish(arrays)
    return model.changed(editor.proto, arrays)


class _Editor:
    """A copy of a model's structure, and what is to be put into it."""

    def __init__(self, model: OnnxFile, reading: Reading, graph: Graph, gone: Gone) -> None:
        self.proto = type(model.proto)()
        self.proto.CopyFrom(model.proto)
        self._source = model.proto
        self._reading, self._graph, self._gone = reading, graph, gone
        self._names = names_used(model.proto.graph)
        self._facts = {fact.place: fact for fact in graph.facts}
        self._before: list[tuple[str, Any]] = []
        self._tainted: set[str] = set()
        for node in self.proto.graph.node:
            sizes = node.op_type in ("Shape", "Size") and node.input[0] in reading.values
            moved = sizes and any(old != new for old, new in self.changes(node.input[0]))
            if moved or any(name in self._tainted for name in reads(node) if name in reading.known):
                self._tainted |= {name for name in node.output if name in reading.known}

    def count(self, axis: Axis) -> int:
        """How much of an axis stays."""
        return int((~self._gone[axis]).sum())

    def axes(self, name: str) -> tuple[Axis, ...]:
        value = self._reading.values[name]
        return self._graph.values.get(value, ())

    def changes(self, name: str) -> list[tuple[int, int]]:
        """Old and new size of every axis of a tensor."""
        value: Value = self._reading.values[name]
        axes = self._graph.values.get(value)
        return [(n, n if axes is None else self.count(axes[dim])) for dim, n in enumerate(value.shape)]

    def node(self, node: Any) -> None:
        """Derive a node's numbers anew."""
        fact = self._facts.get(next(name for name in node.output if name))
        if fact is not None:
            _set(node, "group" if fact.name == "groups" else fact.name, self.count(fact.axis))
        if node.op_type in _EDITS and node.domain in ("", "ai.onnx"):
            _EDITS[node.op_type](self, node)

    def tainted(self, node: Any, position: int) -> bool:
        """Whether an input is computed from sizes that change, so that all of its numbers may."""
        return position < len(node.input) and node.input[position] in self._tainted

    def numbers(self, node: Any, position: int) -> tuple[list[int], list[bool]] | None:
        """A known input's integers, and which of them follow open sizes; None where it has none."""
        name = node.input[position] if position < len(node.input) else ""
        if name not in self._reading.known:
            return None
        known, moving = self._reading.known[name], self._reading.moving[name]
        return [int(n) for n in known.ravel()], [bool(m) for m in moving.ravel()]

    def override(self, node: Any, position: int, numbers: Mapping[int, int]) -> None:
        """Set some integers of an input: as a literal of this node alone, or beside those that follow open sizes."""
        if not numbers:
            return
        found = self.numbers(node, position)
        assert found is not None
        old, moving = found
        new = np.array([numbers.get(i, number) for i, number in enumerate(old)], dtype=np.int64)
        label = self.fresh(f"{next(name for name in node.output if name)}_sizes")
        if not any(moved and i not in numbers for i, moved in enumerate(moving)):
            self.literal(label, new)
        else:
            import onnx

            mask = np.array([i in numbers for i in range(len(old))])
            names = [self.fresh(f"{label}_{part}") for part in ("set", "to")]
            self.literal(names[0], mask)
            self.literal(names[1], new)
            made = onnx.helper.make_node("Where", [*names, node.input[position]], [label], name=label)
            self._before.append((next(name for name in node.output if name), made))
        node.input[position] = label

    def literal(self, name: str, numbers: Array) -> None:
        from onnx import numpy_helper

        self.proto.graph.initializer.append(numpy_helper.from_array(numbers, name))

    def fresh(self, wish: str) -> str:
        """A name that nothing has."""
        name, number = wish, 1
        while name in self._names:
            name, number = f"{wish}_{number}", number + 1
        self._names.add(name)
        return name

    def finish(self, arrays: Mapping[str, Array]) -> None:
        """Put new nodes in their places, drop arithmetic that nothing reads now, correct what is said of shapes."""
        graph = self.proto.graph
        before = dict(self._before)
        nodes: list[Any] = []
        for node in graph.node:
            first = next((name for name in node.output if name), "")
            if first in before:
                nodes.append(before[first])
            nodes.append(node)
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
        sweep(graph, self._source.graph, self._stay())
        for each in graph.input:
            if each.name in arrays:
                for dim, size in zip(each.type.tensor_type.shape.dim, arrays[each.name].shape, strict=True):
                    dim.dim_value = size
        drop(graph.value_info, lambda each: not self._said(each))

    def _stay(self) -> set[str]:
        """All that is made but arithmetic of shapes, which goes where nobody reads it since it was overridden."""
        made = {name for node in self._source.graph.node for name in node.output}
        return (made - self._reading.known.keys()) | {each.name for each in self.proto.graph.output}

    def _said(self, each: Any) -> bool:
        """Correct the sizes that the file says of a value; False where nothing is known of it."""
        if each.name not in self._reading.values or not each.type.HasField("tensor_type"):
            return each.name in self._reading.known
        dims = each.type.tensor_type.shape.dim
        changes = self.changes(each.name)
        if len(dims) != len(changes):
            return False
        for dim, (old, new) in zip(dims, changes, strict=True):
            if old != new and dim.dim_value > 0:
                dim.dim_value = new
            elif old != new:  # a product of what is open and what was cut
                dim.ClearField("dim_param")
        return True


def _set(node: Any, name: str, number: int) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.i = number


def _target(position: int, follow: bool = False) -> Callable[[_Editor, Any], None]:
    """An input that is the shape of the output; with ``follow`` one size may be left to what the others imply (-1)."""

    def edit(editor: _Editor, node: Any) -> None:
        found = editor.numbers(node, position)
        if found is None:
            return
        numbers, moving = found
        changes = editor.changes(node.output[0])[-len(numbers) :] if numbers else []
        new = {}
        tainted = editor.tainted(node, position)
        for i, (number, moved, (old, size)) in enumerate(zip(numbers, moving, changes, strict=True)):
            if (tainted or old != size) and number == old:
                if not moved:
                    new[i] = size
                elif follow and -1 not in (*numbers, *new.values()):
                    new[i] = -1
        editor.override(node, position, new)

    return edit


def _tile(editor: _Editor, node: Any) -> None:
    found = editor.numbers(node, 1)
    if found is not None:
        before, after = editor.changes(node.input[0]), editor.changes(node.output[0])
        ones = [i for i, (size, _) in enumerate(before) if size == 1]
        new = {i: after[i][1] for i in ones if after[i][0] != after[i][1]}
        if editor.tainted(node, 1):
            new = {i: new.get(i, number) for i, number in enumerate(found[0]) if not found[1][i]}
        editor.override(node, 1, new)


def _split(editor: _Editor, node: Any) -> None:
    rank = len(editor.changes(node.input[0]))
    dim = next((a.i for a in node.attribute if a.name == "axis"), 0) % rank
    sizes = [editor.changes(name)[dim] for name in node.output]
    if all(old == new for old, new in sizes) and not editor.tainted(node, 1):
        return
    new = [size for _, size in sizes]
    for attribute in node.attribute:
        if attribute.name == "split":
            attribute.ints[:] = new
            return
    if editor.numbers(node, 1) is not None:
        editor.override(node, 1, dict(enumerate(new)))
    elif len(set(new)) > 1:
        label = editor.fresh(f"{node.output[0]}_sizes")
        editor.literal(label, np.array(new, dtype=np.int64))
        node.input.append(label)
        for i in reversed(range(len(node.attribute))):
            if node.attribute[i].name == "num_outputs":
                del node.attribute[i]


def _slice(editor: _Editor, node: Any) -> None:
    axes, attributes = editor.axes(node.input[0]), {a.name: a for a in node.attribute}
    if "starts" in attributes:  # before version 10
        starts, ends = list(attributes["starts"].ints), list(attributes["ends"].ints)
        dims = list(attributes["axes"].ints) if "axes" in attributes else list(range(len(starts)))
    else:
        found = [editor.numbers(node, position) for position in (1, 2)]
        if found[0] is None or found[1] is None:
            return
        starts, ends = found[0][0], found[1][0]
        named = editor.numbers(node, 3)
        dims = named[0] if named is not None else list(range(len(starts)))
    new_starts: dict[int, int] = {}
    new_ends: dict[int, int] = {}
    tainted = [editor.tainted(node, position) for position in (1, 2)]
    for i, (start, end, dim) in enumerate(zip(starts, ends, dims, strict=True)):
        axis = axes[dim % len(axes)]
        if editor.count(axis) == len(axis):
            for told, new, number in zip(tainted, (new_starts, new_ends), (start, end), strict=True):
                if told:
                    new[i] = number
            continue
        first, last, _ = slice(start, end).indices(len(axis))
        new_starts[i] = editor.count(axis[:first])
        if last < len(axis) or end < len(axis):
            new_ends[i] = editor.count(axis[:last])
    if "starts" in attributes:
        attributes["starts"].ints[:] = [new_starts.get(i, n) for i, n in enumerate(starts)]
        attributes["ends"].ints[:] = [new_ends.get(i, n) for i, n in enumerate(ends)]
    else:
        for position, new, old, told in ((1, new_starts, starts, tainted[0]), (2, new_ends, ends, tainted[1])):
            editor.override(node, position, {i: n for i, n in new.items() if told or n != old[i]})


def _recurrent(editor: _Editor, node: Any) -> None:
    _set(node, "hidden_size", editor.changes(node.input[2])[2][1])


_EDITS: Final[Mapping[str, Callable[[_Editor, Any], None]]] = {
    "Reshape": _target(1, follow=True),
    "Expand": _target(1),
    "ConstantOfShape": _target(0),
    "Resize": _target(3),
    "Tile": _tile,
    "Split": _split,
    "Slice": _slice,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
}
