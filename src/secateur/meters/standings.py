"""From the cells of a comparison to what they say: seeds averaged, methods judged at equal size in each layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.meters.counts import remaining
from secateur.meters.pareto import Point, judge, mean_log

Record = Mapping[str, Any]


def summarise(cells: Iterable[Record]) -> list[dict[str, Any]]:
    """One line per method, layout and ratio, the seeds together.

    Sizes, times and speeds are means; the perplexity has the geometric ``mean`` and the range of the seeds, None where
    one is not finite; memory is the largest. Without a finished seed, ``state`` and ``why`` are all there is.
    """
    groups: dict[tuple[str, str, float], list[Record]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["layout"], cell["ratio"]), []).append(cell)
    return [
        {"method": method, "layout": layout, "ratio": ratio, **_together(members)}
        for (method, layout, ratio), members in groups.items()
    ]


def _together(members: Sequence[Record]) -> dict[str, Any]:
    done = [cell for cell in members if cell["state"] == "done"]
    failed = [cell for cell in members if cell["state"] == "failed"]
    if not done:
        first = (failed or members)[0]
        return {"state": first["state"], "why": first["why"], "seeds": 0, "failed": len(failed)}
    found = [cell["perplexity"] for cell in done]
    figures: dict[str, float | None] = dict.fromkeys(("mean", "least", "most"))
    if None not in found:
        figures = {"mean": math.exp(mean_log(found)), "least": min(found), "most": max(found)}
    return {
        "state": "done",
        "seeds": len(done),
        "failed": len(failed),
        "params": statistics.fmean(remaining(cell["achieved"]) for cell in done),
        "removed": statistics.fmean(cell["removed"] for cell in done),
        "perplexity": figures,
        "seconds": statistics.fmean(cell["seconds"] for cell in done),
        "prefill": _speed(done, "prefill"),
        "decode": _speed(done, "decode"),
        "peak_rss_bytes": max(cell["peak_rss_bytes"] for cell in done),
        "loads_in": done[0]["loads_in"],
    }


def _speed(done: Sequence[Record], what: str) -> dict[str, float | None]:
    """Tokens per second, and how many times those of the dense model beside it."""
    rates = [cell["speed"]["pruned"][what] for cell in done]
    if None in rates:
        return {"tokens_per_second": None, "ratio": None}
    ratios = statistics.fmean(cell["speed"]["ratio"][what] for cell in done)
    return {"tokens_per_second": statistics.fmean(rates), "ratio": ratios}


def points_of(summary: Iterable[Record], layout: str) -> dict[str, list[Point]]:
    """Points of every method in a layout, as (parameters, log-perplexity); a perplexity that is not finite counts as
    infinite."""
    found: dict[str, list[Point]] = {}
    for line in summary:
        if line["layout"] == layout:
            points = found.setdefault(line["method"], [])
            if line["state"] == "done":
                mean = line["perplexity"]["mean"]
                points.append((line["params"], math.inf if mean is None else math.log(mean)))
    return found


def judgement(
    dense: Record, summary: Sequence[Record], layouts: Iterable[str], ratios: Iterable[float], baseline: str
) -> list[dict[str, Any]]:
    """For every ratio and layout, the methods read at the parameters that the ratio asks for.

    Args:
        dense: ``params`` and ``perplexity`` of the uncut model.
        summary: of :func:`summarise`.
        baseline: the method to beat.

    Returns:
        Per ratio and layout: ``params``, ``best`` (None without any figure), and by method its ``perplexity`` (None
        where it did not reach far enough), ``beyond`` and ``better_than_random``.
    """
    origin = (dense["params"], math.inf if dense["perplexity"] is None else math.log(dense["perplexity"]))
    verdicts = []
    for ratio in ratios:
        for layout in layouts:
            wanted = dense["params"] * (1 - ratio)
            read = judge(origin, points_of(summary, layout), baseline, wanted)
            methods = {
                name: {
                    "perplexity": None if reading is None else reading.perplexity,
                    "beyond": reading is not None and reading.beyond,
                    "better_than_random": better,
                }
                for name, (reading, better) in read.items()
            }
            ranked = sorted((reading.value, name) for name, (reading, _) in read.items() if reading is not None)
            best = ranked[0][1] if ranked else None
            verdicts.append({"ratio": ratio, "layout": layout, "params": wanted, "best": best, "methods": methods})
    return verdicts
