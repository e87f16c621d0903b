"""The report of a comparison: who is best at equal size, every figure, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from secateur.plans import Chart
from secateur.plans.chart import MAX_SERIES, Point
from secateur.reports.document import Charts, Document, Paragraph, Part, Section, Table
from secateur.reports.files import write_document

REPORT: Final = "README.md"
PAGE: Final = "report.html"
_NOT_BETTER: Final = "not better than random"

Record = Mapping[str, Any]


def write_comparison(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write the report as Markdown and as HTML; returns the results with both paths."""
    shown = {**results, "report": str(folder / REPORT), "page": str(folder / PAGE)}
    write_document(describe(results), folder / REPORT, folder / PAGE)
    return shown


def describe(results: Record) -> Document:
    """The report of a comparison."""
    dense, counts = results["dense"], results["counts"]
    layouts = list(dict.fromkeys(verdict["layout"] for verdict in results["judgement"]))
    lead = (
        f"{results['model']}: {dense['params']:,} parameters, perplexity {_figure(dense['perplexity'])} on held-out "
        f"text ({dense['tokens']:,} predicted tokens, windows of {dense['context']}). "
        f"{counts['done']} models made and measured, {counts['unreachable']} not reachable, {counts['failed']} failed."
    )
    sections = [Section("Best at equal size", [Paragraph(_RULE), _winners(results)]), *_standings(results, layouts)]
    charts = [chart for layout in layouts for chart in _pareto(results, layout)]
    if charts:
        sections.append(Section("Perplexity against parameters", [Charts(charts)]))
    loads = _Marks()
    sections += [_measured(results, layout, loads) for layout in layouts]
    sections.append(Section("About the figures", [Paragraph(_UNITS), loads.table()]))
    for state, title in (("unreachable", "Not reachable"), ("failed", "Failed")):
        rows = [
            [cell["method"], cell["layout"], f"{cell['ratio']:g}", cell["seed"], cell["why"]]
            for cell in results["cells"]
            if cell["state"] == state
        ]
        if rows:
            head = ["method", "layout", "ratio", "seed", "why"]
            sections.append(Section(title, [Table(head, rows, f"{title}: cells without figures", numbers=False)]))
    sections.append(Section("Conditions", _conditions(results)))
    return Document("Methods compared", lead, sections)


_RULE: Final = (
    "Each figure is a method's log-perplexity, linear in achieved parameters between its own models of that layout "
    "and the dense one, read at the parameters that the ratio asks for. A method that did not reach so far has none; "
    "figures marked ~ lie up to 1 % of the dense parameters past its smallest model. Seeds are averaged first."
)
_UNITS: Final = (
    "Removed: share of all parameters, counted from the files. Perplexity: the geometric mean of the seeds, where "
    "there are several. Seconds: plan, cut and reload check of one prune, without its report. Memory: peak anonymous "
    "memory of the process that pruned, the interpreter included. Prefill and decode: tokens per second, and how many "
    "times those of the dense model, taken in turns in the same process."
)


# -- at equal size -----------------------------------------------------------------------------------------------------


def _standings(results: Record, layouts: Sequence[str]) -> list[Section]:
    """One section per ratio: all methods in all layouts."""
    by_ratio: dict[float, list[Record]] = {}
    for verdict in results["judgement"]:
        by_ratio.setdefault(verdict["ratio"], []).append(verdict)
    head = ["method", *(name for layout in layouts for name in (layout, f"{layout}: against random"))]
    sections = []
    for ratio, verdicts in by_ratio.items():
        rows = []
        for label in _by_rank(verdicts):
            cells = [_verdict(verdict["methods"][label], label == results["baseline"]) for verdict in verdicts]
            rows.append([label, *(text for pair in cells for text in pair)])
        title = f"Ratio {ratio:g}: at {verdicts[0]['params']:,.0f} parameters"
        sections.append(Section(title, [Table(head, rows, "Perplexity at that size, best first")]))
    return sections


def _winners(results: Record) -> Table:
    rows = []
    for verdict in results["judgement"]:
        best = verdict["best"]
        found = ["-", "-"] if best is None else [best, _verdict(verdict["methods"][best], False)[0]]
        rows.append([f"{verdict['ratio']:g}", verdict["layout"], f"{verdict['params']:,.0f}", *found])
    return Table(["ratio", "layout", "parameters", "best", "perplexity"], rows, "The best method of each layout")


def _by_rank(verdicts: Sequence[Record]) -> list[str]:
    """Labels by their best figure in any layout, those without a figure last."""

    def least(label: str) -> float:
        found = [verdict["methods"][label]["perplexity"] for verdict in verdicts]
        return min((value for value in found if value is not None), default=math.inf)

    return sorted(verdicts[0]["methods"], key=least)


def _verdict(figure: Record, baseline: bool) -> tuple[str, str]:
    """The figure, and what it is beside random units."""
    if figure["perplexity"] is None:
        return "-", "-"
    better = figure["better_than_random"]
    word = "the control" if baseline else "-" if better is None else "better" if better else _NOT_BETTER
    return f"{'~' if figure['beyond'] else ''}{_figure(figure['perplexity'])}", word


def _pareto(results: Record, layout: str) -> list[Chart]:
    """Perplexity over parameters, one line per method from the dense model on; as many drawings as the lines need."""
    dense = results["dense"]
    if dense["perplexity"] is None:
        return []
    series: dict[str, list[Point]] = {}
    for line in results["summary"]:
        if line["layout"] == layout and line["state"] == "done" and line["perplexity"]["mean"] is not None:
            points = series.setdefault(line["method"], [(float(dense["params"]), dense["perplexity"])])
            points.append((line["params"], line["perplexity"]["mean"]))
    title, lines = f"{layout[0].upper()}{layout[1:]} layout", list(series.items())
    parts = [dict(lines[first : first + MAX_SERIES]) for first in range(0, len(lines), MAX_SERIES)]
    return [
        Chart(
            title if len(parts) == 1 else f"{title} ({number} of {len(parts)})",
            "parameters",
            "held-out perplexity",
            part,
            logarithmic=True,
        )
        for number, part in enumerate(parts, 1)
    ]


# -- every figure ------------------------------------------------------------------------------------------------------


class _Marks:
    """Long texts of a table, told once each below it."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        return self._marks.setdefault(text, f"[{len(self._marks) + 1}]")

    def table(self) -> Table:
        rows = [[mark, text] for text, mark in self._marks.items()]
        return Table(["loads", "in"], rows or [["-", "-"]], "What loads the models", numbers=False)


def _measured(results: Record, layout: str, loads: _Marks) -> Section:
    """What came out of each method at each ratio, and what it costs."""
    lines = [line for line in results["summary"] if line["layout"] == layout]
    named = [[line["method"], f"{line['ratio']:g}"] for line in lines]
    quality = [[*name, *_quality(line)] for name, line in zip(named, lines, strict=True)]
    costs = [[*name, *_costs(line, loads)] for name, line in zip(named, lines, strict=True) if line["state"] == "done"]
    head = ["method", "ratio", "parameters", "removed", "perplexity", "least", "most", "seeds"]
    parts: list[Part] = [Table(head, quality, "Size and quality")]
    if costs:
        head = ["method", "ratio", "seconds", "memory, MiB", "prefill", "x dense", "decode", "x dense", "loads"]
        parts.append(Table(head, costs, "Cost and speed"))
    return Section(f"{layout[0].upper()}{layout[1:]} layout", parts)


def _quality(line: Record) -> list[str]:
    if line["state"] != "done":
        return ["not reachable" if line["state"] == "unreachable" else "failed", *["-"] * 5]
    several = line["seeds"] > 1
    spread = [_figure(line["perplexity"][key]) if several else "-" for key in ("least", "most")]
    seeds = f"{line['seeds']}, {line['failed']} failed" if line["failed"] else f"{line['seeds']}"
    sizes = [f"{line['params']:,.0f}", f"{line['removed']:.2%}"]
    return [*sizes, _figure(line["perplexity"]["mean"]), *spread, seeds]


def _costs(line: Record, loads: _Marks) -> list[str]:
    rates = []
    for what in ("prefill", "decode"):
        rate, ratio = line[what]["tokens_per_second"], line[what]["ratio"]
        rates += ["-", "-"] if rate is None else [f"{rate:,.0f}", f"{ratio:.2f}"]
    states = ", ".join(f"{runtime} {state}" for runtime, state in line["loads_in"].items())
    return [f"{line['seconds']:.2f}", f"{line['peak_rss_bytes'] / 2**20:,.0f}", *rates, loads.mark(states)]


def _figure(value: float | None) -> str:
    return "not finite" if value is None or math.isinf(value) else f"{value:.3f}" if value < 1000 else f"{value:,.0f}"


def _conditions(results: Record) -> list[Part]:
    machine = [[key, str(value)] for key, value in results["machine"].items()]
    data, asked, dense = results["data"], results["requested"], results["dense"]
    rows = [
        ["held-out text", asked["text"]],
        ["held-out text", f"SHA-256 {results['text_sha256']}"],
        ["perplexity windows", f"{dense['tokens']:,} tokens in windows of {dense['context']}"],
    ]
    if data is not None:
        rows.append(["calibration text", asked["data"]])
        rows.append(["calibration text", f"SHA-256 of the documents read {data['sha256']}"])
        rows.append(["calibration windows", f"{data['windows']} of {data['length']} tokens, seed {asked['seed']}"])
    rows.append(["Secateur", results["version"]])
    return [
        Table(["what", "value"], machine, "The machine", numbers=False),
        Table(["what", "value"], rows, "The texts", numbers=False),
    ]
