"""A chart without its drawing: in words, and as a table."""

from __future__ import annotations

from secateur.plans.chart import Chart
from secateur.reports.document import Table

_FEW = 6  # values that are all said


def clean(words: str) -> str:
    """One line of what can be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())


def number(value: float) -> str:
    """A number as short as a tick needs it."""
    size = abs(value)
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if sign == 'k' else unit):.4g}{sign}"
    return f"{value:.4g}"


def describe(chart: Chart) -> str:
    """A chart in words: its axes, and where each series begins, ends and ranges."""
    said = []
    for name, points in chart.series.items():
        ys = [y for _, y in points]
        if chart.labels and len(points) <= _FEW:
            said.append(", ".join(f"{label} {number(y)}" for label, y in zip(chart.labels, ys, strict=False)))
        else:
            said.append(f"{name}: {len(ys)} values, from {number(min(ys))} to {number(max(ys))}, last {number(ys[-1])}")
    mark = f" Marked: {chart.mark[1]}." if chart.mark else ""
    return f"{chart.title}: {chart.y} over {chart.x}. {'; '.join(said)}.{mark}"


def numbers(chart: Chart) -> Table:
    """The points of a chart as a table, one row per place along x."""
    places: dict[float, dict[str, float]] = {}
    for name, points in chart.series.items():
        for x, y in points:
            places.setdefault(x, {})[name] = y
    order = places if chart.kind == "bars" else sorted(places)
    rows = []
    for index, x in enumerate(order):
        first = chart.labels[index] if index < len(chart.labels) else f"{x:.6g}"
        found = places[x]
        rows.append([first, *(f"{found[name]:.6g}" if name in found else "-" for name in chart.series)])
    return Table([chart.x, *chart.series], rows, f"{chart.title}: {chart.y}")
