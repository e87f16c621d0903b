"""Perplexity, once and for all.

The text is encoded once with the tokenizer's default special tokens and cut into windows of T = min(context of the
model, asked context, 2048) tokens, the tail dropped; each window predicts its T - 1 next tokens; the figure is exp of
the token-weighted mean of the float32 negative log-likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from secateur.checkpoints import Checkpoint
from secateur.checkpoints.loading import load_model
from secateur.data.sources import read_text
from secateur.data.windows import encode, load_tokenizer
from secateur.engine.blocks import BlockRunner
from secateur.engine.prepare import LONGEST_WINDOW, context_of
from secateur.errors import refuse
from secateur.families.stock import typed
from secateur.meters.memory import available_bytes

Logits = Callable[[Tensor], Tensor]
_BATCH_TOKENS = 2048
_SHARE_OF_MEMORY = 0.4


@dataclass(frozen=True)
class Text:
    """A held-out text as windows of token ids, [count, T]."""

    windows: Tensor

    @property
    def context(self) -> int:
        return int(self.windows.shape[1])

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.windows.shape[0] * (self.context - 1))

    @classmethod
    def read(
        cls, path: str, checkpoint: Checkpoint, context: int | None = None, trust_remote_code: bool = False
    ) -> Text:
        """Encode a text file for a model.

        Raises:
            RequestError: unreadable text, or one shorter than a window.
        """
        checkpoint.require_tokens(f"the perplexity of {path!r}")
        text = read_text(Path(path))
        ids = torch.from_numpy(encode(load_tokenizer(checkpoint.folder.path, trust_remote_code), text))
        length = min(context_of(checkpoint), context or LONGEST_WINDOW, LONGEST_WINDOW)
        count = len(ids) // length
        if not count:
            found = f"{len(ids)} tokens, shorter than one window of {length}"
            refuse("short-text", f"text {path!r}", found, "give more text or a smaller --context")
        if int(ids.max()) >= checkpoint.architecture.sizes.vocab:
            refuse("bad-tokens", f"text {path!r}", "the tokenizer's ids exceed the model's vocabulary")
        return cls(ids[: count * length].view(count, length))


def fits(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Whether the whole model may be held in memory."""
    return checkpoint.params * dtype.itemsize < _SHARE_OF_MEMORY * available_bytes()


def perplexity(
    checkpoint: Checkpoint,
    text: Text,
    dtype: torch.dtype,
    device: torch.device,
    model: torch.nn.Module | None = None,
) -> float:
    """Perplexity of a checkpoint on a text; block by block from the file where the whole model does not fit.

    Args:
        model: the checkpoint's model, where it is loaded already.
    """
    rows = max(1, _BATCH_TOKENS // text.context)
    batches = torch.split(text.windows, rows)
    if model is None and fits(checkpoint, dtype):
        model = load_stock(checkpoint, dtype, device)
    total = _streamed(checkpoint, batches, dtype, device) if model is None else _whole(model, batches, device)
    mean = total / text.tokens
    return math.exp(mean) if mean < 700 else math.inf


def load_stock(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model as transformers loads it."""
    model: torch.nn.Module = load_model(checkpoint.folder, **typed(dtype), local_files_only=True)
    return model.to(device).eval()


def _negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    flat = logits[:, :-1].float().flatten(0, 1)
    return float(functional.cross_entropy(flat, ids[:, 1:].flatten().to(flat.device), reduction="sum"))


@torch.no_grad()
def _whole(model: torch.nn.Module, batches: tuple[Tensor, ...], device: torch.device) -> float:
    return sum(
        _negative_log_likelihood(model(input_ids=batch.to(device), use_cache=False).logits, batch) for batch in batches
    )


def _streamed(checkpoint: Checkpoint, batches: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device) -> float:
    runner = BlockRunner(checkpoint.architecture, dtype, device, checkpoint.rest())
    runner.load(None, checkpoint.read(None))
    captured = [runner.capture(batch) for batch in batches]
    hidden, calls = [state for state, _ in captured], [call for _, call in captured]
    for block in range(len(runner.blocks)):
        runner.load(block, checkpoint.read(block))
        hidden = [runner.run(block, state, call[block]) for state, call in zip(hidden, calls, strict=True)]
        runner.unload(block)
    return sum(
        _negative_log_likelihood(runner.outputs(batch, state), batch)
        for batch, state in zip(batches, hidden, strict=True)
    )
