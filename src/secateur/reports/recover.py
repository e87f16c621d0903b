"""The report of one recovery and the model card of its output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from secateur.checkpoints.companions import CARD, SOURCE_CARD
from secateur.plans import Chart
from secateur.reports.document import Charts, Document, Listing, Paragraph, Part, Section, Table, change
from secateur.reports.files import write_document
from secateur.reports.markdown import render_table, table
from secateur.reports.prune import PAGE, REPORT, closing, counts_table, sizes_table

RECIPE: Final = "recipe-recover.yaml"
_MOST_POINTS: Final = 256


@dataclass(frozen=True)
class RecoverFacts:
    """What a report tells of a recovery.

    Attributes:
        model: as the user named it.
        record: the content of ``secateur.json``; the last entry of its ``recovery`` is this one.
        achieved: counts before and after.
        recipe: the request as YAML.
        perplexity: before, after, teacher (or None), context, tokens.
        run: how the run went: seconds, peak memory, device, ...
    """

    model: str
    record: dict[str, Any]
    achieved: dict[str, int]
    recipe: str
    perplexity: dict[str, Any] | None
    run: dict[str, str]

    @property
    def recovery(self) -> dict[str, Any]:
        last: dict[str, Any] = self.record["recovery"][-1]
        return last


def recovered_share(perplexity: dict[str, Any]) -> float | None:
    """How much of the way from the cut model back to its teacher was made; None without a teacher or a loss."""
    teacher, before = perplexity["teacher"], perplexity["before"]
    if teacher is None or not before > teacher:
        return None
    return float((before - perplexity["after"]) / (before - teacher))


def _asked(recovery: dict[str, Any]) -> list[list[object]]:
    asked, training = recovery["requested"], recovery["training"]
    options = ", ".join(f"{key}={value}" for key, value in asked["options"].items() if value is not None)
    return [
        ["method", asked["method"]],
        ["teacher", asked["teacher"] or "none"],
        ["steps", training["steps"]],
        ["options", options],
        ["seed", asked["seed"]],
        ["training text", f"{recovery['data']['windows']} windows of {recovery['data']['length']} tokens"],
    ]


def write_card(folder: Path, record: dict[str, Any], achieved: dict[str, int]) -> None:
    """The model card: only what the same request gives again, byte for byte."""
    recovery = record["recovery"][-1]
    loads = table(["runtime", "loads"], [[name, state] for name, state in record["loads_in"].items()])
    asked = render_table(Table(["what", "value"], _asked(recovery), "What was asked for"))
    cut = (
        f"\n\nIt had been cut by `{record['method']}`:\n\n{render_table(sizes_table(record))}"
        if _was_cut(record)
        else ""
    )
    origin = (
        f"\n\nThe card of the model it was made from is in `{SOURCE_CARD}`." if (folder / SOURCE_CARD).is_file() else ""
    )
    text = f"""---
library_name: transformers
tags: [pruned, recovered, secateur]
---

# Recovered with Secateur {recovery["secateur"]}

{achieved["params"]:,} parameters; {recovery["training"]["trainable_params"]:,} were trained (of LoRA: those of the
adapters, which are merged into the weights).

{asked}{cut}

{loads}

`secateur.json` holds the requests, the learning curve and the SHA-256 of every tensor.{origin}
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _was_cut(record: dict[str, Any]) -> bool:
    return "before" in record and "after" in record


def _quality(perplexity: dict[str, Any] | None) -> list[Part]:
    if perplexity is None:
        return [Paragraph("Not measured: the run was given no held-out text (--text).")]
    what = f"perplexity ({perplexity['tokens']:,} tokens, windows of {perplexity['context']})"
    teacher = perplexity["teacher"]
    cells = [what, *change(perplexity["before"], perplexity["after"], ".3f")]
    row = [*cells, "-" if teacher is None else f"{teacher:.3f}"]
    parts: list[Part] = [Table(["measure", "before", "after", "ratio", "teacher"], [row], "Measured in the same run")]
    share = recovered_share(perplexity)
    if share is not None:
        parts.append(Paragraph(f"{share:.0%} of the way back to the teacher."))
    return parts


def _curve(recovery: dict[str, Any]) -> list[Part]:
    training, curve = recovery["training"], recovery["curve"]
    said = (
        f"{training['steps']} steps, {training['tokens']:,} tokens from {training['windows']} windows; "
        f"{training['windows_held_back']} windows of the data were held back. The weights of step "
        f"{training['kept_step']} were kept. Loss and cross entropy are means since the line before, in nats per token."
    )
    rows = [
        [
            point["steps"],
            f"{point['rate']:.2e}",
            *(_nats(point[key]) for key in ("loss", "cross_entropy", "validation")),
        ]
        for point in curve
    ]
    head = ["step", "learning rate", "loss", "cross entropy", "held-back cross entropy"]
    series = {
        label: [(float(point["steps"]), float(point[key])) for point in _thinned(curve) if point[key] is not None]
        for key, label in (("cross_entropy", "training data"), ("validation", "held-back data"))
    }
    drawn = {label: points for label, points in series.items() if points}
    parts: list[Part] = [Paragraph(said), Table(head, rows, "Learning curve")]
    if drawn:
        mark = (float(training["kept_step"]), "kept")
        parts.append(Charts([Chart("Learning curve", "step", "cross entropy, nats per token", drawn, mark=mark)]))
    return parts


def _thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """No more points than a chart takes, the last among them."""
    every = -(-len(curve) // _MOST_POINTS)
    return curve[::-1][::every][::-1]


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def describe(facts: RecoverFacts) -> Document:
    """The report of a run, its measured times included."""
    record, recovery = facts.record, facts.recovery
    request = Table(["what", "value"], [["model", facts.model], *_asked(recovery)], "What was asked for", numbers=False)
    again = f"The same as a recipe, also in {RECIPE}; secateur recover --recipe {RECIPE} -o OUT repeats the run:"
    sizes = [counts_table(facts.achieved), *([sizes_table(record)] if _was_cut(record) else [])]
    follows = [["training text", recovery["data"]["sha256"]]]
    hashes = Table(["of", "value"], follows, "What it follows from", numbers=False)
    sections = [
        Section("Request", [request, Paragraph(again), Listing(facts.recipe)]),
        Section("Quality", _quality(facts.perplexity)),
        Section("Learning curve", _curve(recovery)),
        Section("Sizes", sizes),
        *closing(record, facts.run, hashes),
    ]
    before, after = (recovery["training"]["validation"][key] for key in ("before", "after"))
    told = "" if before is None else f"; cross entropy of held-back data {before:.4f} before, {after:.4f} after"
    lead = f"{recovery['requested']['method']}, {recovery['training']['steps']} steps{told}."
    return Document("Secateur report", lead, sections)


def write_report(folder: Path, facts: RecoverFacts) -> None:
    """Write the report as Markdown and as HTML."""
    write_document(describe(facts), folder / REPORT, folder / PAGE)
