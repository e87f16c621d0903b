"""Everything ``secateur evaluate`` says of a model, alone or against another."""

from __future__ import annotations

from typing import Any

import torch

from secateur.checkpoints import Checkpoint
from secateur.engine.prepare import context_of, resolve_dtype
from secateur.meters.counts import count
from secateur.meters.perplexity import Text, fits, load_stock, perplexity
from secateur.meters.speed import speeds

Figures = dict[str, float | int | None]


def evaluate_models(
    checkpoints: list[Checkpoint], text: str | None, context: int | None, dtype: str, device: torch.device
) -> list[Figures]:
    """Figures of each model; the speeds are taken in one run, their order alternated.

    Args:
        checkpoints: the models.
        text: file of a held-out text, or None for no perplexity.
        context: window of the perplexity, at most the shortest context of the models.
    """
    types = [resolve_dtype(dtype, checkpoint, device) for checkpoint in checkpoints]
    shared = min([context_of(c) for c in checkpoints] + ([context] if context else []))
    figures: list[Figures] = []
    for checkpoint, kind in zip(checkpoints, types, strict=True):
        found: Figures = {"perplexity": None, "context": None, "tokens": None}
        if text is not None:
            windows = Text.read(text, checkpoint, shared)
            found["perplexity"] = perplexity(checkpoint, windows, kind, device)
            found["context"], found["tokens"] = windows.context, windows.tokens
        counts = count(checkpoint)
        found.update({key: counts[key] for key in ("params", "bytes", "flops_per_token")})
        figures.append(found)
    measured: list[dict[str, Any]] = [
        {"prefill_tokens_per_second": None, "decode_tokens_per_second": None} for _ in checkpoints
    ]
    if all(fits(checkpoint, kind) for checkpoint, kind in zip(checkpoints, types, strict=True)):
        models = [load_stock(checkpoint, kind, device) for checkpoint, kind in zip(checkpoints, types, strict=True)]
        vocab = min(checkpoint.architecture.sizes.vocab for checkpoint in checkpoints)
        measured = list(speeds(models, vocab, shared, device))
    for found, speed in zip(figures, measured, strict=True):
        found.update(speed)
    return figures


def ratios(figures: Figures, against: Figures) -> Figures:
    """Each figure divided by the other model's; None where either is missing or zero."""
    result: Figures = {}
    for key, value in figures.items():
        other = against[key]
        result[key] = value / other if value is not None and other else None
    return result
