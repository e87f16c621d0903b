"""How methods are judged at equal size: log-perplexity, linear in achieved parameters between what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

Point = tuple[float, float]
"""Parameters and log-perplexity."""

BEYOND: Final = 0.01
"""Share of the dense parameters by which a line may be read past its smallest model: a width that is solved for misses
its target by half a step, and steps are at most 1 % wherever the architecture admits it."""


@dataclass(frozen=True)
class Reading:
    """A line read at a size.

    Attributes:
        value: log-perplexity.
        beyond: whether the size lies past the smallest model, on the last segment prolonged.
    """

    value: float
    beyond: bool = False

    @property
    def perplexity(self) -> float:
        return math.exp(self.value) if self.value < 700 else math.inf


def mean_log(perplexities: Sequence[float]) -> float:
    """Mean of the logarithms; infinite where one is."""
    return sum(math.log(value) for value in perplexities) / len(perplexities)


def pareto_line(dense: Point, points: Sequence[Point]) -> list[Point]:
    """The points of a method and the dense one by ascending parameters; points of equal size become their mean."""
    by_size: dict[float, list[float]] = {}
    for params, value in points:
        by_size.setdefault(params, []).append(value)
    by_size[dense[0]] = [dense[1]]
    return [(params, sum(values) / len(values)) for params, values in sorted(by_size.items())]


def read_line(line: Sequence[Point], params: float, slack: float = 0.0) -> Reading | None:
    """Log-perplexity of a line at a size.

    Args:
        line: as :func:`pareto_line` gives it.
        params: where to read.
        slack: parameters by which the last segment may be prolonged towards smaller models.

    Returns:
        None where the method did not reach far enough, or the perplexities around are not finite.
    """
    least = line[0][0]
    if len(line) < 2 or not least - slack <= params <= line[-1][0]:
        return None
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(line) if params <= pair[1][0])
    value = dict(line).get(params, y0 + (y1 - y0) * (params - x0) / (x1 - x0))
    return Reading(value, params < least) if math.isfinite(value) else None


def judge(
    dense: Point, methods: Mapping[str, Sequence[Point]], baseline: str, params: float
) -> dict[str, tuple[Reading | None, bool | None]]:
    """Every method read at one size, and whether it is better there than the baseline.

    Args:
        dense: the uncut model.
        methods: points of each method; its seeds already averaged.
        baseline: name of the method to beat.
        params: the size.

    Returns:
        By method its reading and the verdict, None where either has no figure (and for the baseline itself).
    """
    slack = BEYOND * dense[0]
    read = {name: read_line(pareto_line(dense, points), params, slack) for name, points in methods.items()}
    control = read.get(baseline)
    found: dict[str, tuple[Reading | None, bool | None]] = {}
    for name, reading in read.items():
        comparable = reading is not None and control is not None and name != baseline
        found[name] = (reading, reading.value < control.value if comparable and reading and control else None)
    return found
