"""ONNX models for the tests: written by hand, node by node, or exported from modules; and those of other makers."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, checker, helper, load, numpy_helper, shape_inference
from torch import nn

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class Builder:
    """A graph under construction; weights come from one seeded generator."""

    def __init__(self, opset: int = 18) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.opset = opset
        self._random = np.random.default_rng(0)

    def weight(self, name: str, *shape: int) -> str:
        array = self._random.standard_normal(shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def positive(self, name: str, *shape: int) -> str:
        self.weight(name, *shape)
        array = np.abs(numpy_helper.to_array(self.weights.pop())) + 0.5
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, name: str, *numbers: int) -> str:
        self.weights.append(numpy_helper.from_array(np.array(numbers, dtype=np.int64), name))
        return name

    def add(self, op: str, inputs: list[str], outputs: str | list[str], **attributes: Any) -> str:
        made = [outputs] if isinstance(outputs, str) else outputs
        domain = attributes.pop("domain", None)
        self.nodes.append(helper.make_node(op, inputs, made, name=f"n_{made[0]}", domain=domain, **attributes))
        return made[0]

    def conv(self, x: str, name: str, enters: int, leaves: int, size: int = 1, group: int = 1) -> str:
        weights = [
            self.weight(f"{name}.weight", leaves, enters // group, size, size),
            self.weight(f"{name}.bias", leaves),
        ]
        return self.add("Conv", [x, *weights], name, group=group, pads=[size // 2] * 4)

    def model(self, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], check: bool = True) -> ModelProto:
        def info(name: str, shape: list[Any]) -> Any:
            return helper.make_tensor_value_info(name, INT if name == "ids" else FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "g",
            [info(n, s) for n, s in inputs.items()],
            [info(n, s) for n, s in outputs.items()],
            self.weights,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        if check:
            checker.check_model(model)
        return model


def _image(b: Builder, last: str, channels: int, spatial: list[Any] | None = None) -> ModelProto:
    """Ends with a convolution to four channels."""
    b.add("Identity", [b.conv(last, "head", channels, 4)], "y")
    return b.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4, *(spatial or [8, 8])]})


def literal_reshape() -> ModelProto:
    """A channel shuffle and heads whose sizes stand in the file."""
    b = Builder()
    x = b.conv("x", "first", 3, 12)
    x = b.add("Reshape", [x, b.ints("five", 0, 3, 4, 8, 8)], "five_d")
    x = b.add("Transpose", [x], "turned", perm=[0, 2, 1, 3, 4])
    x = b.add("Reshape", [x, b.ints("four", -1, 12, 8, 8)], "shuffled")
    return _image(b, x, 12)


def computed_reshape() -> ModelProto:
    """The same sizes, computed from the shape of a tensor that is cut, with the batch left open."""
    b = Builder()
    x = b.conv("x", "first", 3, 12)
    b.add("Shape", [x], "shape")
    b.ints("zero", 0), b.ints("one", 1), b.ints("two", 2), b.ints("four", 4), b.ints("three", 3), b.ints("twelve", 12)
    b.add("Slice", ["shape", "zero", "one"], "batch")
    b.add("Slice", ["shape", "one", "two"], "channels")
    b.add("Slice", ["shape", "two", "four"], "pixels")
    b.add("Div", ["channels", "three"], "quotient")
    b.add("Concat", ["batch", "three", "quotient", "pixels"], "split", axis=0)
    b.add("Concat", ["batch", "twelve", "pixels"], "joined", axis=0)
    x = b.add("Reshape", [x, "split"], "five_d")
    x = b.add("Transpose", [x], "turned", perm=[0, 2, 1, 3, 4])
    x = b.add("Reshape", [x, "joined"], "shuffled")
    return _image(b, x, 12)


def parts() -> ModelProto:
    """Split by named sizes and by counting, slices by number and from the end, concatenation."""
    b = Builder()
    x = b.conv("x", "first", 3, 12)
    b.add("Split", [x, b.ints("sizes", 3, 4, 5)], ["a", "b", "c"], axis=1)
    b.add("Split", [b.conv("x", "second", 3, 8)], ["d", "e"], axis=1, num_outputs=2)
    b.add("Mul", ["d", "e"], "de")
    for name, start, end in (("low", 0, 2), ("high", -3, np.iinfo(np.int64).max)):
        axis = b.ints(f"{name}_axis", 1)
        b.add("Slice", ["c", b.ints(f"{name}_from", start), b.ints(f"{name}_to", end), axis], name)
    x = b.add("Concat", ["a", "b", "low", "high", "de"], "all", axis=1)
    return _image(b, x, 3 + 4 + 2 + 3 + 4)


def expanded() -> ModelProto:
    """Expand, Tile, ConstantOfShape and Where over channels, with their sizes as literals; a shared initialiser."""
    b = Builder()
    x = b.conv("x", "first", 3, 6)
    b.weight("shared.weight", 6, 6, 1, 1)
    x = b.add("Conv", [x, "shared.weight"], "once")
    x = b.add("Conv", [b.add("Relu", [x], "open"), "shared.weight"], "twice")
    b.add("Expand", [b.weight("spot", 1, 1, 8, 8), b.ints("wide", 1, 6, 8, 8)], "spread")
    b.add("Tile", [b.weight("dot", 1, 1, 1, 1), b.ints("times", 1, 6, 1, 1)], "tiled")
    zero = numpy_helper.from_array(np.zeros(1, dtype=np.float32))
    b.add("ConstantOfShape", [b.ints("wanted", 1, 6, 1, 1)], "zeros", value=zero)
    b.add("Greater", [x, "spread"], "mask")
    b.add("Where", ["mask", x, "tiled"], "chosen")
    x = b.add("Sum", ["chosen", "zeros", "twice"], "sum")
    return _image(b, x, 6)


def groups() -> ModelProto:
    """Grouped and depth-wise convolutions, a transposed one, group and instance norms, PReLU, resizing by sizes."""
    b = Builder(21)
    x = b.conv("x", "first", 3, 8)
    x = b.conv(x, "grouped", 8, 12, 3, 4)
    x = b.add("PRelu", [x, b.weight("slope", 12, 1, 1)], "bent")
    x = b.conv(x, "depth", 12, 12, 3, 12)
    norm = [b.weight("gn.weight", 12), b.weight("gn.bias", 12)]
    x = b.add("GroupNormalization", [x, *norm], "normed", num_groups=4)
    x = b.add("ConvTranspose", [x, b.weight("up.weight", 12, 3, 2, 2)], "up", strides=[2, 2], group=2)
    x = b.add("InstanceNormalization", [x, b.weight("in.weight", 6), b.weight("in.bias", 6)], "instance")
    x = b.add("Resize", [x, "", "", b.ints("target", 2, 6, 8, 8)], "small", mode="nearest")
    b.add("Identity", [b.conv(x, "head", 6, 4)], "y")
    return b.model({"x": [2, 3, 8, 8]}, {"y": [2, 4, 8, 8]})


def blocks() -> ModelProto:
    """Depth to space both ways, space to depth, padding, batch norm, average and maximum of all pixels."""
    b = Builder()
    x = b.conv("x", "first", 3, 12)
    x = b.add("DepthToSpace", [x], "dcr", blocksize=2)
    x = b.add("SpaceToDepth", [x], "back", blocksize=2)
    x = b.add("DepthToSpace", [b.conv(x, "second", 12, 16)], "crd", blocksize=2, mode="CRD")
    stats = [b.weight("bn.weight", 4), b.weight("bn.bias", 4), b.weight("bn.mean", 4), b.positive("bn.var", 4)]
    x = b.add("BatchNormalization", [x, *stats], "bn")
    x = b.add("Pad", [x, b.ints("pads", 0, 1, 0, 0, 0, 2, 0, 0)], "padded")
    b.add("GlobalAveragePool", [x], "mean")
    x = b.add("Add", ["mean", b.add("GlobalMaxPool", [x], "most")], "both")
    x = b.add("Flatten", [x], "flat")
    b.add("Gemm", [x, b.weight("head.weight", 4, 7), b.weight("head.bias", 4)], "y", transB=1)
    return b.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4]})


def attention() -> ModelProto:
    """Token ids, layer norms, heads split by literals, a softmax over keys, einsum."""
    b = Builder()
    x = b.add("Gather", [b.weight("embed", 11, 12), "ids"], "embedded")
    norm = [b.weight("ln.weight", 12), b.weight("ln.bias", 12)]
    h = b.add("LayerNormalization", [x, *norm], "normed")
    for name in "qkv":
        b.add("MatMul", [h, b.weight(f"{name}.weight", 12, 8)], f"{name}_flat")
        b.add("Add", [f"{name}_flat", b.weight(f"{name}.bias", 8)], f"{name}_bias")
        b.add("Reshape", [f"{name}_bias", b.ints(f"{name}_heads", 0, 5, 4, 2)], f"{name}_split")
    b.add("Einsum", ["q_split", "k_split"], "scores", equation="bqhd,bkhd->bhqk")
    b.add("Softmax", ["scores"], "weights")
    b.add("Einsum", ["weights", "v_split"], "mixed", equation="bhqk,bkhd->bqhd")
    b.add("Reshape", ["mixed", b.ints("merged", 0, 5, 8)], "flat")
    b.add("MatMul", ["flat", b.weight("out.weight", 8, 12)], "out")
    x = b.add("Add", [x, "out"], "residual")
    b.add("MatMul", [x, b.weight("up.weight", 12, 10)], "up")
    b.add("MatMul", [b.add("Gelu", ["up"], "gelu"), b.weight("down.weight", 10, 12)], "down")
    x = b.add("Add", [x, "down"], "last")
    b.add("ReduceMean", [x, b.ints("tokens", 1)], "pooled", keepdims=0)
    b.add("Gemm", ["pooled", b.weight("head.weight", 12, 3)], "y")
    b.opset = 20
    return b.model({"ids": ["n", 5]}, {"y": ["n", 3]})


def recurrent() -> ModelProto:
    """An LSTM in both directions, whose first state is made of its sizes, then a GRU."""
    b = Builder()
    b.add("MatMul", ["x", b.weight("enter", 3, 6)], "entered")
    weights = [b.weight("lstm.W", 2, 20, 6), b.weight("lstm.R", 2, 20, 5), b.weight("lstm.B", 2, 40)]
    b.add("Shape", ["x"], "shape")
    b.ints("one", 1), b.ints("two", 2)
    b.add("Slice", ["shape", "one", "two"], "batch")
    b.add("Concat", ["two", "batch", b.ints("five", 5)], "sizes", axis=0)
    b.add("ConstantOfShape", ["sizes"], "state", value=numpy_helper.from_array(np.zeros(1, dtype=np.float32)))
    outs = ["lstm", "lstm_h", "lstm_c"]
    b.add("LSTM", ["entered", *weights, "", "state", "state"], outs, hidden_size=5, direction="bidirectional")
    b.add("Transpose", ["lstm"], "turned", perm=[0, 2, 1, 3])
    b.add("Reshape", ["turned", b.ints("joined", 0, 0, 10)], "both")
    weights = [b.weight("gru.W", 1, 12, 10), b.weight("gru.R", 1, 12, 4), b.weight("gru.B", 1, 24)]
    b.add("GRU", ["both", *weights], ["", "gru_h"], hidden_size=4)
    b.add("Squeeze", ["gru_h", b.ints("first", 0)], "last")
    b.add("Gemm", ["last", b.weight("head.weight", 4, 3), b.weight("head.bias", 3)], "y")
    return b.model({"x": [6, "n", 3]}, {"y": ["n", 3]})


def old() -> ModelProto:
    """Operators as they were: slices, pads, clips, squeezes and softmax with attributes; weights among the inputs."""
    b = Builder(9)
    x = b.conv("x", "first", 3, 6)
    x = b.add("Clip", [x], "clipped", min=0.0, max=6.0)
    b.add("Slice", [x], "low", starts=[0], ends=[4], axes=[1])
    b.add("Slice", [x], "high", starts=[4], ends=[6], axes=[1])
    b.add("Pad", ["low"], "padded", pads=[0, 0, 1, 1, 0, 0, 1, 1])
    b.add("AveragePool", ["padded"], "pooled", kernel_shape=[3, 3])
    x = b.add("Concat", ["pooled", "high"], "joined", axis=1)
    x = b.add("GlobalAveragePool", [x], "mean")
    x = b.add("Squeeze", [x], "flat", axes=[2, 3])
    b.add("Gemm", [x, b.weight("head.weight", 6, 4), b.weight("head.bias", 4)], "scores")
    b.add("Softmax", ["scores"], "y")
    model = b.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 4]})
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, FLOAT, list(tensor.dims)))
    model.ir_version = 3
    checker.check_model(model)
    return model


def constants() -> ModelProto:
    """Weights as ``Constant`` nodes, scales given by broadcasting, a normalisation spelled out."""
    b = Builder()
    x = b.conv("x", "first", 3, 6)
    x = b.add("Mul", [x, b.weight("scale", 1, 6, 1, 1)], "scaled")
    x = b.add("Add", [x, b.add("Reshape", [b.weight("shift", 6), b.ints("as", 1, 6, 1, 1)], "shaped")], "shifted")
    x = b.conv(b.add("HardSwish", [x], "bent"), "second", 6, 5)
    b.add("ReduceMean", [x, b.ints("axis", 1)], "mean")
    b.add("Sub", [x, "mean"], "centred")
    b.add("Add", ["centred", b.add("Identity", [b.conv(x, "third", 5, 5)], "same")], "sum")
    model = _image(b, "sum", 5)
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == FLOAT
    ]
    rest = [*nodes, *model.graph.node]
    ints = [tensor for tensor in model.graph.initializer if tensor.data_type != FLOAT]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(rest)
    model.graph.initializer.extend(ints)
    checker.check_model(model)
    return model


def branching() -> ModelProto:
    """A branch that reads a tensor from outside, a custom operator, quantised weights: what they touch must stay."""
    b = Builder()
    x = b.add("Relu", [b.conv("x", "first", 3, 6)], "open")
    empty: list[Any] = []
    result = [helper.make_tensor_value_info("r", FLOAT, None)]
    both = [helper.make_graph([helper.make_node(op, ["open"], ["r"])], op, empty, result) for op in ("Neg", "Sigmoid")]
    b.add("ReduceSum", ["x"], "total", keepdims=0)
    b.weights.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "nought"))
    b.add("Greater", ["total", "nought"], "more")
    b.add("If", ["more"], "branched", then_branch=both[0], else_branch=both[1])
    x = b.conv("branched", "second", 6, 5)
    b.weights.append(numpy_helper.from_array(np.ones((7, 5, 1, 1), dtype=np.int8), "third.int8"))
    b.weights.append(numpy_helper.from_array(np.array(0.1, dtype=np.float32), "step"))
    b.add("DequantizeLinear", ["third.int8", "step"], "third.weight")
    x = b.add("Conv", [x, "third.weight"], "third")
    x = b.conv(x, "fourth", 7, 5)
    return _image(b, x, 5)


HAND: dict[str, Callable[[], ModelProto]] = {
    "literal_reshape": literal_reshape,
    "computed_reshape": computed_reshape,
    "parts": parts,
    "expanded": expanded,
    "groups": groups,
    "blocks": blocks,
    "attention": attention,
    "recurrent": recurrent,
    "old": old,
    "constants": constants,
    "branching": branching,
}


def export(module: nn.Module, inputs: torch.Tensor, path: Path, new: bool = True) -> Path:
    """A module as an ONNX file with an open batch axis, by torch's new exporter or its old one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if new:
            shapes = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.onnx.export(
                module, (inputs,), dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=["x"]
            )
            assert program is not None
            program.save(str(path))
        else:
            axes = {"x": {0: "n"}}
            torch.onnx.export(module, (inputs,), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    return path


def check_shapes(path: Path, feeds: Mapping[str, np.ndarray]) -> int:
    """What a file says of the shapes of its values is what inference finds and what a run makes.

    Returns:
        how many sizes it says.
    """
    model = load(str(path))
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    held = {tensor.name for tensor in model.graph.initializer} | {each.name for each in model.graph.input}
    said = [each for each in [*model.graph.value_info, *model.graph.output] if each.type.HasField("tensor_type")]
    made = {name for node in model.graph.node for name in node.output}
    assert {each.name for each in said} <= made | held
    inner = [each.name for each in model.graph.value_info if each.name in made]
    model.graph.output.extend(ValueInfoProto(name=name) for name in inner)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = list(dict.fromkeys(each.name for each in model.graph.output))
    shapes = {name: array.shape for name, array in zip(names, session.run(names, dict(feeds)), strict=True)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    symbols: dict[str, int] = {}
    for each in (each for each in model.graph.input if each.name in feeds):
        dims = each.type.tensor_type.shape.dim
        symbols |= {d.dim_param: n for d, n in zip(dims, feeds[each.name].shape, strict=True) if d.dim_param}
    count = 0
    for each in said:
        dims = each.type.tensor_type.shape.dim
        assert not dims or len(dims) == len(shapes[each.name]), each.name
        for dim, size in zip(dims, shapes[each.name], strict=False):
            known = dim.dim_value
            if dim.dim_param and set(re.findall(r"[A-Za-z_]\w*", dim.dim_param)) <= symbols.keys():
                known = int(eval(dim.dim_param, {"__builtins__": {}}, symbols))  # such as 4*n
            assert not known or known == size, (each.name, dim, size)
            count += bool(known)
    return count


OTHERS = {
    "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (0.99, {"x": (2, 3, 48, 192)}),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (0.99, {"x": (2, 3, 64, 64)}),
    "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (0.99, {"x": (2, 3, 48, 64)}),
    "magika/models/standard_v3_3/model.onnx": (0.99, {"bytes": (2, 2048)}),
}
"""Files in packages of other makers: at least what share of the parameters can be cut, and shapes of inputs."""


def other(name: str) -> Path | None:
    """A file of a package, where that is installed or lies unpacked in a folder of ``SECATEUR_ONNX_PACKAGES``."""
    package, _, rest = name.partition("/")
    found = importlib.util.find_spec(package)
    folders = [Path(place) for place in (found.submodule_search_locations or [] if found else [])]
    if (unpacked := os.environ.get("SECATEUR_ONNX_PACKAGES")) is not None:
        folders += [Path(unpacked) / package, Path(unpacked) / package / package]
    return next((folder / rest for folder in folders if (folder / rest).is_file()), None)
