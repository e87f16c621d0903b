"""Magnitude on a Llama-2-7B shape in bfloat16: memory, and time against copying the folder; PruneNet beside it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from common import (
    GIB,
    MIB,
    Goal,
    Measured,
    Result,
    conditions,
    llama_config,
    load,
    make_cold,
    measure,
    parser,
    record,
    secateur,
    weight_bytes,
    work_folder,
    write_checkpoint,
)

MEMORY, TIMES = 3 * GIB, 3.0
RATIO = 0.2


def synced() -> float:
    """Seconds until everything written so far is on the disk."""
    started = time.perf_counter()
    os.sync()
    return time.perf_counter() - started


def copy_seconds(model: Path, target: Path) -> tuple[float, float]:
    """Wall time of copying the folder, cold, without and with the final sync; the copy is deleted."""
    make_cold(model)
    started = time.perf_counter()
    shutil.copytree(model, target)
    took = time.perf_counter() - started
    rest = synced()
    shutil.rmtree(target)
    return took, took + rest


def prune(model: Path, output: Path, *more: str) -> tuple[Measured, float]:
    """One prune from the command line, cold; the output is deleted. Returns also the seconds with the final sync."""
    make_cold(model)
    command = secateur("prune", model, "-o", output, "--ratio", str(RATIO), "--device", "cpu", "--json", *more)
    run = measure(command)
    rest = synced()
    shutil.rmtree(output)
    return run, run.seconds + rest


def main() -> None:
    """Copy, prune, copy: the mean of the two copies is the yardstick."""
    options = parser(__doc__ or "")
    options.add_argument("--episodes", type=int, default=20, help="episodes of PruneNet; 0 leaves it out")
    options.add_argument("--model", type=Path, default=None, help="a folder of this shape, instead of making one")
    arguments = options.parse_args()
    small = arguments.small
    hidden, layers, heads, ffn, vocab = (64, 4, 4, 160, 512) if small else (4096, 32, 32, 11008, 32000)
    where = conditions()
    with work_folder(arguments.work, 40 * GIB if not small else 0) as work:
        model = work / "model" if arguments.model is None else arguments.model.resolve()
        config = llama_config(hidden, layers, heads, ffn, vocab, 4096, "bfloat16")
        started = time.perf_counter()
        if arguments.model is None:
            write_checkpoint(model, config, shard_bytes=100_000 if small else GIB)
        size = weight_bytes(model)
        made = time.perf_counter() - started
        loads = [load()]
        first, first_synced = copy_seconds(model, work / "copy")
        loads.append(load())
        run, run_synced = prune(model, work / "pruned", "--method", "magnitude")
        loads.append(load())
        second, second_synced = copy_seconds(model, work / "copy")
        loads.append(load())
        assert run.peak_anonymous is not None
        copying, copying_synced = (first + second) / 2, (first_synced + second_synced) / 2
        plain, durable = run.seconds / copying, run_synced / copying_synced
        figures: dict[str, Any] = {
            "prune_s": round(run.seconds, 1),
            "prune_cpu_s": run.cpu_seconds,
            "prune_with_sync_s": round(run_synced, 1),
            "copies_s": [round(first, 1), round(second, 1)],
            "copies_with_sync_s": [round(first_synced, 1), round(second_synced, 1)],
            "phases_s": run.phases,
            "peak_as_the_command_reports_mib": round(run.json["peak_rss_bytes"] / MIB),
            "weight_gib": round(size / GIB, 2),
            "writing_the_random_model_s": round(made, 1),
        }
        goals = [
            Goal(
                f"`magnitude --ratio {RATIO}` on the FFN, peak anonymous memory",
                f"<= {MEMORY / MIB:,.0f} MiB",
                f"{run.peak_anonymous / MIB:,.0f} MiB",
                run.peak_anonymous <= MEMORY,
            ),
            Goal(
                "the same, wall time against copying the folder on the same disk",
                f"<= {TIMES:g} x",
                f"{plain:.2f} x ({durable:.2f} x when both end with a sync)",
                max(plain, durable) <= TIMES,
            ),
        ]
        if arguments.episodes:
            extra = ["--method", "prunenet", "--set", f"episodes={arguments.episodes}"]
            learned, _ = prune(model, work / "pruned", *extra)
            loads.append(load())
            assert learned.peak_anonymous is not None
            measured = f"{learned.seconds:.0f} s and {learned.peak_anonymous / MIB:,.0f} MiB"
            goals.append(Goal(f"`prunenet`, {arguments.episodes} episode(s), beside it", "-", measured, None))
            figures["prunenet_phases_s"] = learned.phases
    record(
        Result(
            "stream",
            "a model larger than the memory it takes, 7 B parameters",
            {**where, "load_between": loads},
            goals,
            figures,
            [
                f"hidden {hidden}, {layers} layers, {heads} heads, ffn {ffn}, vocabulary {vocab}, bfloat16, GiB shards",
                "prune and copies start cold: sync, then posix_fadvise DONTNEED on every file of the source",
                "copy, prune, copy; the mean of the two copies (shutil.copytree) counts; interpreter start is in the "
                "prune's time",
                "RssAnon of the process, read from outside every 10 ms; pages of mapped files are not in it",
            ],
        ),
        small,
    )


if __name__ == "__main__":
    main()
