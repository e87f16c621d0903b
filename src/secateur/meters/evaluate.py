"""Everything ``secateur evaluate`` says of a model, alone or against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.checkpoints import Checkpoint
from secateur.engine.prepare import context_of, resolve_dtype
from secateur.errors import refuse
from secateur.meters.counts import count
from secateur.meters.perplexity import Text, fits, load_stock, perplexity
from secateur.meters.similarity import ScoredPairs, similarity
from secateur.meters.speed import speeds
from secateur.meters.tasks import Tasks

Figures = dict[str, Any]
"""Numbers (or None) by name; ``texts`` and ``tasks`` are such dictionaries by name."""


def evaluate_models(
    checkpoints: Sequence[Checkpoint],
    texts: Sequence[str],
    context: int | None,
    dtype: str,
    device: torch.device,
    tasks: Tasks | None = None,
    pairs: ScoredPairs | None = None,
) -> list[Figures]:
    """Figures of each model, loaded once; the speeds are taken in one run, their order alternated.

    Args:
        checkpoints: the models.
        texts: files of held-out texts; the first gives the perplexity, several also ``texts``.
        context: window of the perplexity, at most the shortest context of the models.
        tasks: lm-eval tasks.
        pairs: sentences whose similarity the embeddings shall tell; adds ``spearman`` and ``pairs``, their number.

    Raises:
        RequestError: a text that is unreadable or too short, tasks or pairs for a model that does not fit into memory.
    """
    types = [resolve_dtype(dtype, checkpoint, device) for checkpoint in checkpoints]
    shared = min([context_of(c) for c in checkpoints] + ([context] if context else []))
    windows = [[Text.read(text, checkpoint, shared) for text in texts] for checkpoint in checkpoints]
    # each is measured beside those loaded before it, so that what fits, fits together
    models = [
        load_stock(c, kind, device) if fits(c, kind) else None for c, kind in zip(checkpoints, types, strict=True)
    ]
    figures: list[Figures] = []
    for checkpoint, kind, model, read in zip(checkpoints, types, models, windows, strict=True):
        measured = [
            {
                "perplexity": perplexity(checkpoint, text, kind, device, model),
                "context": text.context,
                "tokens": text.tokens,
            }
            for text in read
        ]
        found: Figures = dict(measured[0]) if measured else {"perplexity": None, "context": None, "tokens": None}
        if len(texts) > 1:
            found["texts"] = dict(zip(texts, measured, strict=True))
        counts = count(checkpoint)
        found.update({key: counts[key] for key in ("params", "bytes", "flops_per_token")})
        figures.append(found)
    speed: list[dict[str, Any]] = [
        {"prefill_tokens_per_second": None, "decode_tokens_per_second": None} for _ in checkpoints
    ]
    if None not in models:
        vocab = min(checkpoint.architecture.sizes.vocab for checkpoint in checkpoints)
        speed = list(speeds(models, vocab, shared, device))
    for found, checkpoint, model, fast in zip(figures, checkpoints, models, speed, strict=True):
        found.update(fast)
        if tasks is None and pairs is None:
            continue
        if model is None:
            asked = f"tasks or pairs on {str(checkpoint.folder.path)!r}"
            refuse("too-large", asked, "the model does not fit into memory")
        if tasks is not None:
            found["tasks"] = tasks.run(checkpoint, model, device)
        if pairs is not None:
            found |= {"spearman": similarity(checkpoint, pairs, model, device), "pairs": len(pairs.scores)}
    return figures


def ratios(figures: Mapping[str, Any], against: Mapping[str, Any]) -> Figures:
    """Each figure divided by the other model's, by name; None where either is missing or zero, no standard errors."""
    result: Figures = {}
    for key, value in figures.items():
        if "_stderr" in key:
            continue
        other = against.get(key)
        if isinstance(value, Mapping):
            result[key] = ratios(value, other or {})
        else:
            result[key] = value / other if value is not None and other else None
    return result
