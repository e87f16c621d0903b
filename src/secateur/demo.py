"""The demonstration: prune the embedded model with several methods and put them into one table."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch

from secateur.api import prune
from secateur.checkpoints import Checkpoint
from secateur.data.pydocs import documents
from secateur.engine.progress import Progress
from secateur.errors import refuse
from secateur.meters.perplexity import Text, perplexity
from secateur.plans import Chart
from secateur.reports.document import Charts, Document, Section, Table
from secateur.reports.files import write_document

METHODS: Final = ("random", "magnitude", "prunenet", "slicegpt")
RATIOS: Final = (0.1, 0.3)
_WINDOW, _SAMPLES = 256, 64
_HELD_OUT_CHARACTERS = 90_000
_MARK: Final = ".secateur-demo"


def embedded_model() -> Path:
    """Folder of the model that comes with the package: 5.8 M parameters, trained on Python's own documentation."""
    return Path(str(files("secateur") / "embedded"))


def run_demo(output: Path, progress: Progress) -> dict[str, Any]:
    """Prune the embedded model with every demonstration method at every ratio.

    Args:
        output: folder for the pruned models, the texts and the report; one of an earlier demonstration is replaced.

    Returns:
        ``dense`` and ``rows`` with their figures, and the path of the ``report``.
    """
    if output.exists() and not (output / _MARK).is_file():
        refuse(
            "output-exists", f"output {str(output)!r}", "it exists and is no demonstration", "name another folder: -o"
        )
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / _MARK).touch()
    calibration, held_out = output / "calibration.txt", output / "held-out.txt"
    calibration.write_text("\n\n".join(documents("valid")), encoding="utf-8")
    held_out.write_text("\n\n".join(documents("test"))[:_HELD_OUT_CHARACTERS], encoding="utf-8")
    model = embedded_model()
    dense = _measure(model, held_out)
    rows = []
    for ratio in RATIOS:
        for method in METHODS:
            progress.note(f"{method} at ratio {ratio}")
            folder = output / f"{method}-{ratio}"
            result = prune(
                model,
                method=method,
                ratio=ratio,
                data=calibration,
                samples=_SAMPLES,
                length=_WINDOW,
                output=folder,
                progress=progress,
            )
            rows.append(
                {
                    "method": method,
                    "ratio": ratio,
                    "params": result.achieved["params"],
                    "perplexity": _measure(folder, held_out)["perplexity"],
                    "seconds": result.seconds,
                    "output": str(folder),
                }
            )
    report, page = output / "report.md", output / "report.html"
    write_document(_describe(dense, rows), report, page)
    return {"dense": dense, "rows": rows, "report": str(report), "page": str(page)}


def _describe(dense: dict[str, Any], rows: list[dict[str, Any]]) -> Document:
    """The report of the demonstration."""
    cells = [
        [
            f"{r['method']}, ratio {r['ratio']}",
            f"{r['params']:,}",
            f"{1 - r['params'] / dense['params']:.1%}",
            f"{r['perplexity']:.2f}",
        ]
        for r in rows
    ]
    first = ["dense", f"{dense['params']:,}", "0.0%", f"{dense['perplexity']:.2f}"]
    table = Table(["model", "parameters", "removed", "perplexity"], [first, *cells], "Perplexity on held-out text")
    dense_point = (float(dense["params"]), dense["perplexity"])
    curves = {
        m: [dense_point, *((float(r["params"]), r["perplexity"]) for r in rows if r["method"] == m)] for m in METHODS
    }
    chart = Chart("Perplexity against parameters", "parameters", "held-out perplexity", curves, logarithmic=True)
    lead = (
        f"The embedded model on held-out documentation of this Python ({dense['tokens']:,} predicted tokens, windows "
        f"of {dense['context']}); every folder beside this file loads with plain transformers."
    )
    return Document("Secateur demonstration", lead, [Section("Results", [table, Charts([chart])])])


def _measure(folder: Path, held_out: Path) -> dict[str, Any]:
    """Parameters of a checkpoint and its perplexity on the held-out text."""
    checkpoint = Checkpoint.open(folder)
    text = Text.read(str(held_out), checkpoint, _WINDOW)
    value = perplexity(checkpoint, text, torch.float32, torch.device("cpu"))
    return {"params": checkpoint.params, "perplexity": value, "tokens": text.tokens, "context": text.context}
