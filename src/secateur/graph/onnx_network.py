"""An ONNX model as a network: shapes from two runs, arithmetic of shapes folded, every other node read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from secateur.errors import RequestError, refuse
from secateur.graph.ir import Network, Operation, Value
from secateur.graph.onnx_files import OnnxFile, run_onnx
from secateur.graph.onnx_operators import Call, read
from secateur.graph.onnx_structure import Array, branches, captured, reads, scope

Inputs = Mapping[str, Array]
_SMALL: Final = 4096
"""Numbers of a tensor that may be arithmetic of shapes."""
_LARGE: Final = 2**30
"""Numbers of one tensor of a run that are refused before anything runs."""
_RANDOM: Final = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_NOT_SIZES: Final = frozenset({*_RANDOM, "QuantizeLinear", "DequantizeLinear"})
"""Operators that are no arithmetic of shapes whatever they read: random numbers, and weights in integers."""
_SIZES: Final = (64, 32, 48, 224, 96, 128, 256, 512, 16, 8, 4, 2, 1)
"""What an open size of an input is tried as."""
_BUFFERS: Final = {"BatchNormalization": (3, 4)}
"""Inputs that are measured, not learned, by operator."""


@dataclass
class Reading:
    """A model read.

    Attributes:
        network: its operations.
        values: by name of a tensor.
        known: numbers of what no weight and no input's numbers touch, by name.
        moving: which of these numbers follow the open sizes of the inputs.
        nodes: places (names of first outputs) of the nodes that became operations, with their positions.
    """

    network: Network = field(default_factory=Network)
    values: dict[str, Value] = field(default_factory=dict)
    known: dict[str, Array] = field(default_factory=dict)
    moving: dict[str, Array] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)

    def names(self, values: Mapping[Value, Value]) -> dict[str, str]:
        """Names of values, and of what is taken in their place."""
        named = {value: name for name, value in self.values.items()}
        return {named[value]: named[other] for value, other in values.items()}


def example_inputs(model: OnnxFile, seed: int = 0, given: Inputs | None = None) -> tuple[Inputs, Inputs]:
    """Inputs that the model runs on, twice: with open sizes chosen differently, where it takes them.

    Args:
        model: its inputs say types and shapes; sizes left open are tried.
        seed: of the numbers.
        given: examples of all inputs; only the first size is then chosen anew, where it is open.

    Raises:
        RequestError: it runs on none of them.
    """
    generator = np.random.default_rng(seed)
    if given is not None:
        first = _fitting(model, given)
        _runs(model, first)
        return first, _second(model, first)
    problem: RequestError | None = None
    if not any(_open(each) for each in model.entering):
        sizes: Sequence[int] = _SIZES[:1]
    else:
        sizes = _SIZES
    for size in sizes:
        try:
            found = {each.name: _numbers(each, (2, size), generator) for each in model.entering}
            _runs(model, found)
            return found, _second(model, found, generator, size)
        except RequestError as error:
            problem = problem or error
    assert problem is not None
    hint = "give examples of its inputs: --data FILE.npz, arrays by the names of the inputs"
    refuse(problem.code, "an ONNX model on inputs of any size", problem.found, hint)


def _open(each: Any) -> list[int]:
    """Axes of an input whose size is left open."""
    return [i for i, dim in enumerate(each.type.tensor_type.shape.dim) if dim.dim_value <= 0]


def _numbers(each: Any, sizes: tuple[int, int], generator: np.random.Generator) -> Array:
    """Random numbers for an input: of an open first axis, and of other open ones, the size is given."""
    from onnx import helper

    kind = each.type.tensor_type
    if not each.type.HasField("tensor_type"):
        refuse(
            "onnx-inputs", f"input {each.name!r}", "it is no tensor", "prune the part of the model that takes tensors"
        )
    rank = len(kind.shape.dim)
    open_ = set(_open(each))
    batch = 0 in open_ and rank > 1
    dims = [
        (sizes[0] if axis == 0 and batch else sizes[1]) if axis in open_ else dim.dim_value
        for axis, dim in enumerate(kind.shape.dim)
    ]
    _not_too_large(each.name, dims)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if dtype.kind in "iub":
        return generator.integers(0 if dims else 1, 2, dims).astype(dtype)
    if dtype.kind not in "fV":
        refuse("onnx-inputs", f"input {each.name!r}", f"no numbers of type {dtype} can be made up", "--data FILE.npz")
    return generator.standard_normal(dims).astype(dtype)


def _not_too_large(name: str, dims: Sequence[int]) -> None:
    count = int(np.prod([int(dim) for dim in dims], dtype=object))
    if count > _LARGE:
        refuse("onnx-too-large", f"tensor {name!r}", f"one run makes {count:,} numbers of it")


def _fitting(model: OnnxFile, given: Inputs) -> Inputs:
    """The given arrays, in the types of the inputs."""
    from onnx import helper

    names = [each.name for each in model.entering]
    missing = [name for name in names if name not in given]
    if missing:
        found = f"there are arrays {', '.join(sorted(given)) or 'of no name'}"
        refuse("onnx-inputs", f"input {missing[0]!r} of the model", found, f"name them {', '.join(names)}")
    dtypes = {e.name: helper.tensor_dtype_to_np_dtype(e.type.tensor_type.elem_type) for e in model.entering}
    return {name: np.ascontiguousarray(np.asarray(given[name]).astype(dtypes[name])) for name in names}


def _second(model: OnnxFile, first: Inputs, generator: np.random.Generator | None = None, size: int = 0) -> Inputs:
    """Inputs of other sizes, where sizes are open and others run: all of them changed, or only the first axis."""
    ways: list[Inputs] = []
    if generator is not None:
        others = (size * 3 // 2, size * 2, size)
        ways = [{e.name: _numbers(e, (3, other), generator) for e in model.entering} for other in others]
    repeated = {
        e.name: np.concatenate([first[e.name], first[e.name][:1]])
        if first[e.name].ndim and 0 in _open(e)
        else first[e.name]
        for e in model.entering
    }
    for way in [*ways, repeated]:
        if any(way[name].shape != first[name].shape for name in first):
            try:
                _runs(model, way)
            except RequestError:
                continue
            return way
    return first


def _runs(model: OnnxFile, inputs: Inputs) -> None:
    _forecast(model, inputs)
    run_onnx(model, [inputs], [each.name for each in model.proto.graph.output])


def _forecast(model: OnnxFile, inputs: Inputs) -> None:
    """Refuse a run that would make a tensor of absurd size, as far as shapes are known beforehand."""
    import onnx

    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    for each in proto.graph.input:
        for axis, dim in enumerate(each.type.tensor_type.shape.dim):
            if each.name in inputs and axis < inputs[each.name].ndim:
                dim.dim_value = inputs[each.name].shape[axis]
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # it knows less than the run
        return
    for each in [*proto.graph.value_info, *proto.graph.output]:
        dims = [dim.dim_value for dim in each.type.tensor_type.shape.dim]
        if all(dim > 0 for dim in dims):
            _not_too_large(each.name, dims)


def watched(model: OnnxFile, names: Sequence[str]) -> OnnxFile:
    """The model with some more of its values as outputs."""
    import onnx

    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    there = {each.name for each in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return model.changed(proto)


def _shapes(model: OnnxFile, names: Sequence[str], inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Shapes of values in a run: ``Shape`` nodes beside them are the only further outputs."""
    import onnx

    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    asked = [f"\u0000shape{i}" for i in range(len(names))]
    for name, output in zip(names, asked, strict=True):
        proto.graph.node.append(onnx.helper.make_node("Shape", [name], [output]))
        proto.graph.output.append(onnx.ValueInfoProto(name=output))
    (found,) = run_onnx(model.changed(proto), [inputs], asked)
    return {name: tuple(int(n) for n in shape) for name, shape in zip(names, found, strict=True)}


def _tensor_names(model: OnnxFile) -> list[str]:
    """What the nodes make, but sequences and what comes of them."""
    import onnx

    strange: set[str] = set()
    try:
        inferred = onnx.shape_inference.infer_shapes(model.proto)
        strange = {e.name for e in inferred.graph.value_info if not e.type.HasField("tensor_type")}
    except Exception:
        pass
    return [n for node in model.proto.graph.node for n in node.output if n and n not in strange]


def from_onnx(model: OnnxFile, first: Inputs, second: Inputs) -> Reading:
    """Read a model.

    Args:
        model: the file.
        first: inputs it runs on.
        second: others; what differs follows the sizes that the model leaves open.

    Raises:
        RequestError: it does not run.
    """
    names = [each.name for each in model.entering] + _tensor_names(model)
    shapes = _shapes(model, names, first)
    for name, shape in shapes.items():
        _not_too_large(name, shape)
    reading = Reading()
    _state(model, reading)
    _fold(model, reading, shapes, first, second)
    for each in model.entering:
        value = reading.values[each.name] = Value(shapes[each.name], "input", each.name)
        reading.network.inputs.append(value)
    for number, node in enumerate(model.proto.graph.node):
        _enter(model, reading, node, number, shapes)
    reading.network.outputs = [
        reading.values[each.name] for each in model.proto.graph.output if each.name in reading.values
    ]
    return reading


def _state(model: OnnxFile, reading: Reading) -> None:
    """Weights by name; those that batch norms measured are buffers."""
    measured = {
        node.input[position]
        for node in model.proto.graph.node
        for position in _BUFFERS.get(node.op_type, ())
        if position < len(node.input)
    }
    for name, array in model.arrays.items():
        kind: Any = "buffer" if name in measured else "parameter"
        reading.values[name] = reading.network.state[name] = Value(tuple(array.shape), kind, name, array.dtype.itemsize)
    for name, array in model.inner.items():
        reading.network.state[name] = Value(tuple(array.shape), "parameter", name, array.dtype.itemsize)


def _fold(
    model: OnnxFile, reading: Reading, shapes: Mapping[str, tuple[int, ...]], first: Inputs, second: Inputs
) -> None:
    """Find what depends on shapes and literals alone, and its numbers in both runs."""
    from onnx import numpy_helper

    graph = model.proto.graph
    fixed = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name not in model.arrays}
    cone: dict[str, None] = dict.fromkeys(fixed)
    for node in graph.node:
        plain = all(name in cone for name in reads(node)) and node.op_type not in _NOT_SIZES
        if node.op_type == "Constant":
            plain = node.output[0] not in model.arrays
        if node.op_type in ("Shape", "Size"):
            plain = True
        sizes = [int(np.prod(shapes.get(name, (_SMALL + 1,)), dtype=object)) for name in node.output if name]
        made = node.op_type in ("ConstantOfShape", "Expand", "Tile") and max(sizes, default=0) > 1
        if plain and max(sizes, default=0) <= _SMALL and not (made and _is_float(node, fixed)):
            cone |= dict.fromkeys(name for name in node.output if name)
    asked = [name for name in cone if name not in fixed]
    both = run_onnx(watched(model, asked), (first, second), asked) if asked else [[], []]
    reading.known = {**fixed, **dict(zip(asked, both[0], strict=True))}
    reading.moving = {name: np.zeros(array.shape, dtype=bool) for name, array in fixed.items()}
    for name, one, other in zip(asked, *both, strict=True):
        same_shape = one.shape == other.shape
        reading.moving[name] = one != other if same_shape else np.ones(one.shape, dtype=bool)


def _is_float(node: Any, fixed: Mapping[str, Array]) -> bool:
    """Whether a node that makes a tensor of one number makes it of floating point."""
    if node.op_type != "ConstantOfShape":
        filler = fixed.get(node.input[0])
        return filler is None or filler.dtype.kind == "f"
    given = [attribute.t.data_type for attribute in node.attribute if attribute.name == "value"]
    return not given or given[0] in (1, 10, 11, 16)


def _enter(model: OnnxFile, reading: Reading, node: Any, number: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Add the operations that a node is; what is known already, or no tensor, is no operation."""
    outputs = [name for name in node.output if name]
    if not outputs or all(name in reading.known or name in model.arrays for name in outputs):
        return
    inputs = [_value(reading, name) if name else None for name in node.input]
    made = []
    for name in outputs:
        value = reading.values[name] = Value(shapes.get(name, ()))
        made.append(value)
    known = {i: reading.known[name] for i, name in enumerate(node.input) if name in reading.known}
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    place = outputs[0]
    reading.nodes[place] = number
    inner = [_value(reading, name) for name in captured(node)]
    if branches(node):
        inner += [reading.network.state[name] for name in model.inner if name.startswith(f"{node.output[0]}/")]
        given = {f"x{i}": value for i, value in enumerate([*inputs, *inner]) if value is not None}
        reading.network.operations.append(
            Operation(node.op_type, given, tuple(made), {}, place, node.op_type, scope(node))
        )
        return
    op = domain + node.op_type
    call = Call(op, inputs, made, _attributes(node), known, model.opset, place)
    reading.network.operations += [replace(step, scope=scope(node)) for step in read(call)]


def _value(reading: Reading, name: str) -> Value:
    """A tensor by name; what is known of shapes alone is a constant."""
    if name not in reading.values:
        known = reading.known.get(name)
        reading.values[name] = Value(() if known is None else tuple(known.shape), "constant", name)
    return reading.values[name]


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return found
