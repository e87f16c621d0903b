"""What there is and what it measures: ``evaluate``, ``methods``, ``families``, ``inspect``, ``load``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from secateur.api.onnx_models import inspect_onnx, is_onnx
from secateur.checkpoints import Folder
from secateur.checkpoints.hub import locate
from secateur.checkpoints.loading import load_model
from secateur.cuts.gauge import estimate_savings
from secateur.engine.prepare import (
    context_of,
    costs_of,
    resolve_device,
)
from secateur.engine.progress import Progress, Silent
from secateur.errors import refuse
from secateur.families import LAYOUTS, Architecture, Family, Kind, Layout, family_names
from secateur.families.limits import verdict
from secateur.families.loading import loads_by_kind
from secateur.inference import family_text, inferred, open_checkpoint
from secateur.meters.counts import count
from secateur.meters.evaluate import evaluate_models, ratios
from secateur.meters.similarity import ScoredPairs
from secateur.meters.tasks import Tasks
from secateur.methods.registry import describe_method, method_names
from secateur.runtimes.semi_structured import PATTERN, require_device, run_sparse
from secateur.spaces import KINDS, all_spaces


def evaluate(
    model: str | Path,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    context: int | None = None,
    against: str | Path | None = None,
    tasks: str | Sequence[str] = (),
    pairs: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, alone or beside another in the same run.

    Args:
        model: checkpoint folder or hub id.
        text: held-out text file for the perplexity, or several: the first gives ``perplexity``, ``context`` and
            ``tokens``, and ``texts`` holds these of each by its name.
        context: tokens of a perplexity window.
        against: another checkpoint; adds ``against`` (its figures) and ``ratio`` (model / against).
        tasks: names of lm-eval tasks, YAML files of tasks, folders of them (extra ``eval``); adds ``tasks``.
        pairs: file of sentence pairs that people have scored, for a model of embeddings; adds ``spearman``, the rank
            correlation of cosines and scores, and ``pairs``, their number.
        progress: told when an architecture has no family file.

    Raises:
        RequestError: no such model, text or task, or one that cannot be read.
    """
    where = resolve_device(device)
    names = [str(model)] + ([] if against is None else [str(against)])
    given = [text] if isinstance(text, str | Path) else text or ()
    texts = list(dict.fromkeys(map(str, given)))
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    for name in texts:
        if not Path(name).is_file():
            refuse("no-text", f"text {name!r}", "there is no such file")
    note = (progress or Silent()).note
    checkpoints = [open_checkpoint(Path(locate(name)), note) for name in names]
    scored = None if pairs is None else ScoredPairs.read(str(pairs))
    figures = evaluate_models(checkpoints, texts, context, dtype, where, Tasks(wanted) if wanted else None, scored)
    result: dict[str, Any] = dict(figures[0])
    if against is not None:
        result["against"] = figures[1]
        result["ratio"] = ratios(figures[0], figures[1])
    return result


def methods(name: str | None = None) -> dict[str, Any]:
    """Facts of all methods by name, or of one with its options (type, default, description)."""
    return {key: describe_method(key) for key in ([name] if name else method_names())}


def families() -> dict[str, Any]:
    """Every architecture, for each kind of space what each layout can do with it, and where the native result loads."""
    found = {}
    for name in family_names():
        architecture = Architecture.example(name)
        cuts = {str(layout): {k: _verdict(architecture, k, layout) for k in KINDS} for layout in LAYOUTS}
        found[name] = {**cuts, "loads_in": loads_by_kind(architecture)}
    return found


def _verdict(architecture: Architecture, kind: Kind, layout: Layout) -> str:
    state, why = verdict(architecture, kind, layout)
    return f"{state} ({why})" if why else state


def inspect(
    model: str | Path,
    *,
    write_family: str | Path | None = None,
    graph: bool = False,
    draw: str | Path | None = None,
    data: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sizes, spaces and costs of a checkpoint, from its headers; or of an ONNX file, by running it.

    Args:
        model: checkpoint folder or hub id, or an ONNX file.
        write_family: file to write the family to, most often of an architecture that had no file.
        graph: of an ONNX file: its coupled channels, each space tried.
        draw: of an ONNX file: where to draw its operations with the channels in colours, ``.svg`` or ``.dot``.
        data: of an ONNX file: examples of its inputs, where made-up ones will not do.
        progress: told when an architecture has no family file.
    """
    if is_onnx(model):
        return inspect_onnx(model, data, graph, draw)
    if graph or draw is not None:
        hint = "secateur.graph(module, example_inputs) shows those of a module; a checkpoint's follow from its family"
        refuse("no-graph", f"the graph of {str(model)!r}", "it is no ONNX file", hint)
    path = Path(locate(str(model)))
    checkpoint = open_checkpoint(path, (progress or Silent()).note)
    found = inferred(checkpoint.folder)
    if write_family is not None:
        _write_family(Path(write_family), checkpoint.architecture.origin)
    architecture, costs = checkpoint.architecture, costs_of(checkpoint)
    sizes = architecture.sizes
    spaces = {}
    for kind in KINDS:
        every = all_spaces(sizes, kind)
        if not every:
            continue
        present = sizes.size(kind)
        unit = costs.params(sizes) - costs.params(sizes.resized(kind, present - 1))
        spaces[kind] = {
            "units": present,
            "count": len(every),
            "params_per_unit": unit // len(every),
            "share": unit * present / costs.params(sizes) if kind != "residual" else 1.0,
            **{str(layout): _verdict(architecture, kind, layout) for layout in LAYOUTS},
        }
    return {
        "model_type": architecture.family.model_type,
        **count(checkpoint),
        "dtypes": sorted(set(checkpoint.dtypes.values())),
        "tied": sizes.tied,
        "context": context_of(checkpoint),
        "passthrough": [header.name for header in checkpoint.passthrough],
        "spaces": spaces,
        **({"shortcuts": estimate_savings(architecture)} if sizes.shortcuts else {}),
        "family": "known" if found is None else "beside the model" if found.written else "inferred",
        **({} if found is None else {"verified": list(found.verified), "refused": dict(found.refused)}),
        **({} if write_family is None else {"family_file": str(write_family)}),
    }


def _write_family(path: Path, family: Family) -> None:
    if path.exists():
        refuse("output-exists", f"family file {str(path)!r}", "it exists already", "choose another name")
    path.write_text(family_text(family), encoding="utf-8")


def load(path: str | Path, *, sparse: str | None = None, **options: Any) -> nn.Module:
    """Load a checkpoint that Secateur wrote (or any other), packed or not; no remote code is needed.

    Args:
        sparse: ``"2:4"`` moves the model to the GPU and lets it skip the zeros of every linear layer that has that
            pattern, for inference.
        options: passed on to ``AutoModelForCausalLM.from_pretrained`` (``AutoModel`` for a model without a head).

    Raises:
        RequestError: no such model; with ``sparse``, no GPU that can skip zeros, or no layer with that pattern.
    """
    if sparse is None:
        model: nn.Module = load_model(Folder(Path(locate(str(path)))), **options)
        return model
    if sparse != PATTERN:
        refuse("bad-sparse", f"sparse={sparse!r}", "no machine skips zeros in that pattern", f"sparse={PATTERN!r}")
    where = resolve_device("auto")
    require_device(where)
    model = load(path, **options)
    run_sparse(model, where)
    return model.eval()
