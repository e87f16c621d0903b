"""What a worker process of ``compare`` does: measure the dense model, or make one cell's model and measure it."""

from __future__ import annotations

import math
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from secateur.api.pruning import prune
from secateur.checkpoints import Checkpoint
from secateur.engine.prepare import LONGEST_WINDOW, context_of, draw_windows, resolve_device, resolve_dtype
from secateur.engine.progress import Silent
from secateur.errors import RequestError
from secateur.inference import open_checkpoint
from secateur.meters.counts import count, share_removed
from secateur.meters.evaluate import ratios
from secateur.meters.machine import conditions
from secateur.meters.perplexity import Text, fits, load_stock, perplexity
from secateur.meters.speed import speeds
from secateur.reports.plots import no_drawings

Job = dict[str, Any]
_AT_FAULT = ("no-", "bad-")  # codes of refusals that say nothing about how far a method reaches


class _Clock(Silent):
    """Remembers when the last step was done: after it only the report of the prune is written."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()

    def step(self, done: int) -> None:
        del done
        self.last = time.perf_counter()


def measure_dense(job: Job) -> dict[str, Any]:
    """Sizes and perplexity of the uncut model, its machine, and the calibration windows that the cells will draw."""
    torch.set_num_threads(job["threads"])
    checkpoint, device = open_checkpoint(Path(job["model"])), resolve_device(job["device"])
    text = Text.read(job["text"], checkpoint, job["context"], job["trust_remote_code"])
    found = {**count(checkpoint), **_perplexity(checkpoint, text, job, device, None), "data": None}
    if job["prune"]["data"] is not None:
        found["data"] = _windows(job, checkpoint)
    return {**found, "machine": conditions(device)}


def _windows(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    asked = job["prune"]
    more = (job["seed"], asked["text_field"], asked["trust_remote_code"])
    return draw_windows(asked["data"], checkpoint, asked["samples"], asked["length"], *more).record()


def make_and_measure(job: Job) -> dict[str, Any]:
    """Prune as one cell asks, then measure: perplexity, and speed beside the dense model, in this process.

    Returns:
        ``state``: ``done`` with figures, or ``unreachable`` with ``why``.
    """
    torch.set_num_threads(job["threads"])
    output, clock = Path(job["output"]), _Clock()
    shutil.rmtree(output, ignore_errors=True)
    try:
        with ExitStack() as stack:
            if not job["keep"]:
                stack.enter_context(no_drawings())
            result = prune(job["model"], output=output, progress=clock, **job["prune"])
    except RequestError as error:
        if error.code.startswith(_AT_FAULT):
            raise
        return {"state": "unreachable", "why": f"{error.asked}: {error.found}", "code": error.code}
    device = resolve_device(job["device"])
    dense, pruned = open_checkpoint(Path(job["model"])), open_checkpoint(output)
    types = [resolve_dtype(job["prune"]["dtype"], checkpoint, device) for checkpoint in (dense, pruned)]
    pair = [
        load_stock(checkpoint, dtype, device) if fits(checkpoint, dtype) else None
        for checkpoint, dtype in zip((dense, pruned), types, strict=True)
    ]
    text = Text.read(job["text"], pruned, job["context"], job["trust_remote_code"])
    figures = _perplexity(pruned, text, job, device, pair[1])
    achieved = result.achieved
    return {
        "state": "done",
        "achieved": achieved,
        "removed": share_removed(achieved),
        "perplexity": figures["perplexity"],
        "speed": _speed(dense, pair, job, device),
        "seconds": round(clock.last - clock.started, 3),
        "peak_rss_bytes": result.peak_rss_bytes,
        "loads_in": result.loads_in,
        "options": result.requested["options"],
    }


def _perplexity(
    checkpoint: Checkpoint, text: Text, job: Job, device: torch.device, model: torch.nn.Module | None
) -> dict[str, Any]:
    """The figure, None where it is not finite, with what it was taken on."""
    dtype = resolve_dtype(job["prune"]["dtype"], checkpoint, device)
    value = perplexity(checkpoint, text, dtype, device, model)
    return {"perplexity": value if math.isfinite(value) else None, "context": text.context, "tokens": text.tokens}


def _speed(
    dense: Checkpoint, pair: list[torch.nn.Module | None], job: Job, device: torch.device
) -> dict[str, dict[str, float | None]]:
    """Tokens per second of the pruned and the dense model, and their ratio; None where they do not fit into memory."""
    if None in pair:
        nothing: dict[str, float | None] = {"prefill": None, "decode": None}
        return {"pruned": nothing, "dense": nothing, "ratio": nothing}
    context = min(context_of(dense), job["context"] or LONGEST_WINDOW)
    before, after = (
        {key.removesuffix("_tokens_per_second"): value for key, value in found.items()}
        for found in speeds(pair, dense.architecture.sizes.vocab, context, device)
    )
    return {"pruned": {**after}, "dense": {**before}, "ratio": ratios(after, before)}
