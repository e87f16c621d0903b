"""``recover``: train a cut model, write it as the same kind of folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.api.modules import Model, with_folders
from secateur.api.outputs import achieved_of, require_output, require_text, workplace
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.companions import copy_companions
from secateur.checkpoints.folder import RECORD
from secateur.engine.journal import Journal, work_folder
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import publish
from secateur.engine.request import recipe_of
from secateur.engine.run import LEARNED
from secateur.errors import refuse
from secateur.families.loading import loads_in
from secateur.inference import open_checkpoint
from secateur.meters.memory import MemoryWatch, available_bytes
from secateur.meters.perplexity import Text, load_stock, perplexity
from secateur.reports.recover import RECIPE, RecoverFacts, write_card, write_report
from secateur.training.adapters import adapt, merged, unfreeze
from secateur.training.loop import Outcome, Trainer
from secateur.training.objective import Objective
from secateur.training.options import RecoverRequest, Training, make_recovery
from secateur.training.prepare import Recovery, prepare_recovery
from secateur.training.save import check_reloaded, write_weights
from secateur.version import __version__


@dataclass(frozen=True)
class RecoverResult:
    """What ``recover`` did; ``as_dict`` gives the keys of the command's JSON object.

    ``model`` is the trained module when a module was passed in.
    """

    method: str
    requested: dict[str, Any]
    achieved: dict[str, int]
    training: dict[str, Any]
    perplexity: dict[str, Any] | None
    seconds: float
    peak_rss_bytes: int
    output: str | None
    loads_in: dict[str, str]
    seed: int
    recipe: str
    model: nn.Module | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "model"}


def recover(
    model: Model | None = None,
    *,
    data: str | Path | None = None,
    teacher: Model | None = None,
    method: str | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    inplace: bool = False,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> RecoverResult:
    """Train a cut model for a while and write it as a folder of the same kind.

    Args:
        model: checkpoint folder, hub id, or a transformers module (which stays as it is unless ``inplace``); may stand
            in the recipe.
        data: text to train on: file, folder, hub data set, token ids.
        teacher: the uncut model, to learn from its logits too; a folder, a hub id or a module.
        method: ``lora`` (adapters, merged back) or ``full`` (all weights).
        output: folder to write; may be omitted for a module.
        tokenizer: of a module, needed when ``data`` or ``text`` is text.
        inplace: change the module passed in.
        recipe: YAML file with the same options.
        progress: told what happens.
        more: the other options of the command line (``steps``, ``length``, ``options``, ``text``, ``seed``, ...).

    Raises:
        SecateurError: with what was asked, what was found and what to do; then ``output`` does not exist.
    """
    asked = {"model": model, "data": data, "teacher": teacher, "method": method, "output": output}
    file = None if recipe is None else Path(recipe)

    def run(values: dict[str, Any], in_memory: frozenset[str]) -> RecoverResult:
        return _recover_folder(*make_recovery(values, file), progress or Silent(), in_memory)

    return with_folders({**asked, **more}, ("model", "teacher"), tokenizer, inplace, run)


def _recover_folder(
    request: RecoverRequest, options: Training, progress: Progress, in_memory: frozenset[str]
) -> RecoverResult:
    """Recover a checkpoint folder; the models ``in_memory`` were modules, which cannot be named again."""
    started = time.perf_counter()
    output = require_output(request, "a recovery")
    require_text(request)
    with MemoryWatch() as memory:
        job = prepare_recovery(request, options)
        _require_memory(job)
        recipe = _recipe(request, options, in_memory)
        inputs = [found for found in (job.checkpoint, job.teacher) if found is not None]
        with workplace(output, inputs, request.force) as place:
            work = place.folder
            journal = Journal(work, job.fingerprint())
            if journal.resumed:
                progress.note(f"resuming the run in {work.name}")
            model, outcome = _train(job, work, journal, progress)
            place.precious = True  # a text at fault, which is opened only now, shall not cost the training
            record = _write(job, model, outcome, output)
            del model
            result = open_checkpoint(work / "out")
            achieved = achieved_of(job.checkpoint, result)
            figures = _perplexities(job, result, progress)
            training = _told(job, outcome)
            write_card(result.folder.path, record, achieved)
            facts = {
                "seconds": f"{time.perf_counter() - started:.1f}",
                "seconds of training": f"{outcome.seconds:.1f}",
                "peak anonymous memory": f"{memory.peak / 2**20:,.0f} MiB",
                "device": str(job.device),
                "threads": str(torch.get_num_threads()),
                "compute type": str(job.compute).removeprefix("torch."),
            }
            (result.folder.path / RECIPE).write_text(recipe, encoding="utf-8")
            name = "a module in memory" if "model" in in_memory else request.model
            write_report(result.folder.path, RecoverFacts(name, record, achieved, recipe, figures, facts))
            for source in inputs:
                source.folder.require_unchanged()
            publish(result.folder.path, output, progress)
    return RecoverResult(
        method=request.method,
        requested=job.requested(),
        achieved=achieved,
        training=training,
        perplexity=figures,
        seconds=round(time.perf_counter() - started, 3),
        peak_rss_bytes=memory.peak,
        output=str(output),
        loads_in=record["loads_in"],
        seed=request.seed,
        recipe=recipe,
    )


def _recipe(request: RecoverRequest, options: Training, in_memory: frozenset[str]) -> str:
    """The request as YAML, modules in memory left out."""
    asked = request.model_copy(update={"teacher": None}) if "teacher" in in_memory else request
    given = options.model_dump(mode="json", include=set(request.options))
    return recipe_of(asked, request.method, given, "model" not in in_memory)


def _require_memory(job: Recovery) -> None:
    """Training holds whole models: weights, and for what trains a gradient and two moments in float32."""
    if job.device.type != "cpu":
        return
    needed = job.checkpoint.params * (job.weights.itemsize + (12 if job.request.method == "full" else 0))
    if job.teacher is not None:
        needed += job.teacher.params * job.compute.itemsize
    if needed > available_bytes():
        found = f"it needs {needed / 2**30:.1f} GiB at least, {available_bytes() / 2**30:.1f} are free"
        refuse("memory", f"training {job.checkpoint.params:,} parameters", found, "--method lora, --dtype bfloat16")


def _train(job: Recovery, work: Path, journal: Journal, progress: Progress) -> tuple[nn.Module, Outcome]:
    """Load, train, merge; an interrupted run goes on where it stood."""
    model: Any = _owned(load_stock(job.checkpoint, job.weights, job.device))
    teacher = None
    if job.teacher is not None:
        teacher = _owned(load_stock(job.teacher, job.compute, job.device)).requires_grad_(False)
    objective = Objective(job.options, teacher).to(job.device)
    objective.fit_maps(model, job.train[: job.options.batch].to(job.device))
    architecture, options = job.checkpoint.architecture, job.options
    if job.request.method == "lora":
        scale = (options.alpha or 2.0 * options.rank) / options.rank
        model = adapt(model, architecture, job.ranks, scale, job.request.seed)
    else:
        unfreeze(model, architecture, options)
    outcome = Trainer(
        model, objective, job.train, job.held_back, options, job.length, job.request.seed, work, journal, progress,
        job.compute,
    ).run()  # fmt: skip
    return (merged(model) if job.request.method == "lora" else model), outcome


def _owned(model: nn.Module) -> nn.Module:
    """The model in memory of its own: a file that is cut short while it is mapped would end the training."""
    for tensor in chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _told(job: Recovery, outcome: Outcome) -> dict[str, Any]:
    """Figures of the training, as they are reported; ``validation`` in nats per token of held-back data."""
    kept = next(point for point in outcome.curve if point["steps"] == outcome.best)
    return {
        "steps": outcome.steps,
        "kept_step": outcome.best,
        "tokens": outcome.tokens,
        "trainable_params": outcome.trainable,
        "windows": len(job.train),
        "windows_held_back": len(job.held_back),
        "validation": {"before": outcome.curve[0]["validation"], "after": kept["validation"]},
    }


def _write(job: Recovery, model: nn.Module, outcome: Outcome, output: Path) -> dict[str, Any]:
    """Write the output folder beside its place and check that it reloads; returns its record."""
    import transformers

    source, architecture, work = job.checkpoint, job.checkpoint.architecture, work_folder(output)
    result = work / "out"
    shutil.rmtree(result, ignore_errors=True)
    left_behind = copy_companions(source.folder.path, result, {output.resolve(), work.resolve()}, {LEARNED})
    digests = write_weights(source, model, result)
    written = open_checkpoint(result)
    precise = torch.float64 if "F64" in source.dtypes.values() else torch.float32
    check_reloaded(source, model, load_stock(written, precise, torch.device("cpu")))
    recovery = {
        "secateur": __version__,
        "requested": job.requested(),
        "data": job.windows.record(),
        "training": _told(job, outcome),
        "ranks": job.ranks,
        "curve": outcome.curve,
    }
    record = {
        "secateur": __version__,
        **job.source,
        "recovery": [*job.source.get("recovery", []), recovery],
        "loads_in": {
            "transformers": f"verified({transformers.__version__})",
            **loads_in(
                architecture.family,
                job.sizes_before,
                architecture.sizes,
                "per-layer" if architecture.per_layer else "native",
            ),
        },
        "passthrough": sorted(header.name for header in source.passthrough),
        "left_behind": left_behind,
        "tensors": dict(sorted(digests.items())),
    }
    (result / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return record


def _perplexities(job: Recovery, result: Checkpoint, progress: Progress) -> dict[str, Any] | None:
    """Perplexity before, after and of the teacher; the text is opened here, when nothing can learn from it."""
    request = job.request
    if request.text is None:
        return None
    text = Text.read(request.text, job.checkpoint, request.context, request.trust_remote_code)
    models = {"before": job.checkpoint, "after": result, "teacher": job.teacher}
    progress.start("measure", len(models))
    figures: dict[str, Any] = {}
    for done, (name, checkpoint) in enumerate(models.items(), 1):
        figures[name] = None if checkpoint is None else perplexity(checkpoint, text, job.compute, job.device)
        progress.step(done)
    return {**figures, "context": text.context, "tokens": text.tokens}
