"""Charts as plain numbers: what a method wants drawn in the report; nothing here knows how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from secateur.errors import InternalError

Point = tuple[float, float]
MAX_POINTS = 512
MAX_SERIES = 24


@dataclass(frozen=True)
class Chart:
    """One drawing: named series of (x, y) points, JSON-able and of bounded size.

    Attributes:
        title: what is seen.
        x, y: names of the axes, with units.
        series: points by name; at most ``MAX_SERIES`` of at most ``MAX_POINTS``, all finite.
        kind: ``lines`` through the points, or ``bars`` side by side in the order of the points.
        labels: names of the places along x, instead of numbers (bars).
        logarithmic: whether the y axis is; points that are not positive are not drawn then.
        mark: an x that is worth a vertical line, with the word for it (lines).
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    kind: Literal["lines", "bars"] = "lines"
    labels: Sequence[str] = ()
    logarithmic: bool = False
    mark: tuple[float, str] | None = None

    def __post_init__(self) -> None:
        most = max((len(points) for points in self.series.values()), default=0)
        if not most or len(self.series) > MAX_SERIES or most > MAX_POINTS:
            found = f"{len(self.series)} series of up to {most} points"
            raise InternalError("bad-chart", f"chart {self.title!r}", f"{found}, limits {MAX_SERIES} and {MAX_POINTS}")
        if not all(math.isfinite(value) for points in self.series.values() for point in points for value in point):
            raise InternalError("bad-chart", f"chart {self.title!r}", "a value is not finite")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the series in their order; ``Chart.from_dict`` gives the same chart back."""
        return {**asdict(self), "series": list(self.series.items())}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Chart:
        series = {name: [(x, y) for x, y in points] for name, points in record["series"]}
        mark = record["mark"]
        mark = None if mark is None else (mark[0], mark[1])
        return cls(**{**record, "series": series, "mark": mark, "labels": tuple(record["labels"])})


def points_of(values: Tensor, first: int = 0, limit: int = 256) -> list[Point]:
    """The points (index, value) of a vector [n], six digits each; beyond ``limit`` evenly spaced ones, ends included.

    Args:
        first: index of the first value.
    """
    count = len(values)
    chosen = range(count) if count <= limit else (i * (count - 1) // (limit - 1) for i in range(limit))
    return [(i + first, float(f"{float(values[i]):.6g}")) for i in chosen]
