"""An ONNX model as a host: run with any of its values watched, cut as a copy, tried with stirred weights.

onnxruntime has most of its kernels in single precision only, so what a cut and a mask compute agrees to rounding. The
trials run twice, with two choices of the sizes that the model leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

from secateur.errors import RequestError, refuse
from secateur.graph.blocks import Block, Depth, shortcuts
from secateur.graph.edit import kept, made_only
from secateur.graph.host import Batch, Literal
from secateur.graph.ir import Network, Value
from secateur.graph.onnx_bypass import bypassed, overwritten, sources_of
from secateur.graph.onnx_edit import cut_onnx
from secateur.graph.onnx_files import OnnxFile, read_onnx, run_file, run_onnx, running
from secateur.graph.onnx_network import Inputs, Reading, example_inputs, from_onnx, watched
from secateur.graph.onnx_structure import Array, names_used
from secateur.graph.spaces import Gone, Graph
from secateur.graph.verify import difference

TOLERANCE: Final = 2e-5
"""Largest difference of mask and cut, of the largest output; many times what single precision rounds."""
_HALF: Final = 2e-2
"""The same where weights have half precision."""
_FUSED: Final = 1e-2
"""How much fusions may change outputs, squashed ones included."""
_SQUASHING: Final = ("Sigmoid", "HardSigmoid", "Tanh", "Softmax", "LogSoftmax", "Exp", "Clip", "Identity", "Cast")
_STIRS: Final = (0.1, 0.01, 0.0)
"""How much weights are stirred: less where the outputs are no numbers otherwise."""


@dataclass(frozen=True)
class OnnxHost:
    """A model and what it is run on.

    Attributes:
        model: never changed.
        first, second: example inputs; the second has other sizes where sizes are open.
    """

    model: OnnxFile
    first: Inputs
    second: Inputs

    @classmethod
    def of(cls, model: OnnxFile, seed: int = 0, given: Inputs | None = None) -> Self:
        """See :func:`secateur.graph.onnx_network.example_inputs`."""
        return cls(model, *example_inputs(model, seed, given))

    @cached_property
    def reading(self) -> Reading:
        return from_onnx(self.model, self.first, self.second)

    @property
    def network(self) -> Network:
        return self.reading.network

    def tensor(self, name: str) -> Tensor:
        arrays = self.model.arrays
        return as_tensor(arrays[name] if name in arrays else self.model.inner[name])

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See :meth:`secateur.graph.host.Host.with_tensors`."""
        arrays = {}
        for name, tensor in tensors.items():
            old = self.model.arrays[name]
            arrays[name] = tensor.detach().to("cpu", torch.float64).numpy().astype(old.dtype).reshape(old.shape)
        host = type(self)(self.model.changed(arrays=arrays), self.first, self.second)
        vars(host)["reading"] = self.reading  # the same operations on the same values
        return host

    def run(
        self, inputs: Batch, watch: Collection[Value] = (), instead: Mapping[Value, Value] | None = None
    ) -> tuple[list[Tensor], dict[Value, Tensor]]:
        """See :meth:`secateur.graph.host.Host.run`."""
        given = self.named(inputs)
        names = {value: name for name, value in self.reading.values.items()}
        found = {v: self.tensor(v.name) for v in watch if v.is_state}
        found |= {v: as_tensor(given[v.name]) for v in watch if v.kind == "input"}
        rest = [value for value in watch if value not in found]
        lost = [value for value in rest if value not in names]
        if lost:
            refuse("not-watched", "a value of an ONNX model", f"no name in the file reaches it ({lost[0].shape})")
        asked = [names[value] for value in (*self.network.outputs, *rest)]
        model = overwritten(self.model, self.reading, instead) if instead else self.model
        (made,) = run_onnx(watched(model, asked), [given], asked)
        tensors = [as_tensor(array) for array in made]
        count = len(self.network.outputs)
        return tensors[:count], {**found, **dict(zip(rest, tensors[count:], strict=True))}

    def named(self, inputs: Batch) -> dict[str, Array]:
        """Inputs as arrays by name."""
        names = [each.name for each in self.model.entering]
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            given = dict(zip(names, [inputs] if isinstance(inputs, Tensor) else list(inputs), strict=False))
        if set(given) != set(names):
            refuse("onnx-inputs", f"inputs {', '.join(map(str, given))}", f"the model takes {', '.join(names)}")
        arrays = {n: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for n, v in given.items()}
        return {name: arrays[name].astype(self.first[name].dtype, copy=False) for name in names}

    @cached_property
    def compared(self) -> list[str]:
        """What trials look at: the outputs, before a last squashing, which makes rounding large or errors small."""
        makers = {name: node for node in self.model.proto.graph.node for name in node.output}
        found: dict[str, None] = {}
        for each in self.model.proto.graph.output:
            name = each.name
            while (node := makers.get(name)) is not None and node.op_type in _SQUASHING:
                name = node.input[0]
            found[name if name in makers else each.name] = None
        return list(found)

    def outputs(self, model: OnnxFile, gone: Sequence[Block] = ()) -> list[Tensor]:
        """What a model makes of both examples, in double precision: the real numbers, or if there are none the whole.

        Args:
            model: with the inputs of this host's, and with what is :attr:`compared`.
            gone: blocks that it does not have.
        """
        sources = sources_of(self.reading, gone)
        batches, names = [self.first, self.second], [sources.get(name, name) for name in self.compared]
        return _numbers(run_onnx(watched(model, names), batches, names))

    def runs(self, path: Path) -> str:
        """Why a file does not run in onnxruntime as anybody runs it, or what else it gives; empty if all is well."""
        batches, names = [self.first, self.second], [each.name for each in self.model.proto.graph.output]
        wanted = _numbers(run_onnx(read_onnx(path), batches, names))
        return difference(wanted, _numbers(run_file(path, batches, names)), _FUSED)

    def unlike(self, whole: OnnxFile, found: Sequence[Tensor], graph: Graph, gone: Gone) -> str:
        """How what a cut model made differs from what the whole one makes with the same units silenced; empty if not.

        Args:
            whole: this host's model, or the same with other numbers.
            found: see :meth:`outputs`.
        """
        stays, reason = kept(graph, gone), ""
        for there in (made_only(graph, stays), stays):
            if not (reason := difference(self.outputs(silenced(whole, there)), found, _tolerance(whole))):
                break
        return reason

    def unlike_without(self, whole: OnnxFile, small: OnnxFile, depth: Depth, blocks: Sequence[Block]) -> str:
        """How a model without some blocks differs from the whole one in whose run their sums are overwritten by the
        shortcuts, in what it computes and in what it should still hold; empty if not.

        Args:
            whole: this host's model, or the same with other numbers.
            small: what should do the same.
            depth: what the model can do without.
            blocks: what went.
        """
        learned = {name for name, value in self.network.state.items() if value.kind == "parameter"}
        held = sum(a.size for name, a in {**small.arrays, **small.inner}.items() if name in learned)
        if held != depth.remaining(blocks)[0]:
            return "what it holds is read elsewhere, if only for its sizes"
        wanted = self.outputs(overwritten(whole, self.reading, shortcuts(blocks)))
        return difference(wanted, self.outputs(small, blocks), _tolerance(whole))

    def runner(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> Callable[[], object]:
        """See :meth:`secateur.graph.host.Host.runner`; in onnxruntime, with its fusions."""
        return running(self.cut(graph, gone, literals) if gone.any() else self.model, self.first)

    def bench(self, graph: Graph, seed: int = 0) -> OnnxBench:
        return OnnxBench(self, graph, seed)

    def cut(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> OnnxFile:
        """The smaller model; nothing in a file has to be guessed, so there are no ``literals``."""
        del literals
        return cut_onnx(self.model, self.reading, graph, gone)

    def bypassed(self, depth: Depth, blocks: Sequence[Block]) -> Self:
        """See :meth:`secateur.graph.host.Host.bypassed`; the file is read anew where that is asked."""
        del depth
        return type(self)(bypassed(self.model, self.reading, blocks), self.first, self.second)


def _tolerance(model: OnnxFile) -> float:
    return _HALF if any(array.dtype.itemsize < 4 for array in model.arrays.values()) else TOLERANCE


def _numbers(runs: Sequence[Sequence[Array]]) -> list[Tensor]:
    made = [array for found in runs for array in found]
    arrays = [array for array in made if isinstance(array, np.ndarray) and array.dtype.kind in "iufb"]
    floats = [array for array in arrays if array.dtype.kind == "f"]
    return [torch.from_numpy(array.astype(np.float64)) for array in floats or arrays]


def as_tensor(array: Array) -> Tensor:
    """A copy of an array; bfloat16, which numpy lacks, comes as its package's own type."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


@dataclass
class OnnxBench:
    """A model with stirred weights, on which cuts are tried, and then with its own.

    Args:
        host: the original; not touched.
        graph: its channels.
        seed: of the stirring.
    """

    host: OnnxHost
    graph: Graph
    seed: int = 0
    stirred: OnnxFile = field(init=False)
    _wholes: list[OnnxFile] = field(init=False)

    def __post_init__(self) -> None:
        for amount in _STIRS:
            self.stirred = self._stir(amount)
            if self._finite(self.stirred):
                own = self.host.model
                self._wholes = [self.stirred, *([own] if amount and self._finite(own) else [])]
                return
        refuse("onnx-no-numbers", "a run of the ONNX model", "its outputs are no numbers", "--data FILE.npz")

    def _finite(self, model: OnnxFile) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.host.outputs(model))

    def compare(self, gone: Gone, literals: Collection[Literal] = ()) -> tuple[str, frozenset[Literal]]:
        """See :meth:`secateur.graph.host.Bench.compare`; no attribute is ever in doubt."""
        del literals
        for whole in self._wholes:
            try:
                found = self.host.outputs(cut_onnx(whole, self.host.reading, self.graph, gone))
            except RequestError as error:
                return f"the cut network does not run: {error.found}", frozenset()
            if reason := self.host.unlike(whole, found, self.graph, gone):
                return reason, frozenset()
        return "", frozenset()

    def unsound(self, depth: Depth, blocks: Sequence[Block]) -> str:
        """See :meth:`secateur.graph.host.Bench.unsound`."""
        for whole in self._wholes:
            try:
                small = bypassed(whole, self.host.reading, blocks)
                reason = self.host.unlike_without(whole, small, depth, blocks)
            except RequestError as error:
                return f"without it the network does not run: {error.found}"
            if reason:
                return reason
        return ""

    def _stir(self, amount: float) -> OnnxFile:
        """Weights without special values."""
        generator = np.random.default_rng(self.seed)
        arrays = {}
        for name, array in self.host.model.arrays.items():
            value, noise = array.astype(np.float64), amount * generator.standard_normal(array.shape)
            if self.host.network.state[name].kind == "buffer":
                noise = np.abs(1 + noise)
                value = value * noise if (value >= 0).all() else value * noise + amount
            elif (value == value.flat[0]).all():
                value = value + noise
            else:
                value = value * (1 + noise)
            arrays[name] = value.astype(array.dtype)
        return self.host.model.changed(arrays=arrays)


def silenced(model: OnnxFile, stays: Mapping[str, Mapping[int, Tensor]]) -> OnnxFile:
    """Zeros where something of a model's weights goes; normalisations over channels see only what stays."""
    arrays = {}
    for name, dims in stays.items():
        array = np.array(model.arrays[name])
        for dim, index in dims.items():
            goes = np.ones(array.shape[dim], dtype=bool)
            goes[index.numpy()] = False
            array[(slice(None),) * dim + (goes,)] = 0
        arrays[name] = array
    narrow = {name: dims[0].numpy() for name, dims in stays.items() if model.arrays[name].ndim == 1}
    return _narrowed(model.changed(arrays=arrays), narrow)


def _narrowed(model: OnnxFile, stays: Mapping[str, Array]) -> OnnxFile:
    """Layer and group norms whose weights lose entries are taken over what stays, and give zeros elsewhere."""
    import onnx

    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    names, nodes = names_used(proto.graph), []

    def constant(label: str, array: Array) -> str:
        while label in names:
            label += "_"
        names.add(label)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), label))
        return label

    for node in proto.graph.node:
        axis = {"LayerNormalization": -1, "RMSNormalization": -1, "GroupNormalization": 1}.get(node.op_type)
        weights = list(node.input[1:])
        if axis is None or not weights or weights[0] not in stays or any(name not in model.arrays for name in weights):
            nodes.append(node)
            continue
        index, out = stays[weights[0]].astype(np.int64), node.output[0]
        size = len(model.arrays[weights[0]])
        back = np.full(size, len(index), dtype=np.int64)
        back[index] = np.arange(len(index))
        part = [f"{out}\u0000{i}" for i in range(5)]
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.input[:] = [part[0], *(constant(f"{out}\u0000w", model.arrays[name][index]) for name in weights)]
        inner.output[:] = [part[1]]
        for attribute in inner.attribute:
            if attribute.name == "num_groups":
                attribute.i = len(set((index // (size // attribute.i)).tolist()))
        make = onnx.helper.make_node
        one = constant(f"{out}\u0000one", np.zeros(1, dtype=np.int64))
        zero = constant(f"{out}\u0000zero", np.zeros(1, dtype=model.arrays[weights[0]].dtype))
        nodes += [
            make("Gather", [node.input[0], constant(f"{out}\u0000i", index)], [part[0]], axis=axis),
            inner,
            make("Gather", [part[1], one], [part[2]], axis=axis),
            make("Mul", [part[2], zero], [part[3]]),
            make("Concat", [part[1], part[3]], [part[4]], axis=axis),
            make("Gather", [part[4], constant(f"{out}\u0000b", back)], [out], axis=axis),
        ]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    return model.changed(proto)
