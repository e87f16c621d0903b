"""SliceGPT, the whole prune, against one plain forward pass of the stock model over the same tokens, in one process."""

from __future__ import annotations

import time
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

GOAL = 3.0
RATIO = 0.25
BATCH_TOKENS = 4096


class Phases:
    """Progress that remembers when each sweep began and made its last step."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._now = ""

    def start(self, what: str, total: int) -> None:
        del total
        self._add(f"before {what}")
        self._now = what

    def step(self, done: int) -> None:
        del done
        self._add(self._now)

    def note(self, message: str) -> None:
        del message

    def end(self) -> dict[str, float]:
        """Seconds by phase, the rest included."""
        self._add("report and publish")
        return {what: round(spent, 2) for what, spent in self.seconds.items()}

    def _add(self, what: str) -> None:
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now


def forward_seconds(model: Any, ids: Any) -> float:
    """One pass over all windows, logits of every token computed and dropped."""
    import torch

    rows = max(1, BATCH_TOKENS // ids.shape[1])
    started = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(rows):
            model(input_ids=batch, use_cache=False)
    return time.perf_counter() - started


def prune_seconds(folder: Path, data: Path, windows: int, length: int, output: Path) -> tuple[float, dict[str, float]]:
    """The whole call: calibrate, rotate, write, verify."""
    import secateur

    phases = Phases()
    started = time.perf_counter()
    secateur.prune(
        folder,
        method="slicegpt",
        ratio=RATIO,
        data=data,
        samples=windows,
        length=length,
        output=output,
        device="cpu",
        progress=phases,
    )
    return time.perf_counter() - started, phases.end()


def main() -> None:
    """Warm up both, then forward, prune, forward; the mean of the two passes is what counts."""
    arguments = parser(__doc__ or "").parse_args()
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    small = arguments.small
    windows, length = (8, 64) if small else (64, 1024)
    hidden, layers, ffn, vocab = (64, 2, 160, 512) if small else (768, 12, 2048, 16384)
    where = conditions()
    with work_folder(arguments.work, 4 * 2**30) as work:
        config = llama_config(hidden, layers, 4 if small else 12, ffn, vocab, 2048, "float32")
        size = write_checkpoint(work / "model", config)
        data = write_ids(work / "ids.npy", vocab, windows, length)
        ids = torch.from_numpy(np.load(data))
        model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
        forward_seconds(model, ids[: max(1, BATCH_TOKENS // length)])
        warm = max(8, windows // 8)
        prune_seconds(work / "model", data, warm, length, work / "warm")
        first = forward_seconds(model, ids)
        loads = [load()]
        took, phases = prune_seconds(work / "model", data, windows, length, work / "pruned")
        loads.append(load())
        second = forward_seconds(model, ids)
    forward = (first + second) / 2
    ratio = took / forward
    record(
        Result(
            "slicegpt",
            "calibrated slicing of a Llama shape of 100 M parameters",
            {**where, "load_between": loads},
            [
                Goal(
                    f"`slicegpt --ratio {RATIO}`, {windows} x {length} tokens, against one plain forward pass",
                    f"<= {GOAL:g} x",
                    f"{ratio:.2f} x",
                    ratio <= GOAL,
                )
            ],
            {
                "prune_s": round(took, 2),
                "forward_before_s": round(first, 2),
                "forward_after_s": round(second, 2),
                "phases_s": phases,
                "weight_bytes": size,
            },
            [
                f"hidden {hidden}, {layers} layers, ffn {ffn}, vocabulary {vocab}, float32 weights and compute, "
                "random weights and token ids",
                "the process is warm: both were run once on an eighth of the tokens before",
                f"the plain pass, head included, runs batches of {BATCH_TOKENS} tokens, as the engine does; its model "
                "is loaded before, the prune reads its weights from the file",
            ],
        ),
        small,
    )


if __name__ == "__main__":
    main()
