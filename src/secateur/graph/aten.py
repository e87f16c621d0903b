"""ATen operators in the neutral words of :mod:`secateur.graph.rules`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch

from secateur.graph.ir import Operation, Value

Arguments = Mapping[str, Any]
"""Arguments of a call by the names of its schema, tensors as values."""
Reading = tuple[str, dict[str, Value], dict[str, Any]]
"""Operator, inputs, attributes."""
Reader = Callable[[Arguments, Sequence[Value]], Reading]


def read(
    func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Value], place: str
) -> Operation:
    """The operation that a call is.

    Args:
        func: the operator.
        args, kwargs: as it was called, with values in place of tensors.
        outputs: what it made.
        place: path of the module that called it.
    """
    name, names, defaults, reader = _signature(func)
    op, inputs, attrs = reader({**defaults, **dict(zip(names, args, strict=False)), **kwargs}, outputs)
    return Operation(op, inputs, tuple(outputs), attrs, place, name)


@cache
def _signature(func: torch._ops.OpOverload) -> tuple[str, tuple[str, ...], dict[str, Any], Reader]:
    """Name of an operator, of its arguments, their defaults, and what reads a call of it."""
    schema = func._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    name = name_of(func)
    reader = _READERS.get(name) or _READERS.get(name.rstrip("_"))
    if reader is None:
        reader = _all("elementwise" if torch.Tag.pointwise in func.tags else name)
    return name, tuple(argument.name for argument in schema.arguments), defaults, reader


def name_of(func: torch._ops.OpOverload) -> str:
    """What an operator is called, without its namespace and overload."""
    name: str = func._schema.name
    return name.removeprefix("aten::")


def _tensors(given: Arguments) -> dict[str, Value]:
    """All tensors among the arguments, lists numbered."""
    found: dict[str, Value] = {}
    for name, value in given.items():
        if isinstance(value, Value):
            found[name] = value
        elif isinstance(value, list | tuple):
            found.update({f"{name}{i}": v for i, v in enumerate(value) if isinstance(v, Value)})
    return found


def _some(**values: Any) -> dict[str, Value]:
    return {name: value for name, value in values.items() if isinstance(value, Value)}


def _rank(value: Value) -> int:
    return len(value.shape)


def _dims(given: Any, rank: int) -> list[int]:
    """Dimensions as a sorted list of positive numbers; None and empty mean all."""
    if given is None or given == []:
        return list(range(rank))
    return sorted(dim % rank for dim in ([given] if isinstance(given, int) else given))


def _plain(op: str, source: str = "self") -> Reader:
    return lambda a, _: (op, {"x": a[source]}, {})


def _all(op: str, **attrs: Any) -> Reader:
    return lambda a, _: (op, _tensors(a), attrs)


def _along(op: str, *names: str) -> Reader:
    """Operators with one dimension."""

    def reader(a: Arguments, _: Sequence[Value]) -> Reading:
        dim = next(a[name] for name in (*names, "dim") if name in a)
        return op, {"x": a["self"]}, {"dim": dim % max(_rank(a["self"]), 1)}

    return reader


def _ordered(a: Arguments, _: Sequence[Value]) -> Reading:
    dim = a.get("dim", a.get("dims", -1))
    rank = _rank(a["self"])
    return "ordered", {"x": a["self"]}, {"dims": _dims(dim if dim is not None else [], rank)}


def _reduction(kind: str) -> Reader:
    def reader(a: Arguments, _: Sequence[Value]) -> Reading:
        if "other" in a:
            return "elementwise", _tensors(a), {}
        dims = _dims(a.get("dim"), _rank(a["self"]))
        return "reduce", {"x": a["self"]}, {"dims": dims, "keepdim": bool(a.get("keepdim")), "kind": kind}

    return reader


def _norm(a: Arguments, outputs: Sequence[Value]) -> Reading:
    order = a.get("p", a.get("ord"))
    finite = order is None or (isinstance(order, int | float) and 0 < order < math.inf)
    return _reduction("sum" if finite else "other")(a, outputs)


def _binary(a: Arguments, _: Sequence[Value]) -> Reading:
    if isinstance(a["other"], Value) and isinstance(a["self"], Value):
        return "elementwise", _some(x=a["self"], y=a["other"]), {"scales": True}
    return "elementwise", _tensors(a), {}


def _power(a: Arguments, _: Sequence[Value]) -> Reading:
    return "elementwise", _tensors(a), {"exponent": a["exponent"]}


def _spread(given: Any, weight: Value) -> list[int]:
    """A number for each spatial axis of a convolution."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * (_rank(weight) - 2) if len(numbers) == 1 else numbers


def _convolution(transposed: bool) -> Reader:
    def reader(a: Arguments, _: Sequence[Value]) -> Reading:
        inputs = _some(x=a["input"], weight=a["weight"], bias=a["bias"])
        kernel, dilation = a["weight"].shape[2:], _spread(a["dilation"], a["weight"])
        windows: dict[str, Any] = {"stride": _spread(a["stride"], a["weight"]), "dilation": dilation}
        if isinstance(a["padding"], str):
            over = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            windows["pads"] = [(each // 2, each - each // 2) for each in over]
        else:
            windows["pads"] = [(each, each) for each in _spread(a["padding"], a["weight"])]
        turned = transposed or bool(a.get("transposed"))
        return "convolution", inputs, {"groups": a["groups"], "transposed": turned, **windows}

    return reader


def _batch_norm(a: Arguments, _: Sequence[Value]) -> Reading:
    inputs = _some(x=a["input"], weight=a["weight"], bias=a["bias"], mean=a["running_mean"], var=a["running_var"])
    spatial = [dim for dim in range(_rank(a["input"])) if dim != 1]
    live = a.get("training", a.get("use_input_stats"))
    statistics = (spatial if "training" in a else spatial[1:]) if live else []
    return "batch_norm", inputs, {"statistics": statistics, "eps": a["eps"]}


def _layer_norm(a: Arguments, _: Sequence[Value]) -> Reading:
    inputs = _some(x=a["input"], weight=a.get("weight"), bias=a.get("bias"))
    return "layer_norm", inputs, {"rank": len(a["normalized_shape"])}


def _group_norm(a: Arguments, _: Sequence[Value]) -> Reading:
    groups = a.get("num_groups", a.get("group"))
    return "group_norm", _some(x=a["input"], weight=a["weight"], bias=a["bias"]), {"groups": groups}


def _squeezed(a: Arguments, _: Sequence[Value]) -> Reading:
    return "reshape", {"x": a["self"]}, {}


def _transpose(a: Arguments, _: Sequence[Value]) -> Reading:
    rank = _rank(a["self"])
    order = list(range(rank))
    first, second = (rank - 2, rank - 1) if "dim0" not in a else (a["dim0"] % rank, a["dim1"] % rank)
    order[first], order[second] = order[second], order[first]
    return "permute", {"x": a["self"]}, {"dims": order}


def _permute(a: Arguments, _: Sequence[Value]) -> Reading:
    return "permute", {"x": a["self"]}, {"dims": [dim % _rank(a["self"]) for dim in a["dims"]]}


def _movedim(a: Arguments, _: Sequence[Value]) -> Reading:
    rank = _rank(a["self"])
    source, target = (
        [dim % rank for dim in ([given] if isinstance(given, int) else given)]
        for given in (a["source"], a["destination"])
    )
    order: list[int] = [-1] * rank
    for old, new in zip(source, target, strict=True):
        order[new] = old
    rest = iter(dim for dim in range(rank) if dim not in source)
    return "permute", {"x": a["self"]}, {"dims": [dim if dim >= 0 else next(rest) for dim in order]}


def _slice(a: Arguments, _: Sequence[Value]) -> Reading:
    attrs = {"dim": a["dim"] % _rank(a["self"]), "start": a.get("start"), "end": a.get("end"), "step": a.get("step", 1)}
    return "slice", {"x": a["self"]}, attrs


def _narrow(a: Arguments, _: Sequence[Value]) -> Reading:
    start = a["start"]
    return (
        "slice",
        {"x": a["self"]},
        {"dim": a["dim"] % _rank(a["self"]), "start": start, "end": start + a["length"], "step": 1},
    )


def _concatenate(op: str) -> Reader:
    def reader(a: Arguments, outputs: Sequence[Value]) -> Reading:
        return op, _tensors({"tensors": a["tensors"]}), {"dim": a.get("dim", 0) % _rank(outputs[0])}

    return reader


def _pad(a: Arguments, _: Sequence[Value]) -> Reading:
    rank, amounts = _rank(a["self"]), a.get("pad", a.get("padding"))
    pads = [(0, 0)] * rank
    for position in range(len(amounts) // 2):
        pads[rank - 1 - position] = (amounts[2 * position], amounts[2 * position + 1])
    if a.get("mode", "constant") != "constant":
        return "ordered", {"x": a["self"]}, {"dims": [dim for dim, amount in enumerate(pads) if any(amount)]}
    return "pad", {"x": a["self"]}, {"pads": pads}


def _roll(a: Arguments, outputs: Sequence[Value]) -> Reading:
    return _ordered({**a, "dim": a["dims"]}, outputs)


def _flip(a: Arguments, _: Sequence[Value]) -> Reading:
    return "flip", {"x": a["self"]}, {"dims": _dims(a["dims"], _rank(a["self"]))}


def _spatial(rank: int, source: str = "self") -> Reader:
    return lambda a, _: ("spatial", {"x": a.get(source, a.get("input"))}, {"rank": rank})


def _unfold(a: Arguments, _: Sequence[Value]) -> Reading:
    """Tensor.unfold: windows of one axis on a new last one; the axis stays as it is."""
    return "windows", {"x": a["self"]}, {"dim": a["dimension"] % _rank(a["self"])}


def _repeat_interleave(a: Arguments, _: Sequence[Value]) -> Reading:
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return "barrier", _tensors(a), {}
    return "repeat_interleave", {"x": a["self"]}, {"dim": a["dim"] % _rank(a["self"]), "count": a["repeats"]}


def _index(a: Arguments, _: Sequence[Value]) -> Reading:
    used = [dim for dim, value in enumerate(a["indices"]) if value is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return "barrier", _tensors(a), {}
    return "index", {"x": a["self"], **_tensors({"index": a["indices"]})}, {"dim": used[0]}


def _index_select(a: Arguments, _: Sequence[Value]) -> Reading:
    return "index", {"x": a["self"], "index": a["index"]}, {"dim": a["dim"] % _rank(a["self"])}


def whole_equation(equation: str) -> str:
    """An equation of einsum without spaces and with its output; empty where it takes a diagonal."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        letters = equation.replace(",", "").replace("...", "")
        plain = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
        equation += "->" + ("..." if "..." in equation else "") + plain
    terms = equation.split("->")[0].split(",")
    plain_terms = [term.replace("...", "") for term in terms]
    return "" if any(len(set(term)) != len(term) for term in plain_terms) else equation


def _einsum(a: Arguments, _: Sequence[Value]) -> Reading:
    inputs = _tensors({"tensors": a["tensors"]})
    equation = whole_equation(a["equation"])
    return ("einsum", inputs, {"equation": equation}) if equation else ("barrier", inputs, {})


def _attention(a: Arguments, _: Sequence[Value]) -> Reading:
    inputs = _some(q=a["query"], k=a["key"], v=a["value"], mask=a["attn_mask"])
    return "attention", inputs, {"scaled": a.get("scale") is None}


def _recurrent(gates: int) -> Reader:
    def reader(a: Arguments, _: Sequence[Value]) -> Reading:
        if "batch_sizes" in a or (a["train"] and a["dropout"]):
            return "barrier", _tensors(a), {}
        state = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
        inputs = {"x": a["input"], **_tensors({"state": state, "weight": a["params"]})}
        names = ("num_layers", "bidirectional", "has_biases")
        return "recurrent", inputs, {"gates": gates, **{name: a[name] for name in names}}

    return reader


def _addmm(a: Arguments, _: Sequence[Value]) -> Reading:
    return "matmul", {"a": a["mat1"], "b": a["mat2"], "bias": a["self"]}, {}


def _matmul(a: Arguments, _: Sequence[Value]) -> Reading:
    return "matmul", {"a": a["self"], "b": a.get("other", a.get("mat2", a.get("vec")))}, {}


def _shuffled(op: str, rank: int = 2, out_rank: int = 2) -> Reader:
    return lambda a, _: (op, {"x": a["self"]}, {"rank": rank, "out_rank": out_rank})


def _names(names: str, reader: Reader) -> dict[str, Reader]:
    return dict.fromkeys(names.split(), reader)


_READERS: Final[Mapping[str, Reader]] = {
    **_names(
        "contiguous clone detach alias to _to_copy dropout feature_dropout alpha_dropout native_dropout lift_fresh "
        "zeros_like ones_like empty_like full_like rand_like randn_like type_as requires_grad "
        "lift_fresh_copy resolve_conj resolve_neg zero fill cpu cuda double float half bfloat16 int long bool",
        lambda a, _: ("same", {"x": a.get("self", a.get("input"))}, {}),
    ),
    **_names("mul div true_divide", _binary),
    "pow": _power,
    **_names(
        "bernoulli where masked_fill copy lerp addcmul addcdiv fmod clamp maximum minimum rsub nan_to_num "
        "isin hardswish hardsigmoid hardtanh silu mish gelu relu relu6 elu selu celu softplus leaky_relu threshold "
        "log_sigmoid softshrink hardshrink rrelu",
        _all("elementwise"),
    ),
    **_names(
        "zeros ones empty full arange eye tril_indices triu_indices linspace scalar_tensor rand randn randperm "
        "new_zeros new_ones new_empty new_full empty_strided randint",
        lambda *_: ("create", {}, {}),
    ),
    "linear": lambda a, _: ("linear", _some(x=a["input"], weight=a["weight"], bias=a["bias"]), {}),
    **_names("matmul mm bmm mv dot", _matmul),
    "addmm": _addmm,
    "einsum": _einsum,
    **_names("conv1d conv2d conv3d convolution", _convolution(False)),
    **_names("conv_transpose1d conv_transpose2d conv_transpose3d", _convolution(True)),
    **_names("batch_norm instance_norm _native_batch_norm_legit_no_training", _batch_norm),
    **_names("layer_norm native_layer_norm rms_norm _fused_rms_norm", _layer_norm),
    **_names("group_norm", _group_norm),
    **_names("softmax _softmax log_softmax _log_softmax _safe_softmax", _along("softmax")),
    **_names("cumsum cumprod sort argsort topk logcumsumexp cummax", _ordered),
    **_names(
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
        lambda a, o: _pad({**a, "mode": "reflect"}, o),
    ),
    "glu": _along("gate"),
    "prelu": lambda a, _: ("batch_norm", {"x": a["self"], "weight": a["weight"]}, {}),
    "roll": _roll,
    "flip": _flip,
    "sum": _reduction("sum"),
    **_names(
        "mean amax amin max min argmax argmin var std prod logsumexp any all var_mean std_mean median",
        _reduction("other"),
    ),
    **_names("norm linalg_vector_norm", _norm),
    **_names(
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias ravel",
        _squeezed,
    ),
    **_names("transpose swapaxes t mT adjoint", _transpose),
    "permute": _permute,
    "movedim": _movedim,
    **_names("expand expand_as", _plain("expand")),
    "repeat": lambda a, _: ("repeat", {"x": a["self"]}, {"times": a["repeats"]}),
    "tile": lambda a, o: (
        "repeat",
        {"x": a["self"]},
        {"times": [1] * (_rank(o[0]) - len(a["dims"])) + list(a["dims"])},
    ),
    "repeat_interleave": _repeat_interleave,
    **_names("cat concat concatenate", _concatenate("concatenate")),
    **_names("stack", _concatenate("stack")),
    **_names("split chunk split_with_sizes tensor_split unsafe_chunk unsafe_split", _along("split")),
    **_names("unbind select", _along("unbind")),
    "slice": _slice,
    "narrow": _narrow,
    **_names("pad constant_pad_nd", _pad),
    **_names(
        "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_linear1d upsample_nearest1d",
        _spatial(1),
    ),
    **_names(
        "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "max_pool2d_with_indices grid_sampler affine_grid_generator",
        _spatial(2),
    ),
    **_names(
        "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d",
        _spatial(3),
    ),
    "pixel_shuffle": _shuffled("from_channels"),
    "pixel_unshuffle": _shuffled("into_channels"),
    "im2col": _shuffled("into_channels", rank=1),
    "col2im": _shuffled("from_channels", rank=1, out_rank=2),
    "channel_shuffle": _all("barrier"),
    "unfold": _unfold,
    "embedding": lambda a, _: ("embedding", {"weight": a["weight"], "ids": a["indices"]}, {}),
    "index": _index,
    "index_select": _index_select,
    **_names("scaled_dot_product_attention", _attention),
    "lstm": _recurrent(4),
    "gru": _recurrent(3),
    **_names("rnn_tanh rnn_relu", _recurrent(1)),
}
