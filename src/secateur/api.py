"""The Python door: ``prune``, ``preview``, ``evaluate``, ``methods``, ``load``."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur.budgets import Budget
from secateur.checkpoints import Checkpoint, Folder
from secateur.checkpoints.hub import locate
from secateur.engine.journal import locked, work_folder
from secateur.engine.prepare import (
    LONGEST_WINDOW,
    Prepared,
    choose_method,
    context_of,
    costs_of,
    prepare,
    resolve_device,
)
from secateur.engine.progress import Progress, Silent
from secateur.engine.request import PruneRequest, make_request
from secateur.engine.run import Run, requested
from secateur.errors import RequestError, SecateurError, refuse
from secateur.families import Architecture, family_names
from secateur.families.stock import example_config, quiet_transformers
from secateur.meters.counts import count
from secateur.meters.evaluate import Figures, evaluate_models, ratios
from secateur.meters.memory import MemoryWatch, cgroup_peak
from secateur.meters.perplexity import Text, fits, perplexity
from secateur.methods.base import WORTH, Method
from secateur.methods.registry import method_class, method_names
from secateur.reports.prune import write_card, write_report
from secateur.spaces import KINDS, Kind, spaces_of

Model = str | Path | nn.Module


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` did; ``as_dict`` gives the keys of the command's JSON object.

    ``model`` is the pruned module when a module was passed in.
    """

    method: str
    requested: dict[str, Any]
    achieved: dict[str, int]
    perplexity: dict[str, Any] | None
    seconds: float
    peak_rss_bytes: int
    output: str | None
    layout: str
    loads_in: dict[str, str]
    seed: int
    model: nn.Module | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "model"}


def prune(
    model: Model,
    *,
    method: str | None = None,
    ratio: float | None = None,
    target: Sequence[str] = (),
    data: str | Path | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    inplace: bool = False,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> PruneResult:
    """Prune a model and write a checkpoint that plain transformers loads.

    Args:
        model: checkpoint folder, hub id, or a transformers module (which stays as it is unless ``inplace``).
        method: name of a method; the default depends on whether there is ``data``.
        ratio: share of all parameters to remove.
        target: what shall remain, e.g. ``"bytes=2GiB"``, ``"flops=80%"``.
        data: calibration text: file, folder, hub data set, token ids.
        output: folder to write; may be omitted for a module.
        tokenizer: of a module, needed when ``data`` or ``text`` is text.
        inplace: change the module passed in.
        recipe: YAML file with the same options.
        progress: told what happens.
        more: the other options of the command line (``samples``, ``length``, ``options``, ``text``, ``seed``, ...).

    Raises:
        SecateurError: with what was asked, what was found and what to do; then ``output`` does not exist.
    """
    values = {
        "method": method,
        "ratio": ratio,
        "target": tuple(target),
        "data": None if data is None else str(data),
        "output": None if output is None else str(output),
        **more,
    }
    file = None if recipe is None else Path(recipe)
    if not isinstance(model, nn.Module):
        return _prune_folder(make_request({**values, "model": str(model)}, file), progress or Silent())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if output is None:
            values["output"] = str(Path(temporary) / "pruned")
        result = _prune_folder(make_request({**values, "model": str(folder)}, file), progress or Silent())
        with quiet_transformers():
            pruned = type(model).from_pretrained(result.output, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
        pruned.train(model.training)
        if inplace:
            model.__dict__.update(pruned.__dict__)
            pruned = model
        shown = result.output if output is not None else None
        return PruneResult(**{**result.as_dict(), "output": shown, "model": pruned})


def _prune_folder(request: PruneRequest, progress: Progress) -> PruneResult:
    started = time.perf_counter()
    output = _require_output(request)
    _require_text(request)
    with MemoryWatch() as memory:
        prepared = prepare(request)
        if output.resolve() == prepared.checkpoint.folder.path.resolve():
            refuse("output-is-input", f"output {str(output)!r}", "it is the model's own folder", "name another folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        with _cleared_on_refusal(work_folder(output)), locked(work_folder(output)):
            parts = (
                _copy(prepared, output, progress)
                if request.is_copy
                else _cut(prepared, output, progress, started, memory)
            )
    achieved, figures, loads_in = parts
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
    )


Parts = tuple[dict[str, int], dict[str, Any] | None, dict[str, str]]


def _cut(prepared: Prepared, output: Path, progress: Progress, started: float, memory: MemoryWatch) -> Parts:
    """Plan, write, verify, measure, report, publish."""
    request = prepared.request
    run = Run(prepared, output, progress)
    plan = run.plan()
    text = None if request.text is None else Text.read(request.text, prepared.checkpoint, request.context)
    record = run.write(plan)
    result = Checkpoint.open(run.result)
    achieved = _achieved(prepared.checkpoint, result)
    figures = None if text is None else _perplexities(prepared, result, text, progress)
    speed = _speeds(prepared, result) if text is not None else None
    write_card(run.result, record, achieved)
    peak = cgroup_peak()
    facts = {
        "seconds": f"{time.perf_counter() - started:.1f}",
        "peak anonymous memory": f"{memory.peak / 2**20:,.0f} MiB",
        "peak of the control group": "unknown" if peak is None else f"{peak / 2**20:,.0f} MiB",
        "device": str(prepared.device),
        "compute type": str(prepared.dtype).removeprefix("torch."),
        "gap to the target": f"{prepared.budget.gap:+.3%} of what was there",
        "output": prepared.method.output + ": " + WORTH[prepared.method.output],
    }
    write_report(run.result, record, achieved, figures, speed, facts)
    run.publish()
    return achieved, figures, record["loads_in"]


def _copy(prepared: Prepared, output: Path, progress: Progress) -> Parts:
    """Ratio 0: the folder, byte for byte."""
    import transformers

    request, checkpoint = prepared.request, prepared.checkpoint
    text = None if request.text is None else Text.read(request.text, checkpoint, request.context)
    copy = work_folder(output) / "out"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint.folder.path, copy)
    figures = None
    if text is not None:
        value = perplexity(checkpoint, text, prepared.dtype, prepared.device)
        figures = {"before": value, "after": value, "context": text.context, "tokens": text.tokens}
    Run.replace(copy, output, progress)
    return _achieved(checkpoint, checkpoint), figures, {"transformers": f"verified({transformers.__version__})"}


def _require_output(request: PruneRequest) -> Path:
    if request.output is None:
        refuse("no-output", "a prune", "no output folder is named", "-o small/")
    output = Path(request.output)
    if output.exists() and not request.force:
        hint = "choose another folder, or --force to move the old one aside"
        refuse("output-exists", f"output {request.output!r}", "it exists already", hint)
    return output


def _require_text(request: PruneRequest) -> None:
    if request.text is not None and not Path(request.text).is_file():
        refuse("no-text", f"text {request.text!r}", "there is no such file")


@contextmanager
def _cleared_on_refusal(folder: Path) -> Iterator[None]:
    """A refused request leaves no work folder behind, unless it holds somebody else's work."""
    existed = folder.exists()
    try:
        yield
    except RequestError:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _achieved(before: Checkpoint, after: Checkpoint) -> dict[str, int]:
    new, old = count(after), count(before)
    return {**new, **{f"{key}_before": value for key, value in old.items()}}


def _perplexities(prepared: Prepared, result: Checkpoint, text: Text, progress: Progress) -> dict[str, Any]:
    progress.start("measure", 2)
    before = perplexity(prepared.checkpoint, text, prepared.dtype, prepared.device)
    progress.step(1)
    after = perplexity(result, text, prepared.dtype, prepared.device)
    progress.step(2)
    return {"before": before, "after": after, "context": text.context, "tokens": text.tokens}


def _speeds(prepared: Prepared, result: Checkpoint) -> tuple[Figures, Figures] | None:
    if not fits(prepared.checkpoint, prepared.dtype):
        return None
    dense, pruned = evaluate_models([prepared.checkpoint, result], None, None, prepared.request.dtype, prepared.device)
    return dense, pruned


# -- preview -------------------------------------------------------------------------------------------------------------


def preview(model: str | Path, *, recipe: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """What ``prune`` with the same arguments would do; reads headers only and lists every problem at once.

    Returns:
        ``problems`` (errors as dictionaries), and, as far as they can be told, ``method``, ``output_kind``, ``sizes``,
        ``achieved`` (as of prune), ``untied`` (parameters that untying the head adds), ``peak_bytes`` (estimate), ``layout``,
        ``loads_in``.
    """
    problems: list[SecateurError] = []
    found: dict[str, Any] = {"problems": []}

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            problems.append(error)

    request: PruneRequest | None = None
    method: Method | None = None
    checkpoint: Checkpoint | None = None
    with collecting():
        request = make_request({**options, "model": str(model)}, None if recipe is None else Path(recipe))
    if request is not None:
        with collecting():
            method = choose_method(request)
        with collecting():
            _require_text(request)
        if request.output is not None:
            with collecting():
                _require_output(request)
        if request.data not in (None, "-") and request.data.startswith(("/", ".")) and not Path(request.data).exists():
            problems.append(RequestError("no-data", f"data {request.data!r}", "there is no such file or folder"))
    with collecting():
        checkpoint = Checkpoint(Folder(Path(locate(str(model)))))
        problems.extend(checkpoint.problems)
    if request is not None and method is not None and checkpoint is not None and not checkpoint.problems:
        with collecting():
            found.update(_foresee(request, method, checkpoint))
    found["problems"] = [problem.as_dict() for problem in problems]
    return found


def _foresee(request: PruneRequest, method: Method, checkpoint: Checkpoint) -> dict[str, Any]:
    device = resolve_device(request.device)
    costs = costs_of(checkpoint)
    dense = checkpoint.architecture.sizes
    if not request.targets and method.sparsity is None:
        refuse("no-target", "a prune without a size", "neither --ratio nor --target is given", "e.g. --ratio 0.3")
    largest = 8 if device.type == "cpu" else 64
    budget = Budget(
        checkpoint.architecture,
        costs,
        request.targets,
        itemsize=costs.itemsize,
        quantum=request.quantum,
        largest_quantum=largest,
        tolerance=request.tolerance,
    )
    after = dense if request.is_copy else method.sizes(budget)
    length = request.length or min(LONGEST_WINDOW, context_of(checkpoint))
    surcharge = costs.params(dense.untied()) - costs.params(dense) if dense.tied and not after.tied else 0
    achieved = {
        "params": costs.params(after),
        "params_before": costs.params(dense),
        "bytes": costs.bytes(after),
        "bytes_before": costs.bytes(dense),
        "flops_per_token": costs.flops(after),
        "flops_per_token_before": costs.flops(dense),
        "kv_bytes_per_token": costs.kv_bytes(after),
        "kv_bytes_per_token_before": costs.kv_bytes(dense),
    }
    sizes = {
        kind: {"before": dense.uniform(kind), "after": after.uniform(kind)}
        for kind in ("residual", "ffn", "kv", "blocks")
    }
    return {
        "method": method.name,
        "needs_data": method.data != "none",
        "output_kind": f"{method.output}: {WORTH[method.output]}",
        "sizes": sizes,
        "achieved": achieved,
        "untied": surcharge,
        "gap": budget.gap,
        "peak_bytes": _peak_estimate(checkpoint, method, request.samples * length),
        "layout": request.layout,
        "loads_in": {"transformers": "verified at the save", **checkpoint.architecture.family.loads_in},
    }


_INTERPRETER = 450 * 2**20  # anonymous memory of Python with torch and transformers


def _peak_estimate(checkpoint: Checkpoint, method: Method, tokens: int) -> int:
    """Interpreter, stem and two blocks in float32; Grams and one batch of activations for methods with data."""
    architecture = checkpoint.architecture
    elements = {
        place: sum(checkpoint.folder.headers[p.name].elements for p in checkpoint.packed[place])
        for place in architecture.places
    }
    blocks = max((elements[place] for place in architecture.places if place is not None), default=0)
    width = architecture.sizes.residual
    total = _INTERPRETER + 4 * (elements[None] + 2 * blocks)
    if method.data != "none":
        total += (
            8 * 4 * width**2
            + 4 * min(tokens * width, 2**25)
            + 4 * 4096 * 4 * max(b.ffn for b in architecture.sizes.blocks)
        )
    return total


# -- evaluate ------------------------------------------------------------------------------------------------------------


def evaluate(
    model: str | Path,
    *,
    text: str | Path | None = None,
    context: int | None = None,
    against: str | Path | None = None,
    tasks: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Measure a checkpoint, alone or beside another in the same run.

    Args:
        model: checkpoint folder or hub id.
        text: held-out text file for the perplexity.
        context: tokens of a perplexity window.
        against: another checkpoint; adds ``against`` (its figures) and ``ratio`` (model / against).
        tasks: names of lm-eval tasks (extra ``eval``).
    """
    where = resolve_device(device)
    names = [str(model)] + ([] if against is None else [str(against)])
    if text is not None and not Path(text).is_file():
        refuse("no-text", f"text {str(text)!r}", "there is no such file")
    checkpoints = [Checkpoint.open(Path(locate(name))) for name in names]
    figures = evaluate_models(checkpoints, None if text is None else str(text), context, dtype, where)
    result: dict[str, Any] = dict(figures[0])
    if tasks:
        from secateur.meters.tasks import task_figures

        result["tasks"] = task_figures(checkpoints[0], tasks, where)
    if against is not None:
        result["against"] = figures[1]
        result["ratio"] = ratios(figures[0], figures[1])
    return result


def methods(name: str | None = None) -> dict[str, Any]:
    """Facts of all methods by name, or of one with its options (type, default, description)."""
    return {key: describe(method_class(key)) for key in ([name] if name else method_names())}


def describe(kind: type[Method]) -> dict[str, Any]:
    """Facts of a method class."""
    schema = kind.model_json_schema()["properties"]
    options = {
        key: {
            "type": str(kind.model_fields[key].annotation)
            .removeprefix("typing.")
            .replace("<class '", "")
            .replace("'>", ""),
            "choices": _choices(entry),
            "default": kind.model_fields[key].default,
            "description": kind.model_fields[key].description or "",
        }
        for key, entry in schema.items()
    }
    return {
        "title": kind.title,
        "paper": kind.paper,
        "data": kind.data,
        "output": kind.output,
        "worth": WORTH[kind.output],
        "options": options,
    }


def _choices(entry: Mapping[str, Any]) -> list[Any] | None:
    found = entry.get("enum") or next((part["enum"] for part in entry.get("anyOf", ()) if "enum" in part), None)
    return None if found is None else list(found)


def families() -> dict[str, Any]:
    """Every architecture, and for each kind of space what the native layout can do with it."""
    found = {}
    for name in family_names():
        architecture = Architecture(example_config(name))
        native = {}
        for kind in KINDS:
            reasons = architecture.refusals(kind)
            native[kind] = f"refused: {'; '.join(reasons)}" if reasons else _exactness(architecture, kind)
        found[name] = {"native": native, "loads_in": dict(architecture.family.loads_in)}
    return found


def _exactness(architecture: Architecture, kind: Kind) -> str:
    rules = [rule.why for rule in architecture.family.constraints if rule.size == kind]
    exact = "exact with 1 extra dimension" if kind == "residual" and architecture.family.norm == "layer" else "exact"
    return f"{exact} ({'; '.join(rules)})" if rules else exact


def inspect(model: str | Path) -> dict[str, Any]:
    """Sizes, spaces and costs of a checkpoint, from its headers."""
    checkpoint = Checkpoint.open(Path(locate(str(model))))
    architecture, costs = checkpoint.architecture, costs_of(checkpoint)
    sizes = architecture.sizes
    spaces = {}
    for kind in KINDS:
        places = [None] if kind in ("residual", "blocks") else [p for p in architecture.places if p is not None]
        every = [space for place in places for space in spaces_of(sizes, kind, place)]
        present = sizes.uniform(kind) or 0
        unit = costs.params(sizes) - costs.params(sizes.resized(kind, present - 1))
        reasons = architecture.refusals(kind)
        spaces[kind] = {
            "units": present,
            "count": len(every),
            "params_per_unit": unit // len(every),
            "share": unit * present / costs.params(sizes) if kind != "residual" else 1.0,
            "native": "refused: " + "; ".join(reasons) if reasons else _exactness(architecture, kind),
        }
    return {
        "model_type": architecture.family.model_type,
        **count(checkpoint),
        "dtypes": sorted(set(checkpoint.dtypes.values())),
        "tied": sizes.tied,
        "context": context_of(checkpoint),
        "passthrough": [header.name for header in checkpoint.passthrough],
        "spaces": spaces,
    }


def load(path: str | Path, **options: Any) -> nn.Module:
    """Load a checkpoint that Secateur wrote (or any other); native ones go through plain transformers.

    Args:
        options: passed on to ``AutoModelForCausalLM.from_pretrained``.
    """
    from transformers import AutoModelForCausalLM

    folder = Folder(Path(locate(str(path))))
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder.path, **options)
    return model


__all__ = ["PruneResult", "evaluate", "families", "inspect", "load", "methods", "preview", "prune"]
