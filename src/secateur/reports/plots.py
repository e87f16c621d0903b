"""Charts drawn by matplotlib (the extra ``plots``) as SVG that belongs to the page around it.

Words stay text in the page's font. Lines and words take the page's ink, gridlines its ``--rule`` and series its
``--c0`` ... ``--c7``, so that a drawing follows light, dark and print; beyond these eight, lines differ in marker and
dashes too. The same chart gives the same bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from io import BytesIO
from typing import Any, Final
from xml.etree import ElementTree

from secateur.plans.chart import Chart
from secateur.reports.words import clean, describe, number

WIDTH, HEIGHT = 560, 320
_FEW_BARS: Final = 6  # that have room for their values
HINT: Final = "The charts are drawn where matplotlib is installed: pip install 'secateur[plots]'."
_COLOURS: Final = 8
_INK, _RULE, *_SERIES = (f"#0000{i:02x}" for i in range(1, _COLOURS + 3))  # stand for the page's colours
_CSS = {_INK: "currentColor", _RULE: "var(--rule)", **{c: f"var(--c{i})" for i, c in enumerate(_SERIES)}}
_DASHES = ("solid", (0, (3.5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MARKERS: Final = ("o", "s", "^")
_LEGEND_ROWS: Final = 4  # that the drawing has room for
_ROW, _FOR_MANY = 17, 160  # height of another row, and of the room that so many lines need
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "secateur", "font.sans-serif": ["DejaVu Sans"], "font.size": 12,
    "text.parse_math": False, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
    "ytick.minor.size": 0, "axes.spines.top": False, "axes.spines.left": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": _RULE, "legend.frameon": False,
}  # fmt: skip


_wanted: ContextVar[bool] = ContextVar("drawings", default=True)


@contextmanager
def no_drawings() -> Iterator[None]:
    """Within it nothing is drawn: for reports that nobody will read."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def can_draw() -> bool:
    """Whether matplotlib is installed, and drawings are wanted."""
    return _wanted.get() and find_spec("matplotlib") is not None


def draw(chart: Chart, identity: str) -> str:
    """A chart as an SVG element, every word of it escaped.

    Args:
        identity: unique in the page; the names inside the drawing begin with it.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():  # whatever the caller's settings are
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has its own fonts
        columns = min(max(1, WIDTH // (7 * max(map(len, chart.series)) + 60)), len(chart.series))
        more = max(0, -(-len(chart.series) // columns) - _LEGEND_ROWS)  # the legend must not eat the drawing
        height = HEIGHT + (_FOR_MANY + _ROW * more if more else 0)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        (_bars if chart.kind == "bars" else _lines)(axes, chart)
        axes.set(xlabel=clean(chart.x), ylabel=clean(chart.y))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        if len(chart.series) > 1:
            figure.legend(loc="outside upper left", ncols=columns, handlelength=2.5)
        for artist in axes.findobj():
            artist.set_clip_on(False)  # nothing lies outside, and clipping would need references
        stream = BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _inline(stream.getvalue(), identity, clean(describe(chart)))


def _lines(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import LogLocator

    xs = [x for points in chart.series.values() for x, _ in points]
    ys = [y for points in chart.series.values() for _, y in points if y > 0 or not chart.logarithmic] or [0.1, 1.0]
    for index, (name, points) in enumerate(chart.series.items()):
        drawn = [(x, y) for x, y in sorted(points) if y > 0 or not chart.logarithmic]
        turn = index // _COLOURS
        marker = _MARKERS[turn % len(_MARKERS)] if len(drawn) <= 24 else ""
        dashes = _DASHES[(index + turn) % len(_DASHES)]  # of lines in one colour, no two have the same
        look = {"color": _SERIES[index % _COLOURS], "linestyle": dashes, "marker": marker}
        axes.plot(
            *zip(*drawn, strict=True) if drawn else ([], []), label=clean(name), linewidth=2, markersize=5, **look
        )
    axes.locator_params(axis="x", nbins=6, integer=_whole(xs))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(ys) < 1000 * min(ys) else (1,)))
        axes.minorticks_off()
    elif 0 <= min(ys) < 0.3 * max(ys):
        axes.set_ylim(bottom=0)
    if chart.mark is not None:
        at, word = chart.mark
        side, where = (-6, "right") if at > (min(xs) + max(xs)) / 2 else (6, "left")
        axes.axvline(at, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(clean(word), (at, 1), (side, -4), ("data", "axes fraction"), "offset points", ha=where, va="top")


def _bars(axes: Any, chart: Chart) -> None:
    import numpy as np

    order = {x: i for i, x in enumerate(dict.fromkeys(x for points in chart.series.values() for x, _ in points))}
    count, few = len(chart.series), len(order) * len(chart.series) <= _FEW_BARS
    thick = min((0.8 if len(order) < 120 else 1) / count, 0.15 * max(len(order), 2))
    for index, (name, points) in enumerate(chart.series.items()):
        left = np.array([order[x] for x, _ in points]) + (index - count / 2) * thick
        heights = np.array([y for _, y in points])
        if few:  # where the places are what is compared, each has its own colour
            compared = count == 1 and len(chart.labels) > 0
            colour = _SERIES[index % _COLOURS]
            colours = [_SERIES[order[x]] for x, _ in points] if compared else colour
            drawn = axes.bar(left, heights, thick, align="edge", color=colours, label=clean(name))
            axes.bar_label(drawn, fmt=number, padding=3)
            axes.margins(y=0.1)
        else:  # one path for all of them: a bar each would be ten times the bytes
            outline = np.full(2 * len(points) - 1, np.nan)
            outline[::2] = heights
            edges = np.stack([left, left + thick], 1).ravel()
            axes.stairs(outline, edges, fill=True, color=_SERIES[index % _COLOURS], linewidth=0, label=clean(name))
    axes.locator_params(axis="y", integer=_whole(y for points in chart.series.values() for _, y in points))
    every = -(-len(order) // 12)
    words = [clean(chart.labels[i]) if i < len(chart.labels) else number(float(f"{x:.3g}")) for x, i in order.items()]
    axes.set_xticks(range(0, len(order), every), words[::every])
    axes.set_xlim(-0.6, len(order) - 0.4)


def _whole(values: Iterable[float]) -> bool:
    return all(value == int(value) for value in values)


def _inline(drawing: bytes, identity: str, label: str) -> str:
    """An SVG file as an element of a page: no size of its own, the page's colours and font, names of its own."""
    root = ElementTree.fromstring(drawing)
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag, element.tail, element.text = element.tag.rpartition("}")[2], None, (element.text or "").strip()
        given, element.attrib = element.attrib, {}
        for key, value in given.items():
            if key == "id" and element.tag != "g":  # that of a group is never referred to
                element.set("id", f"{identity}-{value}")
            elif key.endswith("}href"):
                element.set("href", f"#{identity}-{value[1:]}")
            elif key != "id":
                short = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split())).replace("'DejaVu Sans'", "system-ui")
                element.set(key, re.sub("#0000[0-9a-f]{2}", lambda found: _CSS[found[0]], short))
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "chart", "role": "img", "aria-label": label}
    root.attrib |= {"fill": "currentColor", "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")
