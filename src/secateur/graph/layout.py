"""Places for the nodes of a drawing: layers from top to bottom, long edges led past what lies between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 8
_LANE = 0.15
"""Width of an edge that passes a layer, beside a node's 1."""

Edge = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
        places: of every node, across (in node widths) and down (in layers).
        routes: of every edge, the points that it goes through, ends included.
    """

    places: list[tuple[float, int]]
    routes: dict[Edge, list[tuple[float, int]]]


def layered(count: int, edges: Sequence[Edge]) -> Layout:
    """Lay out a graph whose edges go from smaller to larger numbers.

    Layers are longest paths from above; the order in a layer follows the neighbours' mean (Sugiyama's method), and so
    do the places, as far as nodes do not overlap.
    """
    edges = sorted(set(edges))
    layer = [0] * count
    for start, end in edges:
        layer[end] = max(layer[end], layer[start] + 1)
    chains: dict[Edge, list[int]] = {}
    lanes: dict[Edge, int] = {}  # by node and layer: all that a node sends further down takes one way
    for start, end in edges:
        between = [(start, number) for number in range(layer[start] + 1, layer[end])]
        for lane in between:
            if lane not in lanes:
                lanes[lane] = len(layer)
                layer.append(lane[1])
        chains[start, end] = [start, *(lanes[lane] for lane in between), end]
    above, below = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for one, other in dict.fromkeys(pair for chain in chains.values() for pair in pairwise(chain)):
        below[one].append(other)
        above[other].append(one)
    rows: list[list[int]] = [[] for _ in range(max(layer, default=0) + 1)]
    for node, number in enumerate(layer):
        rows[number].append(node)
    width = [1.0 if node < count else _LANE for node in range(len(layer))]
    x = [0.0] * len(layer)
    for row in rows:
        _spread(row, [float(i) for i in range(len(row))], width, x)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = [(above if down else below)[node] or [node] for node in row]
            wanted = [sum(x[other] for other in others) / len(others) for others in near]
            order = sorted(range(len(row)), key=lambda i: (wanted[i], x[row[i]]))
            row[:] = [row[i] for i in order]
            _spread(row, [wanted[i] for i in order], width, x)
    points = [(x[node], layer[node]) for node in range(len(layer))]
    return Layout(points[:count], {edge: [points[node] for node in chain] for edge, chain in chains.items()})


def _spread(row: Sequence[int], wanted: Sequence[float], width: Sequence[float], x: list[float]) -> None:
    """Set the places of a row, in order, as near as can be to the wanted ones: runs that would overlap move as one."""
    runs: list[tuple[float, list[int], float]] = []  # sum of wanted places of the first node, members, their width
    for node, place in zip(row, wanted, strict=True):
        total, members, size = place - width[node] / 2, [node], width[node]
        while runs and runs[-1][0] / len(runs[-1][1]) + runs[-1][2] > total / len(members):
            before = runs.pop()
            total = before[0] + total - before[2] * len(members)
            members, size = before[1] + members, before[2] + size
        runs.append((total, members, size))
    for total, members, _ in runs:
        left = total / len(members)
        for node in members:
            x[node] = left + width[node] / 2
            left += width[node]
