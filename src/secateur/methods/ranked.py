"""How many weights every matrix keeps by one ranking of their scores, which lie on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from secateur.budgets import densities
from secateur.budgets.densities import Counts, Shape
from secateur.budgets.thresholds import ranked_counts
from secateur.methods.base import Study


def summary_of(study: Study, name: str) -> Tensor:
    """The one summary of that name."""
    return next(iter(study.summaries[name]))


def ranked(
    study: Study, shapes: Mapping[str, Shape], total: int, units: Sequence[Sequence[str]], least: float
) -> Counts:
    """Counts from one ranking within each unit; the units share the total in proportion to their sizes.

    Args:
        study: has the scores of every matrix as a summary.
        shapes: of the matrices.
        total: weights that stay.
        units: names of the matrices that are ranked together.
        least: share of all these weights that every matrix keeps.
    """
    caps = {name: rows * columns for name, (rows, columns) in shapes.items()}
    even, floor = densities.uniform(shapes, total), int(least * sum(caps.values()))

    def rank(some: Mapping[str, int], count: int) -> Counts:
        def scores() -> Iterator[tuple[str, Tensor]]:
            return ((name, summary_of(study, name)) for name in some)

        return ranked_counts(scores, count)

    counts: Counts = {}
    for unit in units:
        some = {name: caps[name] for name in unit}
        counts |= densities.with_floor(rank, some, sum(even[name] for name in unit), floor)
    return counts
