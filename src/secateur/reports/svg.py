"""Charts as SVG, drawn here rather than by a plotting library.

Such a drawing is text: it follows the page's light or dark colours, prints sharp, is read aloud, weighs a few
kilobytes, has the same bytes every time, and is there whether or not anything else is installed.
"""

from __future__ import annotations

import math
from html import escape

from secateur.plans.chart import Chart

WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 48
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_COLOURS = 8
_TICKS = 5
_FEW_BARS = 6  # that have room for their values

STYLE = """\
.chart { --c0: #53687c; --c1: #0b7a56; --c2: #b4530f; --c3: #6b48b8; --c4: #a8245f; --c5: #7d6a00; --c6: #1c6bb0;
  --c7: #444; --ink: #1d232a; --rule: #d9dee3; font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .chart { --c0: #9db2c6; --c1: #4ecb9d; --c2: #f2a065; --c3: #b9a2f2;
  --c4: #f08ab8; --c5: #d8c34f; --c6: #7fb9ee; --c7: #ccc; --ink: #e4e8ec; --rule: #3a424b; } }
@media print { .chart { --c0: #53687c; --c1: #0b7a56; --c2: #b4530f; --c3: #6b48b8; --c4: #a8245f; --c5: #7d6a00;
  --c6: #1c6bb0; --c7: #444; --ink: #000; --rule: #ccc; } }
.chart text { fill: var(--ink); } .chart .rule { stroke: var(--rule); } .chart .axis { stroke: var(--ink); }
.chart .mark { stroke: var(--ink); stroke-dasharray: 4 3; } .chart .line { fill: none; stroke-width: 2; }
""" + "".join(
    f".chart .f{i} {{ fill: var(--c{i}); }} .chart .s{i} {{ stroke: var(--c{i}); }}\n" for i in range(_COLOURS)
)


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
        if chart.labels and len(points) <= _FEW_BARS:
            said.append(", ".join(f"{label} {number(y)}" for label, y in zip(chart.labels, ys, strict=False)))
        else:
            said.append(f"{name}: {len(ys)} values, from {number(min(ys))} to {number(max(ys))}, last {number(ys[-1])}")
    mark = f" Marked: {chart.mark[1]}." if chart.mark else ""
    return f"{chart.y} over {chart.x}. {'; '.join(said)}.{mark}"


def _tag(name: str, content: str = "", /, **attributes: object) -> str:
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.2f}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{words}>{content}</{name}>" if content or name == "text" else f"<{name}{words}/>"


def _text(x: float, y: float, words: str, anchor: str = "middle", **more: object) -> str:
    return _tag("text", escape(words), x=x, y=y, text_anchor=anchor, **more)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    if high <= low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """From values to positions along one axis."""

    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        self.low, self.high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        if self.high - self.low < 1e-12 * max(1.0, abs(self.high)):
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.logarithmic else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high)
        decades = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if len(decades) > 3:
            return [10.0**i for i in decades[:: -(-len(decades) // 7)]]
        around = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [m * 10.0**i for i in around for m in (1, 2, 5) if self.low <= math.log10(m) + i <= self.high]
        return found if len(found) > 2 else [tick for tick in ticks(10**self.low, 10**self.high) if tick > 0]


def _heights(chart: Chart) -> _Scale:
    ys = [y for points in chart.series.values() for _, y in points if y > 0 or not chart.logarithmic]
    low, high = min(ys, default=0.1), max(ys, default=1.0)
    if chart.kind == "bars" or (not chart.logarithmic and 0 <= low < 0.3 * high):
        low, high = min(low, 0.0), high * 1.05 if high > 0 else 1.0
    return _Scale(low, high, HEIGHT - _BOTTOM, _TOP, chart.logarithmic)


def _frame(chart: Chart, heights: _Scale) -> list[str]:
    left, right, floor = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    found = []
    for tick in heights.ticks():
        y = heights(tick)
        found.append(_tag("line", x1=left, x2=right, y1=y, y2=y, class_="rule"))
        found.append(_text(left - 6, y + 4, number(tick), "end"))
    found.append(_tag("line", x1=left, x2=right, y1=floor, y2=floor, class_="axis"))
    found.append(_text((left + right) / 2, HEIGHT - 8, chart.x))
    middle = (_TOP + floor) / 2
    found.append(_text(14, middle, chart.y, transform=f"rotate(-90 14 {middle:.0f})"))
    return found


def _legend(chart: Chart) -> list[str]:
    if len(chart.series) < 2:
        return []
    found, x, y = [], float(_LEFT), 12
    for index, name in enumerate(chart.series):
        colour, wide = index % _COLOURS, 27 + 6.4 * len(name)
        if x > _LEFT and x + wide > WIDTH:
            x, y = float(_LEFT), y + 15
        if chart.kind == "bars":
            found.append(_tag("rect", x=x, y=y - 5, width=16, height=10, class_=f"f{colour}"))
        else:
            found.append(_tag("line", x1=x, x2=x + 22, y1=y, y2=y, class_=f"line s{colour}", **_dash(index)))
        found.append(_text(x + 27, y + 4, name, "start"))
        x += wide + 16
    return found


def _dash(index: int) -> dict[str, str]:
    dash = _DASHES[index % len(_DASHES)]
    return {"stroke_dasharray": dash} if dash else {}


def _lines(chart: Chart, heights: _Scale) -> list[str]:
    xs = [x for points in chart.series.values() for x, _ in points]
    along = _Scale(min(xs), max(xs), _LEFT + 4, WIDTH - _RIGHT - 4)
    whole = all(x == int(x) for x in xs)
    found = []
    shown = [tick for tick in along.ticks() if not whole or tick == int(tick)]
    found += [_text(along(tick), HEIGHT - _BOTTOM + 17, number(tick)) for tick in shown]
    for index, points in enumerate(chart.series.values()):
        drawn = [(along(x), heights(y)) for x, y in sorted(points) if y > 0 or not chart.logarithmic]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        found.append(_tag("polyline", points=path, class_=f"line s{index % _COLOURS}", **_dash(index)))
        if len(drawn) <= 24:
            found += [_tag("circle", cx=x, cy=y, r=3, class_=f"f{index % _COLOURS}") for x, y in drawn]
    if chart.mark is not None:
        x, word = along(chart.mark[0]), chart.mark[1]
        right = x > WIDTH / 2
        found.append(_tag("line", x1=x, x2=x, y1=_TOP, y2=HEIGHT - _BOTTOM, class_="mark"))
        found.append(_text(x - 6 if right else x + 6, _TOP + 12, word, "end" if right else "start"))
    return found


def _bars(chart: Chart, heights: _Scale) -> list[str]:
    places: dict[float, None] = dict.fromkeys(x for points in chart.series.values() for x, _ in points)
    order = {x: i for i, x in enumerate(places)}
    room = (WIDTH - _RIGHT - _LEFT) / len(order)
    thick = min(room * (0.8 if room > 4 else 1) / len(chart.series), 70)
    floor = heights(0)
    found = []
    few = len(order) * len(chart.series) <= _FEW_BARS
    every = -(-len(order) // 12)
    for x, place in order.items():
        if place % every == 0:
            word = chart.labels[place] if place < len(chart.labels) else number(float(f"{x:.3g}"))
            found.append(_text(_LEFT + (place + 0.5) * room, HEIGHT - _BOTTOM + 17, word))
    for index, points in enumerate(chart.series.values()):
        for x, y in points:
            left = _LEFT + (order[x] + 0.5) * room + (index - len(chart.series) / 2) * thick
            # where the series are places themselves, each has its own colour
            colour = (order[x] if few and len(chart.series) == 1 else index) % _COLOURS
            top = heights(y)
            found.append(_bar(left, min(top, floor), thick, abs(floor - top), colour))
            if few:
                found.append(_text(left + thick / 2, min(top, floor) - 5, number(y)))
    return found


def _bar(left: float, top: float, width: float, height: float, colour: int) -> str:
    return _tag("rect", x=left, y=top, width=width, height=height, class_=f"f{colour}")


def draw(chart: Chart, identity: str) -> str:
    """A chart as an SVG element of a page that holds ``STYLE``.

    Args:
        identity: unique in the page.
    """
    heights = _heights(chart)
    body = [
        _tag("title", escape(chart.title), id=f"{identity}-title"),
        _tag("desc", escape(describe(chart)), id=f"{identity}-desc"),
        *_frame(chart, heights),
        *_legend(chart),
        *(_bars(chart, heights) if chart.kind == "bars" else _lines(chart, heights)),
    ]
    return _tag(
        "svg",
        "\n".join(body),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="chart",
        role="img",
        aria_labelledby=f"{identity}-title {identity}-desc",
    )
