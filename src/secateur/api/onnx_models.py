"""``prune``, ``preview`` and ``inspect`` for ONNX files."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from secateur.api.blocks import BlockDecision
from secateur.api.channels import PARTS, Decision, ModuleRequest, ModuleResult, calibration, decided
from secateur.api.outputs import passing_workplace, require_free
from secateur.api.telling import achieved_by
from secateur.budgets.channels import FLOPS_PER_MAC
from secateur.data.arrays import read_batches
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import appear
from secateur.errors import InternalError, RequestError, refuse, validated
from secateur.graph.onnx_files import OnnxFile, check_written, first_line, read_onnx
from secateur.graph.onnx_host import OnnxHost, as_tensor
from secateur.graph.spaces import Graph, build
from secateur.graph.verify import verify
from secateur.meters.memory import MemoryWatch
from secateur.methods.blocks import BlockMethod
from secateur.methods.channels import GraphMethod
from secateur.methods.registry import make_graph_method

SUFFIX = ".onnx"


class OnnxRequest(ModuleRequest):
    """What a prune of an ONNX file can be asked."""

    output: str | Path | None = None
    force: bool = False

    @property
    def is_copy(self) -> bool:
        return self.ratio == 0 and not self.target


@dataclass(frozen=True)
class OnnxResult(ModuleResult):
    """What ``prune`` did to an ONNX file.

    Attributes:
        unknown: operators without a rule, and how many of each; what they touch is not cut.
    """

    unknown: Mapping[str, int] = field(default_factory=dict)


def is_onnx(model: Any) -> bool:
    """Whether a model is the name of an ONNX file."""
    return isinstance(model, str | Path) and Path(model).suffix.lower() == SUFFIX


def prune_onnx(model: str | Path, values: Mapping[str, Any], progress: Progress | None = None) -> OnnxResult:
    """Cut an ONNX file; see :func:`secateur.prune`.

    Args:
        model: the file; it is only read.
        values: fields of :class:`OnnxRequest`. ``data`` is a file or folder of arrays
            (:func:`secateur.data.arrays.read_batches`), or an iterable of batches by name of the input.
        progress: told what happens.

    Raises:
        RequestError: no ONNX file, one that does not run, or an impossible request; nothing is written.
        InternalError: the written file would not compute what the uncut one does with the same channels silenced.
    """
    request = validated(OnnxRequest, values, "a prune of an ONNX file")
    path, output = Path(model), _free_output(request, Path(model))
    clock = [time.perf_counter()]
    with MemoryWatch() as memory, ExitStack() as stack:
        source = read_onnx(path)
        if request.is_copy:
            decision, host = None, OnnxHost.of(source, request.seed)
            method = _method(request)
        else:
            method, host, decision = _decide(source, request, clock)
        written = stack.enter_context(passing_workplace(output, request.force)) / output.name
        beside = _copy(path, source, written) if decision is None else _write(host, decision, written, path)
        sizes = {"bytes": _bytes([written, *beside]), "bytes_before": path.stat().st_size + source.beside}
        for file in beside:
            file.rename(output.with_name(file.name))
        appear(written, output, progress or Silent())
        clock += [time.perf_counter()] * (len(PARTS) + 1 - len(clock))
    return OnnxResult(
        method=method.name,
        requested={"target": str(request.wanted), "options": method.model_dump(mode="json", exclude_unset=True)},
        achieved=(_whole(host) if decision is None else dict(decision.achieved)) | sizes,
        perplexity=None,
        seconds=round(clock[-1] - clock[0], 3),
        peak_rss_bytes=memory.peak,
        output=str(output),
        layout="onnx",
        loads_in=_loads(),
        seed=request.seed,
        removed={} if decision is None else decision.removed,
        refused={} if decision is None else decision.refused,
        parts={part: end - start for part, (start, end) in zip(PARTS, pairwise(clock), strict=True)},
        notes={} if decision is None else decision.notes,
        unknown={} if decision is None else _unknown(decision.graph),
    )


def preview_onnx(model: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a prune would do: everything but the writing; problems are listed instead of raised."""
    try:
        request = validated(OnnxRequest, values, "a prune of an ONNX file")
        if request.output is not None:
            _free_output(request, Path(model))
        source = read_onnx(Path(model))
        if request.is_copy:
            return {"problems": [], "method": request.method, "achieved": _whole(OnnxHost.of(source, request.seed))}
        method, _, decision = _decide(source, request, [time.perf_counter()])
    except RequestError as error:
        return {"problems": [error.as_dict()]}
    return {
        "problems": [],
        "method": method.name,
        "achieved": dict(decision.achieved),
        "sizes": {name: {"before": before, "after": after} for name, (before, after) in decision.sizes.items()},
        "refused": dict(decision.refused),
        "unknown": _unknown(decision.graph),
        "loads_in": _loads(),
    }


def inspect_onnx(
    model: str | Path, data: Any = None, spaces: bool = False, draw: str | Path | None = None
) -> dict[str, Any]:
    """Sizes of an ONNX file, its inputs, and operators.

    Args:
        model: the file.
        data: examples of its inputs, as for a prune.
        spaces: with its channels: ``spaces`` (``name``, ``size``, ``params`` in its units, ``share`` of all,
            ``entries``, ``flags`` and, where it cannot be cut, ``refused``), ``unknown`` operators, and ``cuttable``,
            the share of the parameters that lies in spaces that can be cut.
        draw: where to draw it, ``.svg`` or ``.dot``.
    """
    path = Path(model)
    source = read_onnx(path)
    host, _ = _opened(source, 0, data)
    graph = build(host.network)
    operators = Counter(node.op_type for node in source.proto.graph.node)
    found: dict[str, Any] = {
        "format": "onnx",
        "producer": f"{source.proto.producer_name} {source.proto.producer_version}".strip(),
        "opset": source.opset,
        "bytes": path.stat().st_size + source.beside,
        "params": graph.parameters(),
        "flops": FLOPS_PER_MAC * graph.costs.macs(graph.gone({})),
        "inputs": {n: {"type": a.dtype.name, "shape": _sizes(host, n)} for n, a in host.first.items()},
        "operators": dict(operators.most_common()),
    }
    if draw is not None:
        found["drawing"] = str(graph.draw(draw))
    if not spaces:
        return found
    verdict = verify(host.bench(graph))
    told = []
    for space in graph.spaces:
        params = graph.reachable([space])
        entries = [
            {"name": e.name, "dim": e.dim, "of_each": e.index.shape[1], "roles": sorted(e.roles)} for e in space.entries
        ]
        line = {"name": space.name, "size": space.size, "params": params, "share": params / max(graph.parameters(), 1)}
        line |= {"flags": list(space.flags), "entries": entries}
        told.append(line | ({"refused": verdict.refused[space.name]} if space.name in verdict.refused else {}))
    sound = [graph.space(name) for name in verdict.sound]
    share = graph.reachable(sound) / max(graph.parameters(), 1) if sound else 0.0
    return {**found, "spaces": told, "unknown": _unknown(graph), "cuttable": share}


def _free_output(request: OnnxRequest, model: Path) -> Path:
    if request.output is None:
        refuse("no-output", "a prune of an ONNX file", "no output is named", "-o small.onnx")
    output = Path(request.output)
    if not is_onnx(output):
        refuse("bad-output", f"output {str(output)!r}", "its name does not end in .onnx", "-o small.onnx")
    if output.resolve() == model.resolve():
        refuse("output-is-input", f"output {str(output)!r}", "it is the model itself", "name another file")
    return require_free(output, request.force)


def _opened(source: OnnxFile, seed: int, data: Any) -> tuple[OnnxHost, list[Any] | None]:
    """The host of a model, on the first batch of the data where there are some; and the batches."""
    if data is None:
        return OnnxHost.of(source, seed), None
    batches = _batches(source, data)
    head = batches[0][0] if isinstance(batches[0], tuple) else batches[0]
    open_ = {each.name for each in source.entering if source.rows(each) is None}
    given = {n: np.asarray(a)[:2] if n in open_ and np.ndim(a) else np.asarray(a) for n, a in head.items()}
    return OnnxHost.of(source, seed, given), batches


def _batches(source: OnnxFile, data: Any) -> list[Any]:
    """Batches from files, or as they were given: inputs by name, or pairs of that and labels."""
    if isinstance(data, str | Path):
        read = read_batches(data, {each.name: source.rows(each) for each in source.entering})
        return [inputs if labels is None else (inputs, labels) for inputs, labels in read]
    batches = list(data)
    inputs = [batch[0] if isinstance(batch, tuple) and len(batch) == 2 else batch for batch in batches]
    if not batches or not all(isinstance(each, Mapping) for each in inputs):
        names = ", ".join(each.name for each in source.entering)
        refuse("bad-data", "data", "no batches of arrays by name of the input", f"a list of mappings with {names}")
    return batches


def _method(request: OnnxRequest) -> GraphMethod | BlockMethod:
    found = make_graph_method(request.method, request.options)
    if isinstance(found, BlockMethod):
        found.require_no_gradients()
    return found


def _decide(
    source: OnnxFile, request: OnnxRequest, clock: list[float]
) -> tuple[GraphMethod | BlockMethod, OnnxHost, Decision | BlockDecision]:
    method, _ = _method(request), request.wanted  # refused before anything runs
    host, batches = _opened(source, request.seed, request.data)
    example = {name: as_tensor(array) for name, array in host.first.items()}
    given = calibration(method, request.model_copy(update={"data": batches}), example)
    return method, host, decided(host, example, request, method, given, clock)


def _smaller(host: OnnxHost, decision: Decision | BlockDecision) -> tuple[OnnxFile, Callable[[OnnxFile], str]]:
    """The smaller model, and what tells how a file differs from the whole one with the same silenced."""
    if isinstance(decision, BlockDecision):
        depth, blocks = decision.depth, decision.gone
        return host.bypassed(depth, blocks).model, lambda file: host.unlike_without(host.model, file, depth, blocks)
    mended, graph, gone = host.with_tensors(decision.mended), decision.graph, decision.gone
    return mended.cut(graph, gone), lambda file: mended.unlike(mended.model, mended.outputs(file), graph, gone)


def _write(host: OnnxHost, decision: Decision | BlockDecision, path: Path, source: Path) -> list[Path]:
    """Write the smaller model and check the file: by the ONNX checker, and against the whole one."""
    small, unlike = _smaller(host, decision)
    beside = small.write(path)
    try:
        check_written(path)
        reason = unlike(read_onnx(path)) or host.runs(path)
    except Exception as error:  # the checker's own types, and a run that fails
        reason = first_line(error)
        _require_sound(source)
    if reason:
        raise InternalError("cut-not-masked", f"the written file {path.name}", reason, "nothing was left there")
    return beside


def _require_sound(source: Path) -> None:
    """Refuse a model in which the ONNX checker finds faults although it runs."""
    try:
        check_written(source)
    except Exception as error:  # the checker's own types
        refuse("bad-onnx", f"ONNX file {source.name!r}", first_line(error), "export it again")


def _copy(path: Path, source: OnnxFile, written: Path) -> list[Path]:
    """The same bytes; a model with weights beside it is written anew, with its own."""
    if source.beside:
        return source.write(written)
    shutil.copyfile(path, written)
    return []


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _whole(host: OnnxHost) -> dict[str, float]:
    return achieved_by(build(host.network), {})


def _unknown(graph: Graph) -> dict[str, int]:
    return {op: len(places) for op, places in graph.unknown.items()}


def _loads() -> dict[str, str]:
    import onnxruntime

    return {"onnxruntime": f"verified({onnxruntime.__version__})"}


def _sizes(host: OnnxHost, name: str) -> list[int | str]:
    """Sizes of an input; the names, or a question mark, where they are open."""
    each = next(each for each in host.model.entering if each.name == name)
    dims = each.type.tensor_type.shape.dim
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in dims]
