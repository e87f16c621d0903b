"""ONNX operators in the neutral words of :mod:`secateur.graph.rules`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from secateur.graph.ir import Operation, Value
from secateur.graph.onnx_structure import Array

Reading = tuple[str, dict[str, Value], dict[str, Any]]
"""Operator, inputs, attributes."""


@dataclass(frozen=True)
class Call:
    """One node.

    Attributes:
        op: its operator, with the domain unless that is ONNX's own.
        inputs: values, None where an optional one is left out.
        outputs: values; those that are not named are left out.
        attrs: attributes by name.
        known: inputs whose numbers the network does not compute, by position: literals and arithmetic of shapes.
        opset: version of the operators.
        place: name of its first output.
    """

    op: str
    inputs: Sequence[Value | None]
    outputs: Sequence[Value]
    attrs: Mapping[str, Any]
    known: Mapping[int, Array]
    opset: int
    place: str

    @property
    def x(self) -> Value:
        first = self.inputs[0]
        if first is None:
            raise ValueError("no first input")
        return first

    def at(self, position: int) -> Value | None:
        return self.inputs[position] if position < len(self.inputs) else None

    def numbers(self, position: int, attribute: str = "") -> list[int] | None:
        """Integers of an attribute, or of a known input; None where there are none."""
        if attribute in self.attrs:
            given = self.attrs[attribute]
            return list(given) if isinstance(given, Sequence) else [given]
        if position in self.known:
            return [int(number) for number in self.known[position].ravel()]
        return None


Reader = Callable[[Call], Reading | list[Operation]]
"""What a node is: one operation, or several."""


def read(call: Call) -> list[Operation]:
    """The operations that a node is; an operator without a reader goes under its own name."""
    try:
        found = _READERS.get(call.op, _unknown)(call)
    except (IndexError, KeyError, TypeError, ValueError):  # not as its operator is defined: nothing is assumed of it
        found = ("barrier", _tensors(call), {})
    if isinstance(found, list):
        return found
    op, inputs, attrs = found
    return [Operation(op, inputs, tuple(call.outputs), attrs, call.place, call.op)]


def _unknown(call: Call) -> Reading:
    return call.op, _tensors(call), {}


def _tensors(call: Call) -> dict[str, Value]:
    return {f"x{i}": value for i, value in enumerate(call.inputs) if value is not None}


def _some(**values: Value | None) -> dict[str, Value]:
    return {name: value for name, value in values.items() if value is not None}


def _rank(value: Value) -> int:
    return len(value.shape)


def _plain(op: str, **attrs: Any) -> Reader:
    return lambda call: (op, {"x": call.x}, attrs)


def _shaped(op: str) -> Reader:
    """Operators whose second input is a shape or a list of axes; one that the network computes says nothing."""

    def reader(call: Call) -> Reading:
        told = call.at(1) is None or 1 in call.known
        return (op, {"x": call.x}, {}) if told else ("barrier", _tensors(call), {})

    return reader


def _all(op: str, **attrs: Any) -> Reader:
    return lambda call: (op, _tensors(call), attrs)


def _axis(call: Call, default: int, name: str = "axis") -> int:
    axis, rank = int(call.attrs.get(name, default)), max(_rank(call.x), 1)
    if not -rank <= axis < rank:
        raise ValueError("no such axis")
    return axis % rank


def _scales(call: Call) -> Reading:
    both = all(value is not None and _rank(value) > 0 for value in call.inputs)
    return "elementwise", _tensors(call), {"scales": both}


def _windows(call: Call) -> dict[str, Any]:
    """Where the windows of a convolution lie."""
    weight = call.at(1)
    kernel = () if weight is None else weight.shape[2:]
    rank = len(kernel)
    stride, dilation = (list(call.attrs.get(name, [1] * rank)) for name in ("strides", "dilations"))
    pads, automatic = call.attrs.get("pads", [0] * 2 * rank), call.attrs.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * rank
        for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
            entering = call.x.shape[2 + axis]
            over = max(0, (-(-entering // step) - 1) * step + apart * (size - 1) + 1 - entering)
            small, large = over // 2, over - over // 2
            pads[axis], pads[rank + axis] = (small, large) if automatic == "SAME_UPPER" else (large, small)
    return {"stride": stride, "dilation": dilation, "pads": list(zip(pads[:rank], pads[rank:], strict=True))}


def _convolution(transposed: bool) -> Reader:
    def reader(call: Call) -> Reading:
        inputs = _some(x=call.x, weight=call.at(1), bias=call.at(2))
        windows = {} if transposed else _windows(call)
        return "convolution", inputs, {"groups": call.attrs.get("group", 1), "transposed": transposed, **windows}

    return reader


def _gemm(call: Call) -> list[Operation]:
    """alpha A' B' + beta C, where A' and B' may be transposed."""
    a, b, c = call.x, call.at(1), call.at(2)
    made: list[Operation] = []
    if call.attrs.get("transA"):
        turned = Value(a.shape[::-1])
        made.append(Operation("permute", {"x": a}, (turned,), {"dims": [1, 0]}, call.place, call.op))
        a = turned
    out = tuple(call.outputs)
    if call.attrs.get("transB"):
        made.append(Operation("linear", _some(x=a, weight=b, bias=c), out, {}, call.place, call.op))
    else:
        made.append(Operation("matmul", _some(a=a, b=b, bias=c), out, {}, call.place, call.op))
    return made


def _batch_norm(call: Call) -> Reading:
    inputs = _some(x=call.x, weight=call.at(1), bias=call.at(2), mean=call.at(3), var=call.at(4))
    live = call.attrs.get("training_mode")
    statistics = [d for d in range(_rank(call.x)) if d != 1] if live else []
    return "batch_norm", inputs, {"statistics": statistics, "eps": call.attrs.get("epsilon", 1e-5)}


def _instance_norm(call: Call) -> Reading:
    inputs = _some(x=call.x, weight=call.at(1), bias=call.at(2))
    return "batch_norm", inputs, {"statistics": list(range(2, _rank(call.x)))}


def _layer_norm(call: Call) -> Reading:
    inputs = _some(x=call.x, weight=call.at(1), bias=call.at(2))
    return "layer_norm", inputs, {"rank": _rank(call.x) - _axis(call, -1)}


def _group_norm(call: Call) -> Reading:
    inputs = _some(x=call.x, weight=call.at(1), bias=call.at(2))
    if call.opset < 21 and call.attrs["num_groups"] != call.x.shape[1]:  # scales of groups, not of channels
        return "barrier", _tensors(call), {}
    return "group_norm", inputs, {"groups": call.attrs["num_groups"]}


def _softmax(call: Call) -> Reading:
    if call.opset >= 13:
        return "softmax", {"x": call.x}, {"dim": _axis(call, -1)}
    dims = list(range(_axis(call, 1), _rank(call.x)))  # everything from there on is one axis
    return (
        ("softmax", {"x": call.x}, {"dim": dims[0]}) if len(dims) == 1 else ("ordered", {"x": call.x}, {"dims": dims})
    )


def _reduction(kind: str) -> Reader:
    def reader(call: Call) -> Reading:
        rank, axes = _rank(call.x), call.numbers(1, "axes")
        if call.at(1) is not None and axes is None:
            return "barrier", _tensors(call), {}
        if not axes:
            if call.attrs.get("noop_with_empty_axes"):
                return "same", {"x": call.x}, {}
            axes = list(range(rank))
        keep = bool(call.attrs.get("keepdims", 1))
        return "reduce", {"x": call.x}, {"dims": sorted({a % rank for a in axes}), "keepdim": keep, "kind": kind}

    return reader


def _arg(call: Call) -> Reading:
    keep = bool(call.attrs.get("keepdims", 1))
    return "reduce", {"x": call.x}, {"dims": [_axis(call, 0)], "keepdim": keep, "kind": "other"}


def _spatial(call: Call) -> Reading:
    return "spatial", {"x": call.x}, {"rank": _rank(call.x) - 2}


def _resize(call: Call) -> Reading:
    """Axes up to the last one that keeps its size pass; the others are spatial."""
    out = call.outputs[0].shape
    moved = [dim for dim, size in enumerate(call.x.shape) if size != out[dim]]
    rank = _rank(call.x) - min([2, *moved]) if _rank(call.x) > 2 else _rank(call.x)
    return "spatial", {"x": call.x}, {"rank": rank}


def _slice(call: Call) -> list[Operation]:
    """One operation for each axis; what is left out is the whole axis."""
    starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
    if starts is None or ends is None:
        return [Operation("barrier", _tensors(call), tuple(call.outputs), {}, call.place, call.op)]
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = call.numbers(4, "steps") or [1] * len(starts)
    made: list[Operation] = []
    value, rank = call.x, _rank(call.x)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        dim = axis % rank
        size = value.shape[dim]
        bounds = _bounds(start, end, step, size)
        count = len(range(*bounds))
        if count == size and step == 1:
            continue
        shape = (*value.shape[:dim], count, *value.shape[dim + 1 :])
        out = Value(shape)
        attrs: dict[str, Any] = {"dim": dim, "start": bounds[0], "end": bounds[1], "step": 1}
        op = "slice"
        if step != 1:
            op, attrs = "ordered", {"dims": [dim]}
        made.append(Operation(op, {"x": value}, (out,), attrs, call.place, call.op))
        value = out
    last = made.pop() if made else Operation("same", {"x": value}, (value,), {}, call.place, call.op)
    return [*made, Operation(last.op, last.inputs, tuple(call.outputs), last.attrs, call.place, call.op)]


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int, int]:
    """As in Python, but that an end far below zero counts as before the first where the step is negative."""
    return slice(start, None if step < 0 and end < -size else end, step).indices(size)


def _split(call: Call) -> Reading:
    return "split", {"x": call.x}, {"dim": _axis(call, 0)}


def _concatenate(call: Call) -> Reading:
    return "concatenate", _tensors(call), {"dim": call.attrs["axis"] % _rank(call.outputs[0])}


def _transpose(call: Call) -> Reading:
    rank = _rank(call.x)
    return "permute", {"x": call.x}, {"dims": list(call.attrs.get("perm", range(rank)[::-1]))}


def _tile(call: Call) -> Reading:
    times = call.numbers(1)
    return ("barrier", _tensors(call), {}) if times is None else ("repeat", {"x": call.x}, {"times": times})


def _pad(call: Call) -> Reading:
    amounts, axes, rank = call.numbers(1, "pads"), call.numbers(3), _rank(call.x)
    if amounts is None:
        return "barrier", _tensors(call), {}
    axes = [axis % rank for axis in axes] if axes else list(range(rank))
    pads = [(0, 0)] * rank
    for position, axis in enumerate(axes):
        pads[axis] = (amounts[position], amounts[position + len(axes)])
    moved = [dim for dim, amount in enumerate(pads) if any(amount)]
    if call.attrs.get("mode", "constant") != "constant" or min(map(min, pads)) < 0:
        return "ordered", {"x": call.x}, {"dims": moved}
    return "pad", {"x": call.x}, {"pads": pads}


def _gather(call: Call) -> Reading:
    data, ids = call.x, call.at(1)
    assert ids is not None
    dim = _axis(call, 0)
    if _rank(ids) == 0:
        return "unbind", {"x": data}, {"dim": dim}
    if data.is_state and dim == 0 and 1 not in call.known:
        return "embedding", {"weight": data, "ids": ids}, {}
    return "index", {"x": data, "index0": ids}, {"dim": dim}


def _depth_to_space(call: Call) -> Reading:
    attrs = {"rank": 2, "out_rank": 2, "outer": call.attrs.get("mode", "DCR") == "DCR"}
    return "from_channels", {"x": call.x}, attrs


def _space_to_depth(call: Call) -> Reading:
    return "into_channels", {"x": call.x}, {"rank": 2, "outer": True}


def _einsum(call: Call) -> Reading:
    from secateur.graph.aten import whole_equation

    equation = whole_equation(call.attrs["equation"])
    return ("einsum", _tensors(call), {"equation": equation}) if equation else ("barrier", _tensors(call), {})


def _recurrent(gates: int) -> Reader:
    def reader(call: Call) -> Reading:
        names = ("x", "weight", "recurrence", "bias", "", "state0", "state1", "peephole")
        known = {name: call.at(i) for i, name in enumerate(names) if name}
        if call.at(4) is not None or call.attrs.get("layout"):
            return "barrier", _tensors(call), {}
        return "recurrent_onnx", _some(**known), {"gates": gates}

    return reader


def _normalise(call: Call) -> Reading:
    return "softmax", {"x": call.x}, {"dim": _axis(call, -1)}


def _cumulative(call: Call) -> Reading:
    axis = call.numbers(1)
    rank = _rank(call.x)
    return "ordered", {"x": call.x}, {"dims": list(range(rank)) if axis is None else [axis[0] % rank]}


def _top(call: Call) -> Reading:
    return "ordered", {"x": call.x}, {"dims": [_axis(call, -1)]}


def _triangle(call: Call) -> Reading:
    rank = _rank(call.x)
    return "ordered", {"x": call.x}, {"dims": [rank - 2, rank - 1]}


def _matmul(call: Call) -> Reading:
    return "matmul", _some(a=call.x, b=call.at(1)), {}


def _names(names: str, reader: Reader) -> dict[str, Reader]:
    return dict.fromkeys(names.split(), reader)


_READERS: Final[Mapping[str, Reader]] = {
    **_names("Identity Cast CastLike Dropout", _plain("same")),
    **_names(
        "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu "
        "Clip Cos Cosh Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu "
        "Less LessOrEqual Log Max Mean Min Mish Mod Neg Not Or Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin "
        "Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor "
        "com.microsoft.Gelu com.microsoft.FastGelu com.microsoft.BiasGelu com.microsoft.QuickGelu",
        _all("elementwise"),
    ),
    **_names("Mul Div PRelu", _scales),
    "ConstantOfShape": lambda call: ("create", {}, {}) if 0 in call.known else ("barrier", _tensors(call), {}),
    "Conv": _convolution(False),
    "ConvTranspose": _convolution(True),
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    **_names("Softmax LogSoftmax", _softmax),
    "LpNormalization": _normalise,
    **_names("ReduceSum ReduceL1 ReduceL2 ReduceSumSquare", _reduction("sum")),
    **_names("ReduceMean ReduceMax ReduceMin ReduceProd ReduceLogSum ReduceLogSumExp", _reduction("other")),
    **_names("ArgMax ArgMin", _arg),
    **_names("MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool", _spatial),
    **_names("Resize Upsample", _resize),
    "Concat": _concatenate,
    "Split": _split,
    "Slice": _slice,
    **_names("Reshape Flatten Squeeze Unsqueeze", _shaped("reshape")),
    "Transpose": _transpose,
    "Expand": _shaped("expand"),
    "Tile": _tile,
    "Gather": _gather,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "CumSum": _cumulative,
    "TopK": _top,
    "Trilu": _triangle,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
}
