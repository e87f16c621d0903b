"""The whole grid, every method x every family x all options, as a table in docs/grid.md."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

import grid
import models
import secateur
from secateur.reports.markdown import table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "grid.md"


def cell_text(cell: grid.Cell) -> str:
    """``ok``, ``refused (n)`` or ``FAILED``; a failure's traceback goes to standard error."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return grid.run_cell(cell, Path(temporary))
        except Exception:
            traceback.print_exc()
            return "FAILED"


def document(cells: Sequence[grid.Cell], texts: Sequence[str], seconds: float) -> str:
    """The page; reasons of refusals become footnotes."""
    reasons: list[str] = []
    shown: dict[tuple[str, str], str] = {}
    for cell, text in zip(cells, texts, strict=True):
        kind, _, reason = text.partition(": ")
        if reason and reason not in reasons:
            reasons.append(reason)
        row = str(cell).removeprefix(cell.family + "-").replace("-", " ", 1).replace("-", ", ")
        shown[row, cell.family] = f"{kind} ({reasons.index(reason) + 1})" if reason else kind
    rows = list(dict.fromkeys(row for row, _ in shown))
    body = [[f"`{row}`", *(shown[row, family] for family in models.ALL)] for row in rows]
    failed = sum(text == "FAILED" for text in texts)
    parts = [
        "# The grid",
        f"Every method x every family x its options on tiny random float64 models: {len(cells)} cells, "
        f"{failed} failed, {seconds:.0f} s. Written by `make grid` (secateur {secateur.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}).",
        "A cell is `ok` when the written model computes what the dense one computes with the removed units silenced "
        f"by hooks (to {grid.SELECTION:g} with float64 norms, to {grid.ROTATION:g} with the stock ones), plain "
        "transformers loads it with no key missing or left over, the parameters reported are those of the file and of "
        "the loaded model, every hash in `secateur.json` is that of its tensor, a second run gives the same bytes, and "
        "the input is untouched. `refused` cells end with exit code 2, this reason and nothing left behind.",
        table(["method, options", *models.ALL], body),
        "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> int:
    """Run every cell; exit code 1 when one fails."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    started = time.monotonic()
    cells = grid.full_cells()
    texts = []
    for number, cell in enumerate(cells, 1):
        texts.append(cell_text(cell))
        print(f"{number}/{len(cells)} {cell}: {texts[-1]}", file=sys.stderr, flush=True)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(cells, texts, time.monotonic() - started), encoding="utf-8")
    return int("FAILED" in texts)


if __name__ == "__main__":
    sys.exit(main())
