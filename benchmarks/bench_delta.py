"""Delta pruning of a real pair: a model of the assets, fine-tuned on another text here, and what is left of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import secateur
from common import HERE, RESULTS, Goal, Result, conditions, parser, record, work_folder
from secateur.checkpoints import Checkpoint
from secateur.meters.perplexity import Text, perplexity

MODELS = ("stories260k-llama", "llama-docs-8m")
RATIOS = (0.9, 0.99)
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dare": ("dare", {}, True),
    "darex_q searched": ("darex_q", {"q": "search"}, True),
    "darex_q analytic": ("darex_q", {"q": "analytic"}, True),
    "darex_q learned": ("darex_q", {"q": "learned"}, True),
    "magnitude": ("magnitude", {}, False),
    "wanda": ("wanda", {}, False),
    "magnitude q searched": ("magnitude", {"q": "search"}, False),
    "wanda q searched": ("wanda", {"q": "search"}, False),
    "columns": ("structural", {"axis": "columns"}, False),
}
"""What a row of the table runs: method, options, whether a seed matters."""
PLAIN, ADAM_R = "full fine-tune", "AdamR fine-tune"
ANCHORED = ("dare", "darex_q searched", "magnitude")
"""Rows that also run on the fine-tune with AdamR."""


class Bench:
    """One pair of models and its texts.

    Args:
        folder: for everything temporary.
        small: few steps, few windows.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        assets = Path(os.environ.get("SECATEUR_ASSETS", HERE.parents[1] / "shared" / "assets"))
        small = arguments.small
        self.base = assets / "lm" / arguments.model
        if not self.base.is_dir():
            sys.exit(f"no trained models: {assets} is absent (SECATEUR_ASSETS names another folder)")
        self.train = assets / "text" / "wikitext-2" / "valid.txt"
        self.held_out = assets / "text" / "wikitext-2" / "test.txt"
        self.folder, self.steps, self.windows = folder, 10 if small else 150, 4 if small else arguments.windows
        self.small, self.name = small, "delta" if arguments.model == MODELS[0] else "delta_docs"
        self.text: Text | None = None

    def fine_tune(self, name: str, given: Path | None, **options: Any) -> Path:
        """A full fine-tune on the training text, unless one is given."""
        if given is not None:
            return given
        output = self.folder / name
        secateur.recover(
            self.base, method="full", data=self.train, steps=self.steps, length=256, output=output, options=options
        )
        return output

    def perplexity(self, folder: Path) -> float:
        """On the first windows of 256 tokens of the held-out text."""
        checkpoint = Checkpoint.open(folder)
        if self.text is None:
            self.text = Text(Text.read(str(self.held_out), checkpoint, 256).windows[: self.windows])
        return round(perplexity(checkpoint, self.text, torch.float32, torch.device("cpu")), 3)

    def cell(self, tuned: Path, row: str, ratio: float, seed: int) -> dict[str, Any]:
        """Pack, apply, measure."""
        method, options, _ = METHODS[row]
        file, back = self.folder / "cell.delta", self.folder / "cell"
        started = time.perf_counter()
        needs_text = "q" in options or method == "wanda"
        found = secateur.delta_pack(
            self.base,
            tuned,
            file,
            method=method,
            ratio=ratio,
            options=options,
            seed=seed,
            data=self.train if needs_text else None,
            samples=32,
            length=256,
            force=True,
        )
        packed = time.perf_counter() - started
        secateur.delta_apply(self.base, file, back, force=True)
        keys = ("bytes", "values_bytes", "index_bytes", "whole_bytes", "bound_bytes", "dropped")
        figures = {key: found[key] for key in keys} | {"q": found["q"], "pack_s": round(packed, 1)}
        figures |= {"perplexity": self.perplexity(back)}
        if "eta" in found["search"]:
            figures["eta"] = found["search"]["eta"]
        for path in self.folder.glob("cell*.previous*"):
            remove(path)
        remove(back)
        print(f"{tuned.name} {row} {ratio} seed {seed}: {figures}", file=sys.stderr, flush=True)
        return figures


def remove(path: Path) -> None:
    """A file or a folder."""
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rows_of(bench: Bench, tuned: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row at every ratio, seeds averaged."""
    for ratio in RATIOS:
        for name in names:
            seeds = SEEDS[: 1 if bench.small else len(SEEDS)] if METHODS[name][2] else SEEDS[:1]
            cells = [bench.cell(tuned, name, ratio, seed) for seed in seeds]
            figures = {"perplexity": round(fmean(c["perplexity"] for c in cells), 3)}
            figures |= {
                "of_seeds": [c["perplexity"] for c in cells],
                "q_mean": [round(c["q"]["mean"], 4) for c in cells],
            }
            figures |= {key: cells[0][key] for key in cells[0] if key not in ("perplexity", "q")}
            yield f"{name} {ratio:g}", figures


def last_figures(bench: Bench, base: float) -> dict[str, Any]:
    """What the last record says, where it is of the same model and text; rows that are not measured anew stay."""
    path = RESULTS / f"{bench.name}.json"
    found: dict[str, Any] = {}
    if not bench.small and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return found if found.get("base") == {"perplexity": base} else {"base": {"perplexity": base}}


def goals_of(kind: str, figures: dict[str, Any], base: float) -> Iterator[Goal]:
    """DAREx-q against DARE at every ratio."""
    rows, full = figures["rows"], figures["perplexity"]
    for ratio in RATIOS:
        dare, best = rows.get(f"dare {ratio:g}"), rows.get(f"darex_q searched {ratio:g}")
        if dare is None or best is None:
            continue
        told = f"{best['perplexity']} against {dare['perplexity']} (base {base}, {kind} {full})"
        yield Goal(
            f"{kind}, {ratio:.0%} of the delta dropped: held-out perplexity of `darex_q`, q searched without labels",
            "< that of `dare`, means of three seeds",
            told,
            best["perplexity"] < dare["perplexity"],
        )


def main() -> None:
    """Fine-tune twice, prune, measure, record."""
    options = parser(__doc__ or "")
    options.add_argument("--model", choices=MODELS, default=MODELS[0], help="of the assets")
    options.add_argument("--tuned", type=Path, default=None, help="a fine-tune made by an earlier run")
    options.add_argument("--anchored", type=Path, default=None, help="the same, with AdamR")
    options.add_argument("--plain", action="store_true", help="leave the fine-tune with AdamR out")
    options.add_argument("--windows", type=int, default=64, help="of the held-out text")
    options.add_argument(
        "--rows",
        nargs="*",
        choices=tuple(METHODS),
        default=tuple(METHODS),
        help="all when omitted; others stay as last recorded",
    )
    arguments = options.parse_args()
    where = conditions()
    with work_folder(arguments.work) as folder:
        bench = Bench(folder, arguments)
        base = bench.perplexity(bench.base)
        figures = last_figures(bench, base)
        pairs = {
            PLAIN: (bench.fine_tune("tuned", arguments.tuned), [name for name in METHODS if name in arguments.rows])
        }
        if not arguments.plain:
            rows = [name for name in ANCHORED if name in arguments.rows]
            pairs[ADAM_R] = (bench.fine_tune("anchored", arguments.anchored, anchor="l2"), rows)
        for kind, (tuned, wanted) in pairs.items():
            full, last = bench.perplexity(tuned), figures.get(kind, {})
            kept = last.get("rows", {}) if last.get("perplexity") == full else {}
            size = (tuned / "model.safetensors").stat().st_size
            rows_now = {**kept, **dict(rows_of(bench, tuned, wanted))}
            figures[kind] = {"perplexity": full, "weights_bytes": size, "rows": rows_now}
        goals = [goal for kind in (PLAIN, ADAM_R) if kind in figures for goal in goals_of(kind, figures[kind], base)]
    assert bench.text is not None
    record(
        Result(
            bench.name,
            f"delta pruning of {bench.base.name}, fine-tuned on another text",
            where,
            goals,
            figures,
            [
                f"{bench.base.name} trained whole for {bench.steps} steps of 8 x 256 tokens of wikitext-2's "
                "validation text by `secateur recover --method full`"
                + (", once as by default and once with `--set anchor=l2`" if ADAM_R in figures else ""),
                f"perplexity on the first {len(bench.text.windows)} windows of 256 tokens of wikitext-2's test text; "
                "signals and searches see 32 windows (searches 8 of them) of the training text, no labels",
                "a run with --rows measures these anew; the others are of the last run on the same fine-tune",
                "file: pack, apply, measure what transformers loads; values in float16",
            ],
        ),
        arguments.small,
    )


if __name__ == "__main__":
    main()
