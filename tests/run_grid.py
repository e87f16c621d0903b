"""The whole grid, every method x every family x all options, as tables in docs/grid.md.

With the argument ``modules`` only the methods for modules, and their section.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

import graph_grid
import grid
import models
import secateur
from secateur.reports.markdown import table

_MODULES = "## Any module"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "grid.md"


def cell_text(cell: grid.Cell) -> str:
    """``ok``, ``refused (n)`` or ``FAILED``; a failure's traceback goes to standard error."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return grid.run_cell(cell, Path(temporary))
        except Exception:
            traceback.print_exc()
            return "FAILED"


def module_text(cell: graph_grid.Cell) -> str:
    """The same of a cell of the grid of modules."""
    try:
        return graph_grid.run_cell(cell)
    except Exception:
        traceback.print_exc()
        return "FAILED"


def module_section(results: Mapping[graph_grid.Cell, str]) -> str:
    """Methods for modules, one row each for their options, by network."""
    rows: dict[str, list[str]] = {}
    for cell, text in results.items():
        rows.setdefault(cell.row, [f"`{cell.row}`"]).append(text)
    failed = sum(text == "FAILED" for text in results.values())
    parts = [
        "Every method for modules x its options x small networks with random norms in float64, cut by about 30 % of "
        f"their parameters: {len(results)} cells, {failed} failed. Written by `python tests/run_grid.py modules` or "
        f"`make grid` (secateur {secateur.__version__}, torch {torch.__version__}).",
        "A cell is `ok` when the whole network with the result's numbers where something stays, and zeros elsewhere, "
        f"computes what the smaller one does, to {graph_grid.BOUND:g} (blocks that went are left out of its run); "
        "parameters and FLOPs reported are those counted from the smaller module; a second run gives the same bits; "
        "the module passed in is untouched; and a ratio of 0 gives an equal copy.",
        table(["method, options", *graph_grid.NETS], list(rows.values())),
    ]
    return "\n\n".join(parts)


def with_modules(page: str, section: str) -> str:
    """The page with its section on modules made anew."""
    return f"{page.partition(_MODULES)[0].rstrip()}\n\n{_MODULES}\n\n{section}\n"


def document(results: Mapping[grid.Cell, str], seconds: float) -> str:
    """The page; reasons of refusals become footnotes."""
    reasons = list(dict.fromkeys(text.partition(": ")[2] for text in results.values() if ": " in text))

    def shown(cell: grid.Cell) -> str:
        kind, _, reason = results.get(cell, "").partition(": ")
        return f"{kind} ({reasons.index(reason) + 1})" if reason else kind

    rows = {cell.row: replace(cell, family="") for cell in grid.method_cells()}
    by_method = [[f"`{name}`", *(shown(replace(row, family=f)) for f in grid.FIRST)] for name, row in rows.items()]
    columns = {cell.row: replace(cell, family="") for cell in grid.family_cells()}
    heads = [name.removeprefix("magnitude-spaces=") for name in columns]
    by_family = [[f"`{f}`", *(shown(replace(column, family=f)) for column in columns.values())] for f in models.ALL]
    failed = sum(text == "FAILED" for text in results.values())
    parts = [
        "# The grid",
        "Every family x every space x both layouts (by magnitude), every method x every family, and every method x the "
        f"first families x all its options, on tiny random float64 models: {len(results)} cells, {failed} failed, "
        f"{seconds:.0f} s. Written by `make grid` (secateur {secateur.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}).",
        "A cell is `ok` when the written model computes what the dense one computes with the removed units silenced "
        f"by hooks (to {grid.SELECTION:g} with float64 norms, to {grid.ROTATION:g} with the stock ones), plain "
        "transformers loads it with no key missing or left over, the parameters reported are those of the file and of "
        "the loaded model, every hash in `secateur.json` is that of its tensor, a second run gives the same bytes, and "
        "the input is untouched. `refused` cells end with exit code 2, this reason and nothing left behind. Empty ones "
        "are not run.",
        "## Families",
        "A space is cut by magnitude in the native layout, or in the per-layer one; the other columns are methods.",
        table(["family", *heads], by_family),
        "## Methods",
        table(["method, options", *grid.FIRST], by_method),
        "## Refusals",
        "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def begin() -> None:
    """What every process does first."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)


def main() -> int:
    """Run every cell, one process per core; exit code 1 when one fails."""
    started = time.monotonic()
    cells, only_modules = grid.full_cells(), sys.argv[1:] == ["modules"]
    results: dict[grid.Cell, str] = {}
    modules = {}
    for each in graph_grid.cells(full=True):
        modules[each] = module_text(each)
        print(f"{each}: {modules[each]}", file=sys.stderr, flush=True)
    if only_modules:
        page = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(with_modules(page, module_section(modules)), encoding="utf-8")
        return int("FAILED" in modules.values())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), begin) as pool:
        for number, (cell, text) in enumerate(zip(cells, pool.map(cell_text, cells), strict=True), 1):
            results[cell] = text
            print(f"{number}/{len(cells)} {cell}: {text}", file=sys.stderr, flush=True)
    DOCUMENT.parent.mkdir(exist_ok=True)
    page = document(results, time.monotonic() - started)
    DOCUMENT.write_text(with_modules(page, module_section(modules)), encoding="utf-8")
    return int("FAILED" in (*results.values(), *modules.values()))


if __name__ == "__main__":
    sys.exit(main())
