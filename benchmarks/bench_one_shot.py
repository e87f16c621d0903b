"""Every method of forward statistics alone against one plain forward pass over the same tokens, in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common import (
    Goal,
    Result,
    conditions,
    llama_config,
    load,
    parser,
    record,
    work_folder,
    write_checkpoint,
    write_ids,
)
from timing import BATCH_TOKENS, RATIO, forward_seconds, prune_seconds

GOAL = 3.0
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fasp", "native", {}),
    ("fasp", "per-layer", {"targets": "ffn+vo"}),
    ("flap", "native", {}),
    ("flap", "per-layer", {}),
    ("cfsp", "native", {}),
    ("cfsp", "per-layer", {}),
    ("modegpt", "native", {}),
    ("modegpt", "per-layer", {}),
)


def _named(method: str, layout: str, options: dict[str, Any]) -> str:
    words = [method, layout, *(f"{key}={value}" for key, value in options.items())]
    return " ".join(words)


def main() -> None:
    """Warm up all, then forward, every prune, forward; the mean of the two passes is what counts."""
    arguments = parser(__doc__ or "").parse_args()
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    small = arguments.small
    windows, length = (8, 64) if small else (64, 1024)
    hidden, layers, ffn, vocab = (64, 2, 160, 512) if small else (768, 12, 2048, 16384)
    where = conditions()
    took: dict[str, float] = {}
    phases: dict[str, dict[str, float]] = {}
    with work_folder(arguments.work, 4 * 2**30) as work:
        model = work / "model"
        size = write_checkpoint(model, llama_config(hidden, layers, 4 if small else 12, ffn, vocab, 2048, "float32"))
        data = write_ids(work / "ids.npy", vocab, windows, length)
        ids = torch.from_numpy(np.load(data))
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        forward_seconds(plain, ids[: max(1, BATCH_TOKENS // length)])

        def prune(count: int, method: str, layout: str, options: dict[str, Any]) -> tuple[float, dict[str, float]]:
            output: Path = work / "pruned"
            try:
                return prune_seconds(model, data, count, length, output, method, layout=layout, options=options)
            finally:
                shutil.rmtree(output, ignore_errors=True)

        for run in RUNS:
            prune(max(8, windows // 8), *run)
        first, loads = forward_seconds(plain, ids), [load()]
        for run in RUNS:
            took[_named(*run)], phases[_named(*run)] = prune(windows, *run)
        loads.append(load())
        second = forward_seconds(plain, ids)
    forward = (first + second) / 2
    record(
        Result(
            "one_shot",
            "one-shot methods on a Llama shape of 100 M parameters",
            {**where, "load_between": loads},
            [
                Goal(
                    f"`{name}`, ratio {RATIO}, {windows} x {length} tokens, against one plain forward pass",
                    f"<= {GOAL:g} x",
                    f"{seconds / forward:.2f} x",
                    seconds / forward <= GOAL,
                )
                for name, seconds in took.items()
            ],
            {
                "prune_s": {name: round(seconds, 2) for name, seconds in took.items()},
                "forward_before_s": round(first, 2),
                "forward_after_s": round(second, 2),
                "phases_s": phases,
                "weight_bytes": size,
            },
            [
                f"hidden {hidden}, {layers} layers, ffn {ffn}, vocabulary {vocab}, float32 weights and compute, "
                "random weights and token ids",
                "the process is warm: everything was run once on an eighth of the tokens before",
                f"the plain pass, head included, runs batches of {BATCH_TOKENS} tokens, as the engine does; its model "
                "is loaded before, the prunes read their weights from the file",
            ],
        ),
        small,
    )


if __name__ == "__main__":
    main()
