"""A drawing of a network's operations with its spaces in colours, as SVG or as DOT text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from secateur.errors import refuse
from secateur.graph.ir import Operation, Value
from secateur.graph.layout import layered
from secateur.graph.spaces import Graph

MOST_NODES: Final = 160
"""Above this many, operations are drawn together by the modules they stand in."""
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _LINE = 190, 34, 14, 26, 16
_LEGEND = 40
_NONE: Final = "#e4e4e4"


@dataclass
class Node:
    """A box.

    Attributes:
        title, detail: its two lines.
        spaces: numbers of the spaces of what it makes, the largest first.
    """

    title: str
    detail: str
    spaces: tuple[int, ...] = ()
    steps: list[Operation] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """Boxes, and lines between them with the space of what goes there (-1: none)."""

    nodes: list[Node]
    edges: dict[tuple[int, int], int]


def draw(graph: Graph, path: str | Path, most: int = MOST_NODES) -> Path:
    """Write a drawing.

    Args:
        graph: what is drawn.
        path: ``.svg``, or ``.dot`` / ``.gv`` for Graphviz.
        most: boxes; larger networks are drawn module by module.

    Raises:
        RequestError: another kind of file, or no such folder.
    """
    path = Path(path)
    writers = {".svg": _svg, ".dot": _dot, ".gv": _dot}
    if path.suffix not in writers:
        refuse(
            "bad-drawing", f"a drawing {path.name}", f"{path.suffix or 'no suffix'} is no kind of it", ".svg or .dot"
        )
    if not path.parent.is_dir():
        refuse("bad-drawing", f"a drawing {path}", "there is no such folder")
    path.write_text(writers[path.suffix](graph, picture(graph, most)), encoding="utf-8")
    return path


def picture(graph: Graph, most: int = MOST_NODES) -> Picture:
    """The boxes of a network: single operations, or, where those are too many, runs of them in one module."""
    steps = list(_running(graph))
    depth = max((len(_path(step)) for step in steps), default=0)
    groups = [[step] for step in steps]
    while len(groups) > most and depth > 0:
        groups = _together(steps, depth)
        depth -= 1
    number = _numbers(graph)
    nodes = [_node(graph, group, number) for group in groups]
    maker: dict[Value, int] = {}
    for value in graph.network.inputs:
        maker[value] = len(nodes)
        nodes.append(Node("input", _shape(value)))
    order = [*range(len(groups), len(nodes)), *range(len(groups))]  # inputs first
    place = {old: new for new, old in enumerate(order)}
    edges: dict[tuple[int, int], int] = {}
    for index, group in enumerate(groups):
        for step in group:
            for value in step.inputs.values():
                if value in maker and maker[value] != index:
                    spaces = _spaces(graph, [value], number)
                    edges[place[maker[value]], place[index]] = spaces[0] if spaces else -1
            maker |= dict.fromkeys(step.outputs, index)
    return Picture([nodes[old] for old in order], edges)


def _running(graph: Graph) -> Iterator[Operation]:
    """Operations that what enters the network goes through; not those that prepare the state."""
    reached = set(graph.network.inputs)
    for step in graph.network.operations:
        if reached.intersection(step.inputs.values()):
            reached.update(step.outputs)
            yield step


def _path(step: Operation) -> list[str]:
    """The modules that an operation stands in, from the outermost."""
    return step.path.split(".") if step.path else []


def _together(steps: Sequence[Operation], depth: int) -> list[list[Operation]]:
    """Runs of operations whose modules have the first ``depth`` parts of their path in common."""
    groups: list[list[Operation]] = []
    for step in steps:
        key = _path(step)[:depth]
        if groups and key and _path(groups[-1][-1])[:depth] == key:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _numbers(graph: Graph) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The space of every atom; -1 where there is none."""
    found = np.full(graph.atoms, -1, dtype=np.int64)
    for number, space in enumerate(graph.spaces):
        found[np.concatenate(list(space.classes))] = number
    found[0] = -1
    return found


def _spaces(
    graph: Graph, values: Sequence[Value], number: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[int, ...]:
    """Numbers of the spaces that some tensors have axes of, those with most positions first."""
    counts: Counter[int] = Counter()
    for value in values:
        for axis in graph.values.get(value, ()):
            counts.update(number[axis][number[axis] >= 0].tolist())
    return tuple(space for space, _ in counts.most_common())


def _node(graph: Graph, group: list[Operation], number: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Node:
    last = group[-1]
    named = [next((v.name for v in step.inputs.values() if v.is_state), "").rpartition(".")[0] for step in group]
    title = next((name for name in (last.place, *named) if name), "") if len(group) == 1 else _common(group)
    kinds = list(dict.fromkeys(step.source or step.op for step in group))
    detail = " ".join(kinds[:3]) + (" ..." if len(kinds) > 3 else "")
    made = last.outputs[:1]
    return Node(title or kinds[-1], f"{detail} {_shape(made[0])}", _spaces(graph, made, number), group)


def _common(group: Sequence[Operation]) -> str:
    """The longest path that all modules of a group share."""
    paths = [_path(step) for step in group]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    return ".".join(shared)


def _shape(value: Value) -> str:
    return "x".join(map(str, value.shape)) or "()"


def _colour(space: int, light: int = 78) -> str:
    """Hues a golden angle apart: neighbours differ."""
    return f"hsl({space * 137.508 % 360:.0f},{65 if space % 2 else 85}%,{light - 8 * (space // 2 % 2)}%)"


def _short(text: str, most: int = 30) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]


def _svg(graph: Graph, drawn: Picture) -> str:
    layout = layered(len(drawn.nodes), list(drawn.edges))
    left = min((x for route in layout.routes.values() for x, _ in route), default=0.0)
    left = min([left, *(x for x, _ in layout.places)])
    right = max([x for x, _ in layout.places] + [x for route in layout.routes.values() for x, _ in route])
    legend = 320
    rows = max((y for _, y in layout.places), default=0) + 1
    shown = graph.spaces[:_LEGEND]
    width = int((right - left + 1) * (_WIDTH + _GAP_X)) + legend + 30
    height = max(rows * (_HEIGHT + _GAP_Y) + 20, (len(shown) + 3) * _LINE + 30)

    def at(x: float, y: int) -> tuple[float, float]:
        return legend + 20 + (x - left + 0.5) * (_WIDTH + _GAP_X), 20 + y * (_HEIGHT + _GAP_Y)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(graph, len(shown)),
        *(_line(layout.routes[edge], space, at) for edge, space in sorted(drawn.edges.items())),
    ]
    for node, (x, y) in zip(drawn.nodes, layout.places, strict=True):
        lines += _box(node, *at(x, y))
    return "\n".join([*lines, "</svg>\n"])


def _legend(graph: Graph, count: int) -> Iterator[str]:
    yield '<text x="10" y="20" font-weight="bold">spaces (units, parameters in them)</text>'
    for number, space in enumerate(graph.spaces[:count]):
        y = 24 + number * _LINE
        share = graph.reachable([space]) / max(graph.parameters(), 1)
        text = f"{_short(space.name, 34)}: {space.size}, {share:.1%}" + (" (statistics)" if space.flags else "")
        yield f'<rect x="10" y="{y}" width="14" height="12" fill="{_colour(number)}" stroke="#888"/>'
        yield f'<text x="30" y="{y + 10}">{escape(text)}<title>{escape(space.name)}</title></text>'
    end = 34 + count * _LINE
    if count < len(graph.spaces):
        yield f'<text x="10" y="{end}">and {len(graph.spaces) - count} more</text>'
    yield f'<text x="10" y="{end + _LINE}" fill="#666">grey: nothing of it can be cut</text>'


def _line(route: Sequence[tuple[float, int]], space: int, at: Callable[[float, int], tuple[float, float]]) -> str:
    """A smooth line through the points of an edge."""
    points = [at(x, y) for x, y in route]
    path = f"M {points[0][0]:.0f} {points[0][1] + _HEIGHT:.0f}"
    for number, ((x0, y0), (x1, y1)) in enumerate(pairwise(points), 2):
        middle = (y0 + _HEIGHT + y1) / 2
        path += f" C {x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"
        path += f" V {y1 + _HEIGHT:.0f}" if number < len(points) else ""
    colour = "#aaaaaa" if space < 0 else _colour(space, 55)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _box(node: Node, x: float, y: float) -> Iterator[str]:
    """A box, striped where it holds several spaces."""
    left, stripes = x - _WIDTH / 2, node.spaces[:8] or (-1,)
    step = _WIDTH / len(stripes)
    tip = f"{node.title}: {node.detail}"
    yield f"<g><title>{escape(tip)}</title>"
    for number, space in enumerate(stripes):
        fill = _NONE if space < 0 else _colour(space)
        yield f'<rect x="{left + number * step:.1f}" y="{y:.0f}" width="{step:.1f}" height="{_HEIGHT}" fill="{fill}"/>'
    yield f'<rect x="{left:.1f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="3" fill="none" stroke="#555"/>'
    yield f'<text x="{x:.0f}" y="{y + 14:.0f}" text-anchor="middle">{escape(_short(node.title))}</text>'
    detail = node.detail if len(node.detail) <= 36 else node.detail[:35] + "…"
    yield f'<text x="{x:.0f}" y="{y + 27:.0f}" text-anchor="middle" fill="#444">{escape(detail)}</text></g>'


def _dot(graph: Graph, drawn: Picture) -> str:
    """Text for Graphviz, colours as numbers of spaces."""
    lines = ["digraph network {", '  node [shape=box, style="filled", fontname="sans-serif", fontsize=10];']
    for number, node in enumerate(drawn.nodes):
        names = ", ".join(graph.spaces[space].name for space in node.spaces)
        colour = f"{node.spaces[0] * 137.508 % 360 / 360:.3f} 0.35 0.95" if node.spaces else "0 0 0.9"
        label = f"{node.title}\\n{node.detail}".replace('"', "'")
        lines.append(f'  n{number} [label="{label}", fillcolor="{colour}", tooltip="{names or "nothing to cut"}"];')
    lines += [f"  n{start} -> n{end};" for start, end in sorted(drawn.edges)]
    return "\n".join([*lines, "}\n"])
