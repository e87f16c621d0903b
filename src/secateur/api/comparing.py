"""``compare``: every method on one model, each cell in a process of its own, one table."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from secateur.api.outputs import require_output, require_text, workplace
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.hub import locate
from secateur.data.sources import documents, read_text, source_files
from secateur.engine.cluster import ray_cluster, spread
from secateur.engine.comparison import (
    Cell,
    CompareRequest,
    Row,
    baseline_of,
    cells_of,
    layouts_of,
    rows_of,
)
from secateur.engine.files import write_whole
from secateur.engine.journal import Journal
from secateur.engine.prepare import resolve_device
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import appear
from secateur.engine.request import checked
from secateur.engine.run import model_digest
from secateur.engine.workers import Workers
from secateur.errors import SecateurError, refuse
from secateur.inference import open_checkpoint
from secateur.meters.machine import conditions
from secateur.meters.standings import judgement, summarise
from secateur.reports.compare import write_comparison
from secateur.version import __version__

JOURNAL: Final = "results.jsonl"
RESULTS: Final = "results.json"
MODELS: Final = "models"
_PUT_BACK: Final = "put it back and give the same command, or --force to begin anew"
_WORKER: Final = "secateur.api.cells"


def compare(
    model: str | Path,
    *,
    methods: str | Sequence[str] = "all-structured",
    ratio: float | str | Sequence[float] = (0.1, 0.2, 0.3),
    data: str | Path | None = None,
    text: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Prune one model with every method, in every layout, at every ratio, and judge them at equal size.

    Args:
        model: checkpoint folder or hub id.
        methods: names; ``NAME:option=value:...`` with options; ``all-structured`` for every method whose result is a
            smaller dense checkpoint. Random units are always among them.
        ratio: shares of all parameters to remove.
        data: calibration text, for the methods that need it.
        text: held-out text for the perplexity, another one than ``data``.
        output: folder for the results; cells of the same model, texts and arguments that it has are not run again.
        progress: told what happens.
        more: ``samples``, ``length``, ``text_field``, ``options`` (by ``METHOD.option``), ``layout`` (``native``,
            ``per-layer`` or ``both``), ``context``, ``quantum``, ``tolerance``, ``device``, ``dtype``, ``seed``,
            ``trust_remote_code``, ``keep`` (the pruned models), ``cluster`` (``ray``: cells run on a Ray cluster,
            several at a time), ``force``.

    Returns:
        ``cells``, ``summary`` (seeds together), ``judgement`` (per ratio and layout), ``dense``, ``machine``,
        ``counts`` of the cells by state, paths of the reports.

    Raises:
        RequestError: a bad request, found before any cell runs; or ``output`` holds another one's results.
    """
    started, told = time.perf_counter(), progress or Silent()
    given = {"model": str(model), "methods": methods, "ratio": ratio, "data": data, "text": text, "output": output}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in {**given, **more}.items()}
    request = checked(CompareRequest, {key: v for key, v in values.items() if v is not None}, "a comparison")
    rows = rows_of(request)
    cells = cells_of(request, rows)
    output_folder = _require_inputs(request, rows)
    checkpoint = open_checkpoint(Path(locate(request.model)), told.note)
    checkpoint.require_tokens("a comparison by perplexity")
    run = _Run(request, rows, cells, output_folder, checkpoint, told)
    with workplace(output_folder, [checkpoint], free=True) as place:
        results = run.all_cells(place.folder)
        results["seconds"] = round(time.perf_counter() - started, 3)
        shown = write_comparison(output_folder, results)
        write_whole(output_folder / RESULTS, json.dumps(shown, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(place.folder, ignore_errors=True)
    return shown


def _require_inputs(request: CompareRequest, rows: Sequence[Row]) -> Path:
    """The folder of the results; texts must be there and differ."""
    own = request.output is not None and (Path(request.output) / JOURNAL).is_file()
    output = Path(str(request.output)) if own else require_output(request, "a comparison")
    if request.text is None:
        refuse("no-text", "a comparison", "there is no held-out text to measure on", "--text heldout.txt")
    require_text(request)
    needing = [row.label for row in rows if row.settings.data != "none"]
    if request.data is None and needing:
        found = f"{', '.join(needing)} need calibration text and --data is not given"
        refuse("no-data", "a comparison", found, "--data notes.txt, or name other methods")
    if request.data == "-":
        refuse("no-data", "data '-'", "every cell reads it anew, standard input only once", "write it to a file")
    if request.data is not None:
        _require_difference(request.data, request.text)
    return output


def _require_difference(data: str, text: str) -> None:
    """Refuse held-out text that the methods would have seen."""
    held_out, path = read_text(Path(text)).strip(), Path(text).resolve()
    for file in source_files(data):
        same = file.resolve() == path or file.read_bytes() == path.read_bytes()
        # a text file is one document; those of tables and arrays are compared as files only
        if same or (file.suffix not in (".jsonl", ".parquet", ".npy") and held_out in next(_texts(file))):
            found = f"it is part of the calibration text {str(file)!r}"
            refuse("same-text", f"held-out text {text!r}", found, "figures on seen text say nothing: give another")


def _texts(file: Path) -> Any:
    return (str(document) for document in documents(str(file)))


@dataclass
class _Run:
    """One comparison: what was asked, and where."""

    request: CompareRequest
    rows: Sequence[Row]
    cells: Sequence[Cell]
    output: Path
    checkpoint: Checkpoint
    told: Progress

    def __post_init__(self) -> None:
        self.machine = conditions(resolve_device(self.request.device))
        self._inputs = self._digests()

    def all_cells(self, work: Path) -> dict[str, Any]:
        """Run what is not done yet; everything that there is to say."""
        journal = self._journal(self.output) if (self.output / JOURNAL).is_file() and not self.request.force else None
        with Workers(_WORKER, work) as workers:
            known = journal.done("dense") if journal is not None else []
            dense = known[-1] if known else workers.run("measure_dense", self._dense_job())
            self._require_same_inputs()
            if journal is None:
                journal = self._begin(work)
            if not known:
                journal.add("dense", **dense)
            self._remaining(journal, workers, work)
        found = self._finished(journal)
        return self._results({k: v for k, v in dense.items() if k != "step"}, [found[_key(c.key)] for c in self.cells])

    def _begin(self, work: Path) -> Journal:
        """A folder of no results yet, which appears with its journal in it; an old one goes aside."""
        begun = work / "begun"
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        self._journal(begun)
        appear(begun, self.output, self.told)
        return self._journal(self.output)

    def _journal(self, folder: Path) -> Journal:
        hint = "repeat that request, name another folder, or --force to begin anew"
        return Journal(folder, self._fingerprint(), JOURNAL, hint)

    def _remaining(self, journal: Journal, workers: Workers, work: Path) -> None:
        finished = {key for key, cell in self._finished(journal).items() if cell["state"] != "failed"}
        if journal.resumed:
            done = sum(_key(cell.key) in finished for cell in self.cells)
            self.told.note(f"{done} of {len(self.cells)} cells are done already")
        self.told.start("cells", len(self.cells))
        missing = [cell for cell in self.cells if _key(cell.key) not in finished]
        each = self._spread(missing, work) if self.request.cluster else self._one_by_one(missing, workers, work)
        for position, (cell, figures) in enumerate(each, len(self.cells) - len(missing) + 1):
            self._require_same_inputs()
            self.told.note(f"{cell}: {_said(figures)}")
            journal.add("cell", **cell.key, **figures)
            self.told.step(position)

    def _one_by_one(self, cells: Sequence[Cell], workers: Workers, work: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell in cells:
            try:
                figures: dict[str, Any] = workers.run("make_and_measure", self._job(cell, work / cell.name))
            except SecateurError as error:
                figures = _failed(error)
            yield cell, self._kept(cell, figures, work)

    def _spread(self, cells: Sequence[Cell], work: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The same on a cluster, as cells finish; models that are kept need a folder that all its hosts see."""
        by_name = {cell.name: cell for cell in cells}
        places = {name: work / name if self.request.keep else None for name in by_name}
        jobs = {name: self._anywhere(self._job(cell, places[name])) for name, cell in by_name.items()}
        gpus = int(resolve_device(self.request.device).type == "cuda")
        with ray_cluster() as ray:
            for name, answer in spread(ray, _WORKER, "make_and_measure", jobs, torch.get_num_threads(), gpus):
                figures = _failed(answer) if isinstance(answer, SecateurError) else answer
                yield by_name[name], self._kept(by_name[name], figures, work)

    def _finished(self, journal: Journal) -> dict[str, dict[str, Any]]:
        """The last record of every cell by its key."""
        return {_key(record): record for record in journal.done("cell")}

    def _job(self, cell: Cell, output: Path | None) -> dict[str, Any]:
        where = {} if output is None else {"output": str(output)}
        return {**self._common(), "prune": self._prune_arguments(cell), **where}

    def _anywhere(self, job: dict[str, Any]) -> dict[str, Any]:
        """A job that says the same in any folder, hosts seeing the same files."""
        local = {name: _absolute(value) for name, value in job.items() if name in ("model", "text")}
        if "output" in job:
            local["output"] = str(Path(job["output"]).absolute())
        return {**job, **local, "prune": {**job["prune"], "data": _absolute(job["prune"]["data"])}}

    def _kept(self, cell: Cell, figures: dict[str, Any], work: Path) -> dict[str, Any]:
        """The figures of a cell, its model moved to where it stays, or deleted with what lies beside it."""
        output = work / cell.name
        if self.request.keep and figures["state"] == "done":
            kept = self.output / MODELS / cell.name
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            output.rename(kept)
            figures["output"] = str(kept)
        for folder in work.glob(f"*{cell.name}*"):  # what a cell that died was working on, too
            shutil.rmtree(folder, ignore_errors=True)
        return figures

    def _dense_job(self) -> dict[str, Any]:
        arguments = {"data": self.request.data, **self._calibration(), "dtype": self.request.dtype}
        return {**self._common(), "prune": arguments, "seed": self.request.seed}

    def _common(self) -> dict[str, Any]:
        request = self.request
        return {
            "model": str(self.checkpoint.folder.path),
            "text": request.text,
            "context": request.context,
            "device": request.device,
            "trust_remote_code": request.trust_remote_code,
            "threads": torch.get_num_threads(),
            "keep": request.keep,
        }

    def _calibration(self) -> dict[str, Any]:
        names = ("samples", "length", "text_field", "trust_remote_code")
        return {name: getattr(self.request, name) for name in names}

    def _prune_arguments(self, cell: Cell) -> dict[str, Any]:
        request = self.request
        return {
            "method": cell.row.method,
            "options": dict(cell.row.options),
            "ratio": cell.ratio,
            "layout": cell.layout,
            "seed": cell.seed,
            "data": request.data,
            **self._calibration(),
            **{name: getattr(request, name) for name in ("quantum", "tolerance", "device", "dtype")},
        }

    def _fingerprint(self) -> dict[str, Any]:
        """What all results follow from; what a cell adds is in its key."""
        request = self.request
        names = ("context", "quantum", "tolerance", "device", "dtype", "seed", "keep")
        return {
            "version": __version__,
            **self._inputs,
            **self._calibration(),
            **{name: getattr(request, name) for name in names},
            "machine": self.machine,
        }

    def _digests(self) -> dict[str, Any]:
        """What tells whether model and texts are those of the first cell."""
        data = self.request.data
        return {
            "model": model_digest(self.checkpoint),
            "data": None if data is None else _digest(source_files(data)) or data,
            "text": _digest([Path(str(self.request.text))]),
        }

    def _require_same_inputs(self) -> None:
        """Refuse to note figures of texts or a model that changed while they were made."""
        try:
            now = self._digests()
        except OSError as error:
            now = {name: str(error) for name in self._inputs}
        for name, digest in now.items():
            if digest != self._inputs[name]:
                asked = f"{name} {getattr(self.request, name)!r}"
                found = "it was written to, or taken away, while cells were made of it"
                refuse("source-changed", asked, found, _PUT_BACK)

    def _results(self, dense: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        request = self.request
        cells = [{key: v for key, v in record.items() if key not in ("step", "settings")} for record in records]
        for cell in cells:
            if cell["state"] == "done":
                cell["perplexity_before"] = dense["perplexity"]
        summary = summarise(cells)
        baseline = baseline_of(self.rows)
        states = [cell["state"] for cell in cells]
        return {
            "model": request.model,
            "output": str(self.output),
            "version": __version__,
            "requested": request.model_dump(mode="json", exclude={"output", "force", "model", "cluster"}),
            "dense": {key: value for key, value in dense.items() if key != "data"},
            "data": dense["data"],
            "text_sha256": self._inputs["text"],
            "machine": self.machine,
            "methods": [
                {"label": row.label, "method": row.method, "options": dict(row.options), "seeded": row.settings.seeded}
                for row in self.rows
            ],
            "baseline": baseline,
            "counts": {state: states.count(state) for state in ("done", "unreachable", "failed")},
            "judgement": judgement(dense, summary, layouts_of(request, self.rows), request.ratios, baseline),
            "summary": summary,
            "cells": cells,
        }


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record[name] for name in ("method", "settings", "layout", "ratio", "seed")])


def _failed(error: SecateurError) -> dict[str, Any]:
    """How a cell ended without any figures."""
    return {"state": "failed", "why": str(error), "code": error.code}


def _absolute(name: str | None) -> str | None:
    """The path of a file or folder from the root; anything else as it is."""
    return str(Path(name).absolute()) if name is not None and Path(name).exists() else name


def _said(figures: dict[str, Any]) -> str:
    """A cell in a few words."""
    if figures["state"] == "done":
        quality = "not finite" if figures["perplexity"] is None else f"{figures['perplexity']:.3f}"
        return f"{figures['removed']:.1%} removed, perplexity {quality}, {figures['seconds']:.1f} s"
    return f"{'not reachable' if figures['state'] == 'unreachable' else 'failed'}: {figures['why']}"


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over the content of files; empty where there are none."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            sha.update(hashlib.file_digest(handle, "sha256").digest())
    return sha.hexdigest() if files else ""
