"""``prune``: from a request to a published folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secateur.api.channels import prune_module
from secateur.api.modules import Model, with_folders
from secateur.api.onnx_models import is_onnx, prune_onnx
from secateur.api.outputs import PruneResult, achieved_of, require_output, require_text, workplace
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.companions import copy_folder
from secateur.checkpoints.hub import locate
from secateur.engine.assistant import assist, digest_of
from secateur.engine.environment import place_in_environment
from secateur.engine.journal import work_folder
from secateur.engine.packing import loads_packed
from secateur.engine.prepare import Prepared, prepare, resolve_device
from secateur.engine.processes import Processes
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import publish
from secateur.engine.request import PruneRequest, make_request, recipe_of
from secateur.engine.run import LEARNED, Run, requested
from secateur.engine.team import Team, joined
from secateur.errors import refuse
from secateur.graph.host import Batch
from secateur.inference import open_checkpoint
from secateur.meters.counts import count_parts, factored
from secateur.meters.evaluate import Figures, evaluate_models
from secateur.meters.memory import MemoryWatch, cgroup_peak
from secateur.meters.perplexity import Text, fits, load_stock, perplexity
from secateur.meters.similarity import ScoredPairs, similarity
from secateur.methods.base import ZEROS, worth
from secateur.reports.prune import RECIPE, PruneFacts, write_card, write_report


def prune(
    model: Model | None = None,
    *,
    method: str | None = None,
    ratio: float | None = None,
    target: Sequence[str] = (),
    data: Any = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    example_inputs: Batch | None = None,
    inplace: bool = False,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> PruneResult:
    """Prune a model and write a checkpoint that plain transformers loads.

    Args:
        model: checkpoint folder, hub id, or a transformers module (which stays as it is unless ``inplace``);
            may stand in the recipe. An ONNX file, ``NAME.onnx``, is cut as any other module is, into ``output``, an
            ONNX file again; ``data`` are arrays then (docs/onnx.md).
        method: name of a method; the default depends on whether there is ``data``.
        ratio: share of all parameters to remove.
        target: what shall remain, e.g. ``"bytes=2GiB"``, ``"flops=80%"``.
        data: calibration text: file, folder, hub data set, token ids. Of any other module: batches like
            ``example_inputs``, or pairs of these and labels, in a list, a loader or whatever can be read several times.
        output: folder to write; may be omitted for a module.
        tokenizer: of a module, needed when ``data`` or ``text`` is text.
        example_inputs: of any other module: a tensor, positional arguments or arguments by name. What hangs together
            is then found by running it, and the module itself is cut; nothing is written. The measures are ``params``
            and ``flops`` of one run on these inputs, and only ``data``, ``loss`` (a function of outputs and labels, or
            several by name; by default the cross-entropy), ``options``, ``seed`` and ``tolerance`` apply besides.
        inplace: change the module passed in.
        recipe: YAML file with the same options.
        progress: told what happens.
        more: the other options of the command line (``samples``, ``length``, ``options``, ``text``, ``seed``, ...).

    Raises:
        SecateurError: with what was asked, what was found and what to do; then ``output`` does not exist.
    """
    asked = {"model": model, "method": method, "ratio": ratio, "target": tuple(target), "data": data, "output": output}
    if example_inputs is not None:
        given = {key: value for key, value in asked.items() if key != "model" and value is not None and value != ()}
        return prune_module(model, example_inputs, {**given, **more}, inplace)
    if isinstance(model, str | Path) and is_onnx(model) and recipe is None:
        if place_in_environment()[1] > 1:
            refuse(
                "onnx", "an ONNX file pruned by several processes", "its work is not shared", "run it without torchrun"
            )
        return prune_onnx(
            model, {k: v for k, v in {**asked, **more}.items() if k != "model" and v is not None}, progress
        )
    file = None if recipe is None else Path(recipe)

    def run(values: dict[str, Any], in_memory: frozenset[str]) -> PruneResult:
        return _prune_folder(make_request(values, file), progress or Silent(), named=not in_memory)

    return with_folders({**asked, **more}, ("model",), tokenizer, inplace, run)


def _prune_folder(request: PruneRequest, progress: Progress, named: bool) -> PruneResult:
    with joined() as processes:
        if processes.count > 1 and not named:
            found = "each of the processes has one of its own"
            refuse("module", "a module pruned by several processes", found, "save it and name its folder")
        if isinstance(processes, Team) and processes.rank:
            checkpoint = open_checkpoint(Path(locate(request.model)))
            told = assist(processes, checkpoint.architecture, resolve_device(request.device))
            return PruneResult(**told)
        result = _lead(request, progress, named, processes)
        processes.end({key: value for key, value in vars(result).items() if key != "model"})
        return result


def _lead(request: PruneRequest, progress: Progress, named: bool, processes: Processes) -> PruneResult:
    """The whole prune; of several processes, the first one's part."""
    started = time.perf_counter()
    output = require_output(request, "a prune")
    require_text(request)
    with MemoryWatch() as memory:
        prepared = prepare(request, partial(open_checkpoint, note=progress.note), processes)
        options = prepared.method.model_dump(mode="json", exclude_unset=True)
        recipe = recipe_of(request, prepared.method.name, options, named)
        progress.note(f"method {prepared.method.name}, output {_worth(prepared)}")
        with workplace(output, [prepared.checkpoint], request.force):
            parts = (
                _copy(prepared, output, progress)
                if request.is_copy
                else _cut(prepared, output, named, recipe, progress, started, memory)
            )
    achieved, figures, loads_in, packed, similar = parts
    return PruneResult(
        method=prepared.method.name,
        requested=requested(prepared),
        achieved=achieved,
        perplexity=figures,
        seconds=round(time.perf_counter() - started, 3),
        peak_rss_bytes=memory.peak,
        output=str(output),
        layout=request.layout,
        loads_in=loads_in,
        seed=request.seed,
        packed=packed,
        spearman=similar,
        recipe=recipe,
    )


Told = dict[str, Any] | None
Parts = tuple[dict[str, int], Told, dict[str, str], Told, Told]


def _cut(
    prepared: Prepared,
    output: Path,
    named: bool,
    recipe: str,
    progress: Progress,
    started: float,
    memory: MemoryWatch,
) -> Parts:
    """Plan, write, verify, measure, report, publish."""
    run = Run(prepared, output, progress)
    prepared.processes.begin(run.work, prepared.device, digest_of(prepared.checkpoint.architecture))
    plan = run.plan()
    text = _text(prepared)
    record = run.write(plan)
    result = Checkpoint.open(run.result, prepared.checkpoint.architecture.origin)
    achieved = achieved_of(prepared.checkpoint, result, prepared.method.output in ZEROS)
    if prepared.method.output == "factors":
        achieved = factored(achieved, run.result / LEARNED)
    figures = None if text is None else _perplexities(prepared, result, text, progress)
    similar = _similarities(prepared, result)
    speed = _speeds(prepared, result) if text is not None or similar is not None else None
    write_card(run.result, record, achieved, result.architecture.auto_class)
    (run.result / RECIPE).write_text(recipe, encoding="utf-8")
    peak = cgroup_peak()
    facts = {
        "seconds": f"{time.perf_counter() - started:.1f}",
        "peak anonymous memory": f"{memory.peak / 2**20:,.0f} MiB",
        "peak of the control group": "unknown" if peak is None else f"{peak / 2**20:,.0f} MiB",
        "device": str(prepared.device),
        "compute type": str(prepared.dtype).removeprefix("torch."),
        "output": _worth(prepared),
    }
    parts = (count_parts(prepared.checkpoint), count_parts(result))
    name = prepared.request.model if named else "a module in memory"
    write_report(run.result, PruneFacts(name, record, plan, achieved, parts, recipe, figures, speed, facts, similar))
    prepared.checkpoint.folder.require_unchanged()
    run.publish()
    return achieved, figures, record["loads_in"], record.get("packed"), similar


def _copy(prepared: Prepared, output: Path, progress: Progress) -> Parts:
    """Ratio 0: the folder, byte for byte."""
    import transformers

    checkpoint, text = prepared.checkpoint, _text(prepared)
    copy = work_folder(output) / "out"
    shutil.rmtree(copy, ignore_errors=True)
    own = {output.resolve(), work_folder(output).resolve()}
    copy_folder(checkpoint.folder.path, copy, lambda path: path.resolve() not in own)
    figures = None
    if text is not None:
        value = perplexity(checkpoint, text, prepared.dtype, prepared.device)
        figures = {"before": value, "after": value, "context": text.context, "tokens": text.tokens}
    similar = _similarities(prepared, checkpoint)
    checkpoint.folder.require_unchanged()
    publish(copy, output, progress)
    loads = {"transformers": f"verified({transformers.__version__})"}
    loads = loads_packed(loads) if checkpoint.folder.is_packed else loads
    return achieved_of(checkpoint, checkpoint), figures, loads, None, similar


def _worth(prepared: Prepared) -> str:
    """What the output will be worth; known before any work."""
    request = prepared.request
    return worth(prepared.method.output, request.layout, request.format)


def _text(prepared: Prepared) -> Text | None:
    """The held-out text; opened only after the plan is final."""
    request = prepared.request
    if request.text is None:
        return None
    return Text.read(request.text, prepared.checkpoint, request.context, request.trust_remote_code)


def _perplexities(prepared: Prepared, result: Checkpoint, text: Text, progress: Progress) -> dict[str, Any]:
    progress.start("measure", 2)
    before = perplexity(prepared.checkpoint, text, prepared.dtype, prepared.device)
    progress.step(1)
    after = perplexity(result, text, prepared.dtype, prepared.device)
    progress.step(2)
    return {"before": before, "after": after, "context": text.context, "tokens": text.tokens}


def _similarities(prepared: Prepared, result: Checkpoint) -> Told:
    """Rank correlation of the embeddings with the scored pairs, where the request names some."""
    if prepared.request.pairs is None:
        return None
    pairs = ScoredPairs.read(prepared.request.pairs)
    found: dict[str, Any] = {"pairs": len(pairs.scores)}
    for key, checkpoint in (("before", prepared.checkpoint), ("after", result)):
        model = load_stock(checkpoint, prepared.dtype, prepared.device)
        found[key] = similarity(checkpoint, pairs, model, prepared.device)
    return found


def _speeds(prepared: Prepared, result: Checkpoint) -> tuple[Figures, Figures] | None:
    if not fits(prepared.checkpoint, prepared.dtype):
        return None
    dense, pruned = evaluate_models([prepared.checkpoint, result], (), None, prepared.request.dtype, prepared.device)
    return dense, pruned
