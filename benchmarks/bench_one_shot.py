"""Every method of forward statistics alone against one plain forward pass over the same tokens, in one process.

Rows are recorded as they are measured, each with the forward passes around it; ``--rows`` measures some of them again
and leaves the others as they were. ``--peer NAME=FOLDER`` runs a checkout of a public repository beside the row of the
same name, in ``--peer-python``'s environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    Goal,
    Result,
    conditions,
    keep,
    llama_config,
    load,
    measure,
    opt_config,
    parser,
    record,
    work_folder,
    write_checkpoint,
    write_ids,
)
from timing import BATCH_TOKENS, RATIO, Spent, forward_seconds, prune_seconds

NAME = "one_shot"
GOAL = 3.0
LAYERS, WINDOWS, LENGTH, VOCAB = 12, 64, 1024, 16384
EVERY = 4
"""Rows between two forward passes."""
PEERS = {"flap": "per-layer", "cfsp": "per-layer", "slicegpt": "per-layer", "llm_pruner": "native"}
"""Repositories that peer_one_shot.py can run, and the layout whose row they stand beside."""
PEER_NOTE = (
    "peers run their released pruning code on the same checkpoint, tokens, threads and machine, warmed by an eighth of "
    "the tokens; loading their model and saving it are not in their time, reading, writing and checking are in ours"
)


@dataclass(frozen=True)
class Row:
    """One prune to be timed.

    Attributes:
        shape: ``llama`` or ``opt``.
        limited: whether the goal is for it.
        tokens: windows and their length, if not those of all rows.
    """

    shape: str
    method: str
    layout: str
    options: dict[str, Any] = field(default_factory=dict)
    limited: bool = True
    tokens: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        words = (f"{key}={value}" for key, value in self.options.items())
        return " ".join([self.shape, self.method, self.layout, *words])

    def counted(self, windows: int) -> tuple[int, int]:
        """Windows and their length, where the others have so many windows."""
        return self.tokens or (windows, LENGTH)


ROWS = (
    Row("llama", "fasp", "native"),
    Row("llama", "fasp", "per-layer", {"targets": "ffn+vo"}),
    Row("llama", "flap", "native"),
    Row("llama", "flap", "per-layer"),
    Row("llama", "cfsp", "native"),
    Row("llama", "cfsp", "per-layer"),
    Row("llama", "modegpt", "native"),
    Row("llama", "modegpt", "per-layer"),
    Row("llama", "shortgpt", "native"),
    Row("llama", "dynamic_slicing", "per-layer"),
    Row("llama", "slicegpt", "native"),
    Row("llama", "slicegpt", "per-layer", limited=False),
    Row("llama", "llm_pruner", "native", limited=False, tokens=(8, 512)),  # whole backward passes fit in memory
    *(Row("opt", method, "native", limited=False) for method in ("fasp", "flap", "cfsp", "modegpt", "shortgpt")),
)


class Bench:
    """One model and its tokens.

    Args:
        work: folder for both.
        shape: of the model.
        sizes: hidden, layers, heads, ffn and vocabulary.
        windows, length: of the tokens.
    """

    def __init__(self, work: Path, shape: str, sizes: tuple[int, int, int, int, int], windows: int, length: int):
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        hidden, layers, heads, ffn, vocab = sizes
        self.work, self.windows, self.length = work, windows, length
        self.model = work / shape
        config = llama_config(hidden, layers, heads, ffn, vocab, 2048, "float32")
        if shape == "opt":
            config = opt_config(hidden, layers, heads, 4 * hidden, vocab)
        write_checkpoint(self.model, config)
        self.data = write_ids(work / "ids.npy", vocab, windows, length)
        self.ids = torch.from_numpy(np.load(self.data))
        self._plain = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        forward_seconds(self._plain, self.ids[: max(1, BATCH_TOKENS // length)])

    def forward(self) -> Spent:
        """Seconds of a plain pass over all tokens."""
        return forward_seconds(self._plain, self.ids)

    def prune(self, row: Row, windows: int) -> tuple[Spent, dict[str, float]]:
        """Seconds of a whole prune, and of its phases."""
        output = self.work / "pruned"
        options = {"layout": row.layout, "options": row.options}
        try:
            return prune_seconds(self.model, self.data, windows, self.length, output, row.method, **options)
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def measured(self, row: Row) -> dict[str, Any]:
        """A row's figures, the process being warm."""
        self.prune(row, max(8, self.windows // 8))
        before = load()
        spent, phases = self.prune(row, self.windows)
        return {**named("prune", spent), "phases_s": phases, "load": [before, load()], "date": conditions()["date"]}

    def peer(self, name: str, checkout: str, python: str) -> dict[str, Any]:
        """Seconds of a peer's pruning code, or why it did not run."""
        script = Path(__file__).with_name("peer_one_shot.py")
        command = [python, str(script), name, checkout, str(self.model), str(self.data), str(RATIO)]
        environment = {"PYTHONPATH": ""}
        try:
            spent = measure(command, environment).json
            return named("prune", Spent(spent["prune_s"], spent["prune_cpu_s"]))
        except SystemExit as failure:
            print(failure, file=sys.stderr)
            return {"failed": "the peer's code did not run to its end"}


def named(what: str, *spent: Spent) -> dict[str, float]:
    """Means for the record."""
    wall, processor = (sum(each) / len(spent) for each in zip(*spent, strict=True))
    return {f"{what}_s": round(wall, 2), f"{what}_cpu_s": round(processor, 2)}


def times(one: dict[str, Any], what: str, other: dict[str, Any]) -> str:
    """The time of a prune over another time, by the clock and by the processor."""
    wall, processor = (one[f"prune_{unit}"] / other[f"{what}_{unit}"] for unit in ("s", "cpu_s"))
    return f"{wall:.2f} x ({processor:.2f} x in processor time)"


def goals(rows: dict[str, Any], peers: dict[str, Any], windows: int) -> list[Goal]:
    """What the table says of the rows so far."""
    found = []
    for row in (row for row in ROWS if row.name in rows):
        ours, tokens = rows[row.name], "{} x {} tokens".format(*row.counted(windows))
        what = f"`{row.name}`, ratio {RATIO}, {tokens}, against one plain forward pass"
        met = all(ours[f"prune_{unit}"] <= GOAL * ours[f"forward_{unit}"] for unit in ("s", "cpu_s"))
        found.append(
            Goal(
                what,
                f"<= {GOAL:g} x" if row.limited else "-",
                times(ours, "forward", ours),
                met if row.limited else None,
            )
        )
        if row.name in peers:
            theirs = peers[row.name]
            said = theirs.get("failed") or f"{times(ours, 'prune', theirs)} of the peer's time"
            found.append(Goal(f"`{row.name}` beside the peer's own code", "-", said, None))
    return found


def chosen(arguments: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for."""
    wanted: list[str] = arguments.rows or [""]
    return [row for row in ROWS if any(set(word.split()) <= set(row.name.split()) for word in wanted)]


def run(arguments: argparse.Namespace, told: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Shape by shape: a forward pass, a few rows and the peers beside them, a forward pass...

    Args:
        told: given the figures of rows and peers whenever there are more.
    """
    small = arguments.small
    sizes = (256, 2, 4, 512, 512) if small else (768, arguments.layers, 12, 2048, VOCAB)
    peers = dict(pair.split("=", 1) for pair in arguments.peer)
    rows = chosen(arguments)
    for shape, tokens in dict.fromkeys((row.shape, row.tokens) for row in rows):
        mine = [row for row in rows if (row.shape, row.tokens) == (shape, tokens)]
        windows, length = (8, 64) if small else mine[0].counted(arguments.windows)
        with work_folder(arguments.work, 8 * 2**30) as work:
            bench = Bench(work, shape, sizes, windows, length)
            before = bench.forward()
            for first in range(0, len(mine), EVERY):
                some, beside = {}, {}
                for row in mine[first : first + EVERY]:
                    some[row.name] = {**bench.measured(row), **named("forward", before)}
                    told(some, beside)
                    if shape == "llama" and PEERS.get(row.method) == row.layout and row.method in peers:
                        beside[row.name] = bench.peer(row.method, peers[row.method], arguments.peer_python)
                        told(some, beside)
                after = bench.forward()
                for figures in some.values():
                    figures.update(
                        named("forward", before, after), forwards_s=[round(s, 2) for s, _ in (before, after)]
                    )
                told(some, beside)
                before = after


def main() -> None:
    """Measure the rows asked for and record them beside those that were measured before."""
    options = parser(__doc__ or "")
    options.add_argument("--rows", nargs="*", help="words of rows, as 'fasp' or 'llama flap'; all when omitted")
    options.add_argument("--list", action="store_true", help="show the rows and stop")
    options.add_argument("--layers", type=int, default=LAYERS, help="fewer to try it; then nothing is recorded")
    options.add_argument("--windows", type=int, default=WINDOWS, help="fewer to try it; then nothing is recorded")
    options.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=f"of {', '.join(PEERS)}")
    options.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment")
    arguments = options.parse_args()
    if arguments.list:
        print("\n".join(row.name for row in ROWS))
        return
    whole = not arguments.small and (arguments.layers, arguments.windows) == (LAYERS, WINDOWS)
    where, kept = conditions(), RESULTS / f"{NAME}.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["figures"] if whole and kept.is_file() else {}
    rows, peers = dict(before.get("rows", {})), dict(before.get("peers", {}))
    for name in PEERS:
        if not any(pair.startswith(f"{name}=") for pair in arguments.peer):
            print(f"peer {name}: skipped, no --peer {name}=FOLDER", file=sys.stderr)

    def result() -> Result:
        return Result(
            NAME,
            "one-shot methods on shapes of 100 M parameters",
            dict(where),
            goals(rows, peers, arguments.windows),
            {"rows": rows, "peers": peers},
            [
                f"llama: hidden 768, {LAYERS} layers, ffn 2048, vocabulary {VOCAB}; opt: ffn 3072, else the same; "
                "float32 weights and compute, random weights and token ids",
                "the time by the clock and that of the processor have both to meet the goal; other work on the machine "
                "disturbs the latter less",
                "the process is warm: every row was run on an eighth of the tokens before",
                f"the plain pass, head included, runs batches of {BATCH_TOKENS} tokens, as the engine does; its model "
                "is loaded before, the prunes read their weights from the file; a row's pass is the mean of the one "
                f"before and the one after at most {EVERY} rows",
                PEER_NOTE,
            ],
        )

    def told(more: dict[str, Any], beside: dict[str, Any]) -> None:
        rows.update(more)
        peers.update(beside)
        name, figures = list(more.items())[-1]
        print(name, times(figures, "forward", figures), beside.get(name, ""), file=sys.stderr, flush=True)
        if whole:
            keep(result())

    run(arguments, told)
    record(result(), not whole)


if __name__ == "__main__":
    main()
