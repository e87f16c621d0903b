"""The part of the grid of methods for modules that runs in CI."""

from __future__ import annotations

import pytest

import graph_grid


@pytest.mark.parametrize("cell", graph_grid.cells(full=False), ids=str)
def test_cell(cell: graph_grid.Cell) -> None:
    graph_grid.run_cell(cell)
