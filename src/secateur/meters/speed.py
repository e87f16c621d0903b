"""Speed of prefill and decoding, of several models in one run: rounds alternate their order, medians are given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

_PREFILL, _PROMPT, _DECODED, _ROUNDS = 256, 16, 24, 5


def speeds(models: Sequence[Any], vocab: int, context: int, device: torch.device) -> list[dict[str, float | None]]:
    """Tokens per second of every model: one sequence of up to 256 tokens, then 24 greedy steps with a cache.

    A model that generates nothing has no speed of decoding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, min(_PREFILL, context)), generator=generator).to(device)
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    for turn in range(_ROUNDS + 1):
        order = range(len(models)) if turn % 2 else reversed(range(len(models)))
        for index in order:
            took = (
                _prefill_seconds(models[index], ids),
                _decode_seconds(models[index], ids[:, : min(_PROMPT, context // 2)])
                if models[index].can_generate()
                else None,
            )
            if turn:  # the first round warms up
                prefill[index].append(ids.shape[1] / took[0])
                decode[index] += [] if took[1] is None else [took[1]]
    return [
        {
            "prefill_tokens_per_second": statistics.median(prefill[index]),
            "decode_tokens_per_second": statistics.median(decode[index]) if decode[index] else None,
        }
        for index in range(len(models))
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _prefill_seconds(model: Any, ids: torch.Tensor) -> float:
    started = _now(ids.device)
    model(input_ids=ids, use_cache=False)
    return _now(ids.device) - started


@torch.no_grad()
def _decode_seconds(model: Any, prompt: torch.Tensor) -> float:
    """Tokens per second of greedy steps after the prompt."""
    steps = min(_DECODED, int(getattr(model.config, "max_position_embeddings", 2048)) - prompt.shape[1])
    output = model(input_ids=prompt, use_cache=True)
    started = _now(prompt.device)
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return steps / (_now(prompt.device) - started)
