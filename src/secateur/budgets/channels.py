"""How many channels of each space stay, so that a network comes nearest to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from secateur.budgets.targets import Target
from secateur.errors import InternalError, refuse
from secateur.graph.spaces import ChannelSpace, Graph

Ranking = Literal["global", "isomorphic", "local"]
Units = dict[str, list[int]]
"""Units that go, by the name of their space."""
FLOPS_PER_MAC = 2


def choose(
    graph: Graph,
    scores: Mapping[str, Tensor],
    target: Target,
    ranking: Ranking = "global",
    floor: float = 0.05,
    quantum: int = 1,
    tolerance: float = 0.02,
    way: float = 1.0,
) -> Units:
    """Units with the lowest scores, as many as the target asks for; the nearest size, of two equal ones the smaller.

    Args:
        graph: gives the costs.
        scores: one number per unit of every space that may be cut, higher = keep.
        target: what shall remain of the params, flops, bytes or activation; a latency is for :class:`Timed`.
        ranking: what a unit competes with: all others, those of spaces alike, those of its own space.
        floor: share of the units that every space keeps; at least one stays.
        quantum: what stays of a cut space is a multiple of it.
        tolerance: how far from the target the nearest size may be, as a share of what is there.
        way: how much of the way from the whole network to the target; before its end the nearest size will do.

    Raises:
        RequestError: another measure, or a target that is not reached; names the nearest.
    """
    spaces = [graph.space(name) for name in scores]
    order = _order(spaces, scores, ranking)

    def cost(units: Units) -> int:
        return remaining(graph, target.measure, units)

    full = cost({})
    wanted = full + way * (target.of(full) - full)
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(_taken(spaces, order[:middle], floor, quantum)) > wanted else (low, middle)
    pair = [_taken(spaces, order[:count], floor, quantum) for count in (high, low)]
    best = min(pair, key=lambda units: abs(cost(units) - wanted))
    off = abs(cost(best) - wanted) / full
    if off > tolerance and way >= 1:
        refuse(
            "target-out-of-reach",
            f"target {target}",
            f"the nearest size has {cost(best) / full:.3f} of the {target.measure}",
            "ask for that, or let more spaces be cut (options floor, statistics)",
        )
    return best


def remaining(graph: Graph, measure: str, units: Units) -> int:
    """What remains of a measure without some units: params, flops, bytes or activation."""
    gone = graph.gone(units)
    if measure == "params":
        return graph.costs.params(gone)
    if measure == "flops":
        return FLOPS_PER_MAC * graph.costs.macs(gone)
    if measure == "bytes":
        return graph.memory.saved(gone)
    if measure == "activation":
        return graph.memory.activation(gone)
    raise InternalError("no-measure", f"target {measure}", "no count of it is known for networks")


def counted(target: Target) -> Target:
    """A target in what can be counted: FLOPs in place of a latency."""
    return replace(target, measure="flops") if target.measure == "latency" else target


def _order(spaces: Sequence[ChannelSpace], scores: Mapping[str, Tensor], ranking: Ranking) -> list[tuple[int, int]]:
    """(space, unit) in the order in which they go; ties by space, then unit."""
    keys = [scores[space.name].double().numpy() for space in spaces]
    if ranking != "global":
        leagues = [space.topology if ranking == "isomorphic" else (space.name,) for space in spaces]
        for league in dict.fromkeys(leagues):
            members = [i for i, own in enumerate(leagues) if own == league]
            together = np.concatenate([keys[i] for i in members])
            place = np.empty(len(together))
            place[np.argsort(together, kind="stable")] = (np.arange(len(together)) + 1) / len(together)
            for i, part in zip(members, np.split(place, np.cumsum([len(keys[i]) for i in members])[:-1]), strict=True):
                keys[i] = part
    owner = np.repeat(np.arange(len(spaces)), [len(key) for key in keys])
    unit = np.concatenate([np.arange(len(key)) for key in keys]) if keys else np.zeros(0, dtype=int)
    found = np.argsort(np.concatenate(keys), kind="stable") if keys else unit
    return [(int(owner[i]), int(unit[i])) for i in found]


def _taken(spaces: Sequence[ChannelSpace], order: Sequence[tuple[int, int]], floor: float, quantum: int) -> Units:
    """What goes of every space, floor and quantum kept."""
    units: dict[int, list[int]] = {}
    for owner, unit in order:
        units.setdefault(owner, []).append(unit)
    found: Units = {}
    for number, lowest in sorted(units.items()):
        space = spaces[number]
        least = max(1, int(np.ceil(floor * space.size)))
        stays = max(space.size - len(lowest), least)
        stays = min(-(-stays // quantum) * quantum, space.size)
        if stays < space.size:
            found[space.name] = sorted(lowest[: space.size - stays])
    return found
