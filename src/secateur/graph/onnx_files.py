"""ONNX files: read without trust, written in one go, run in onnxruntime.

A file is kept as its structure and the arrays of its weights apart: a change of either copies only what changes.
Weights may lie beside a file ("external data"); they are read from its own folder and from nowhere else.
"""

from __future__ import annotations

import importlib.util
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from secateur.errors import SecateurError, refuse
from secateur.graph.onnx_structure import (
    Array,
    all_holders,
    branches,
    empty,
    fill,
    holders,
    is_weight,
    literals_of,
    tensors_of,
    unwrap,
)

PACKAGES: Final = ("onnx", "onnxruntime")
ONE_FILE: Final = 3 * 2**29
"""Bytes of weights up to which they lie in the graph's own file (protobuf ends at 2 GiB); larger ones lie beside it."""
_PROTOBUF: Final = 2**31 - 1
_PAGE: Final = 4096
_SECONDS: Final = 600.0


@dataclass(frozen=True)
class OnnxFile:
    """A model.

    Attributes:
        proto: the model; where a weight's data belong there is nothing.
        arrays: weights, by the name of the initialiser or of what the ``Constant`` node makes.
        beside: bytes that were read from files beside the model's own.
        inner: weights inside branches and loops, by the output of the node and their own name; they stay in ``proto``.
    """

    proto: Any
    arrays: Mapping[str, Array]
    beside: int = 0
    inner: Mapping[str, Array] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(array.nbytes for array in self.arrays.values())

    @cached_property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return max((each.version for each in self.proto.opset_import if each.domain in ("", "ai.onnx")), default=1)

    @cached_property
    def entering(self) -> list[Any]:
        """Inputs that are given at a run; old files list their weights among them."""
        held = {tensor.name for tensor in self.proto.graph.initializer}
        held |= {tensor.values.name for tensor in self.proto.graph.sparse_initializer}
        return [each for each in self.proto.graph.input if each.name not in held]

    @staticmethod
    def rows(entering: Any) -> int | None:
        """Size of the first axis of an input; None where it is open, or there is none."""
        dims = entering.type.tensor_type.shape.dim
        return dims[0].dim_value if len(dims) and dims[0].dim_value > 0 else None

    def assembled(self) -> Any:
        """The whole model as one message."""
        model = type(self.proto)()
        model.CopyFrom(self.proto)
        for tensor, name in holders(model.graph):
            if name in self.arrays:
                fill(tensor, self.arrays[name])
        return model

    def write(self, path: Path) -> list[Path]:
        """Write the model; returns what belongs to it besides.

        The weights of a large one lie in a file beside it whose name holds a checksum, so that no other model's are
        ever overwritten.
        """
        if self.bytes <= ONE_FILE:
            path.write_bytes(self.assembled().SerializeToString())
            return []
        model, digest = type(self.proto)(), blake2b(digest_size=6)
        model.CopyFrom(self.proto)
        _constants_to_initializers(model.graph, self.arrays)
        unnamed = path.with_name(f"{path.stem}.data")
        with unnamed.open("wb") as stream:
            for tensor in model.graph.initializer:
                if tensor.name in self.arrays:
                    fill(tensor, self.arrays[tensor.name])
                    digest.update(tensor.raw_data)
                    _send_out(tensor, stream)
        data = path.with_name(f"{path.stem}.{digest.hexdigest()}.data")
        for tensor in model.graph.initializer:
            if tensor.name in self.arrays:
                tensor.external_data.add(key="location", value=data.name)
        unnamed.rename(data)
        path.write_bytes(model.SerializeToString())
        return [data]

    def holding(self, proto: Any) -> OnnxFile:
        """The model with a structure in which something was left out, and the weights that this still holds."""
        held = {name for _, name in holders(proto.graph)}
        inner = {
            name
            for node in proto.graph.node
            if branches(node)
            for name in self.inner
            if name.startswith(f"{node.output[0]}/")
        }
        return replace(
            self,
            proto=proto,
            arrays={name: array for name, array in self.arrays.items() if name in held},
            inner={name: array for name, array in self.inner.items() if name in inner},
        )

    def changed(self, proto: Any = None, arrays: Mapping[str, Array] | None = None) -> OnnxFile:
        """The model with another structure, or some other weights."""
        return replace(self, proto=proto or self.proto, arrays={**self.arrays, **(arrays or {})})


def need_onnx() -> None:
    """Refuse where a package is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            refuse("no-package", "an ONNX file", f"the package {package} is missing", "pip install 'secateur[onnx]'")


def read_onnx(path: Path) -> OnnxFile:
    """Read a model, with whatever lies beside it.

    Raises:
        RequestError: no such file, no ONNX model, one that the ONNX checker rejects, or weights outside its folder.
    """
    need_onnx()
    import onnx
    from onnx.inliner import inline_local_functions

    if not path.is_file():
        refuse("no-model", f"model {str(path)!r}", "there is no such file")
    if path.stat().st_size > _PROTOBUF:
        _bad(path, "it is larger than 2 GiB, which no ONNX file is")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's own error, which has no type that can be named without it
        _bad(path, "its bytes are no ONNX model")
    if not model.graph.node:
        _bad(path, "it has no operators")
    beside = 0
    for tensor in tensors_of(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            beside += _bring_in(tensor, path)
    try:
        if model.functions:
            model = inline_local_functions(model)
        small = sum(len(tensor.raw_data) for tensor in tensors_of(model.graph)) <= ONE_FILE
        if small:
            onnx.checker.check_model(model)
        found = _taken_apart(model)
    except SecateurError:
        raise
    except Exception as error:  # the checker and the readers of tensors raise many types
        _bad(path, first_line(error))
    return replace(found, beside=beside)


def _bad(path: Path, found: str) -> Any:
    refuse("bad-onnx", f"ONNX file {path.name!r}", found)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _constants_to_initializers(graph: Any, names: Collection[str]) -> None:
    """Weights in attributes become initialisers, since only these may lie beside a file."""
    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if node.op_type == "Constant" and node.output[0] in names:
            tensor = next(attribute.t for attribute in node.attribute if attribute.name == "value")
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            del graph.node[i]


def _send_out(tensor: Any, stream: BinaryIO) -> None:
    """Move a tensor's data to the end of a file, at a place that can be mapped into memory."""
    stream.write(bytes(-stream.tell() % _PAGE))
    told = {"offset": stream.tell(), "length": stream.write(tensor.raw_data)}
    tensor.ClearField("raw_data")
    tensor.data_location = type(tensor).EXTERNAL
    for key, value in told.items():
        tensor.external_data.add(key=key, value=str(value))


def _taken_apart(model: Any) -> OnnxFile:
    from onnx import numpy_helper

    arrays: dict[str, Array] = {}
    unwrap(model.graph)
    literal = literals_of(model.graph)
    for tensor, name in holders(model.graph):
        if is_weight(tensor) and name not in literal:
            arrays[name] = numpy_helper.to_array(tensor)
            empty(tensor)
    inner = {
        f"{node.output[0]}/{number}/{name}": numpy_helper.to_array(tensor)
        for node in model.graph.node
        for number, graph in enumerate(branches(node))
        for tensor, name in all_holders(graph)
        if is_weight(tensor)
    }
    return OnnxFile(model, arrays, inner=inner)


def _bring_in(tensor: Any, path: Path) -> int:
    """Read what a tensor has beside its file; returns how many bytes that is."""
    from onnx import helper

    told = {entry.key: entry.value for entry in tensor.external_data}
    asked = f"tensor {tensor.name!r} of {path.name!r}"
    place = told.get("location", "")
    folder = path.resolve().parent
    try:
        file = (folder / place).resolve()
        there = file.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        refuse("no-weights", asked, f"its data lie at {place[:80]!r}, which is no name of a file")
    if not place or Path(place).is_absolute() or ".." in Path(place).parts or folder not in file.parents:
        refuse("outside-folder", asked, f"its data lie at {place!r}, outside the file's folder", "move them into it")
    if not there:
        refuse("no-weights", asked, f"its data file {place!r} is missing")
    try:
        offset, length = int(told.get("offset", 0)), int(told.get("length", -1))
        itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (KeyError, TypeError, ValueError):
        _bad(path, f"tensor {tensor.name!r} says no type, or no offset and length, that can be read")
    size = file.stat().st_size
    wanted = length if length >= 0 else size - offset
    count = int(np.prod([int(dim) for dim in tensor.dims], dtype=object))
    packed = tensor.data_type in (21, 22, 23)  # int4, uint4, float4: two in a byte
    if (
        min(offset, wanted) < 0
        or offset + wanted > size
        or wanted != ((count + 1) // 2 if packed else count * itemsize)
    ):
        _bad(path, f"tensor {tensor.name!r} of {count} numbers is said to be {wanted} bytes of {size} in {place!r}")
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(wanted)
    empty(tensor)
    tensor.raw_data = data
    return wanted


def run_onnx(model: OnnxFile, batches: Sequence[Mapping[str, Array]], outputs: Sequence[str]) -> list[list[Array]]:
    """Run a model in onnxruntime on the CPU, operator by operator, without fusions.

    Args:
        model: what to run.
        batches: inputs by name, one mapping for each run.
        outputs: names of what it makes; of ``proto.graph.output``.

    Returns:
        [runs][outputs]

    Raises:
        RequestError: it does not run, or has no end.
    """
    with tempfile.TemporaryDirectory() as folder:
        if model.bytes <= ONE_FILE:
            return _run(model.assembled().SerializeToString(), batches, outputs, plain=True)
        model.write(Path(folder) / "model.onnx")
        return _run(str(Path(folder) / "model.onnx"), batches, outputs, plain=True)


def run_file(path: Path, batches: Sequence[Mapping[str, Array]], outputs: Sequence[str]) -> list[list[Array]]:
    """The same of a file, as onnxruntime runs it for anybody: with its fusions."""
    return _run(str(path), batches, outputs, plain=False)


def running(model: OnnxFile, inputs: Mapping[str, Array]) -> Callable[[], object]:
    """What runs a model once per call, as onnxruntime runs it for anybody; for measuring time."""
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder) / "model.onnx")
        session = _session(str(Path(folder) / "model.onnx"), plain=False)
    return partial(session.run, None, dict(inputs))


def _session(given: Any, plain: bool) -> Any:
    import onnxruntime
    import torch

    options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = level.ORT_DISABLE_ALL if plain else level.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def _run(given: Any, batches: Sequence[Mapping[str, Array]], outputs: Sequence[str], plain: bool) -> list[list[Array]]:
    import onnxruntime

    run_options = onnxruntime.RunOptions()
    run_options.log_severity_level = 4
    late = threading.Timer(_SECONDS, lambda: setattr(run_options, "terminate", True))
    late.daemon = True
    try:
        session = _session(given, plain)
        late.start()
        return [session.run(list(outputs), dict(each), run_options) for each in batches]
    except Exception as error:  # onnxruntime has a dozen types of errors with no common one
        refuse("onnx-does-not-run", "a run in onnxruntime", first_line(error))
    finally:
        late.cancel()


def check_written(path: Path) -> None:
    """The ONNX checker's opinion of a written file; an exception where it is bad."""
    import onnx

    onnx.checker.check_model(str(path), full_check=path.stat().st_size <= ONE_FILE)
