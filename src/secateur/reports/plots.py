"""Plots, where matplotlib (extra ``plots``) is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_curves(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, logarithmic: bool = True
) -> bool:
    """Draw one line per name through its (x, y) points.

    Args:
        logarithmic: whether the y axis is.

    Returns:
        Whether the file was written: False without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
