"""What a model is made for, as a loss: to predict the next token, or to put texts that belong together side by side.

Both are predictions among classes: of the tokens of a vocabulary, or of the texts of a small batch. Losses,
divergences and labels that the network draws itself are the same for both from there on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from secateur.checkpoints import Checkpoint
from secateur.data.pairs import PairedTexts
from secateur.data.windows import PADDING, Windows
from secateur.engine.blocks import BlockRunner
from secateur.errors import InternalError
from secateur.families.schema import Pooling

SCALE: Final = 20.0
"""What cosines are multiplied by before they compete, as sentence-transformers trains (temperature 0.05)."""


class Objective(Protocol):
    """The loss of a model on token ids [rows, length].

    Attributes:
        group: consecutive rows whose loss stands by itself: one sample.
        reads_head: whether the loss is of what the head gives.
    """

    @property
    def group(self) -> int: ...

    @property
    def reads_head(self) -> bool: ...

    def count(self, ids: Tensor) -> int:
        """Predictions that some rows give."""

    def predictions(self, runner: BlockRunner, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [predictions, classes] in float32 or wider, and the right classes [predictions].

        Args:
            runner: whose stem is loaded.
            ids: some whole groups of rows.
            hidden: the last block's output for them, on the runner's device.
        """


@dataclass(frozen=True)
class NextToken:
    """Every token of a window but the first is to be predicted from those before it."""

    group: int = 1
    reads_head: bool = True

    def count(self, ids: Tensor) -> int:
        return ids[:, 1:].numel()

    def predictions(self, runner: BlockRunner, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        flat = runner.outputs_of(ids, hidden)[:, :-1].float().flatten(0, 1)
        return flat, ids[:, 1:].flatten().to(flat.device)


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE: of all positives and negatives of a group of pairs, every query is to find its own positive.

    Attributes:
        pooling: what makes one vector of a text.
        parts: texts of an example: query, positive, and a negative where there is one.
        pairs: examples of a group, which compete with each other.
    """

    pooling: Pooling
    parts: int
    pairs: int
    reads_head: bool = False

    @property
    def group(self) -> int:
        return self.parts * self.pairs

    def count(self, ids: Tensor) -> int:
        return len(ids) // self.parts

    def predictions(self, runner: BlockRunner, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        signals = runner.outputs_of(ids, hidden, head=False)
        vectors = functional.normalize(pooled(signals, ids != PADDING, self.pooling), dim=-1)
        texts = vectors.view(-1, self.parts, self.pairs, vectors.shape[-1])
        queries, others = texts[:, 0], texts[:, 1:].flatten(1, 2)
        scores = SCALE * queries @ others.transpose(1, 2)
        return scores.flatten(0, 1), torch.arange(self.pairs, device=scores.device).repeat(len(texts))


def pooled(signals: Tensor, there: Tensor, pooling: Pooling) -> Tensor:
    """One vector of every text, [rows, width], in float32 or wider.

    Args:
        signals: behind the last norm, [rows, length, width].
        there: where a text has tokens, [rows, length]; they stand at the left.
    """
    wide = signals if signals.dtype == torch.float64 else signals.float()
    there = there.to(wide.device)
    if pooling == "cls":
        return wide[:, 0]
    if pooling == "last":
        return wide[torch.arange(len(wide), device=wide.device), there.sum(1) - 1]
    weights = there.to(wide.dtype)[..., None]
    return (wide * weights).sum(1) / weights.sum(1)


def told_objective(objective: Objective) -> dict[str, Any] | None:
    """An objective in plain words, for :func:`objective_told`."""
    if isinstance(objective, Contrastive):
        return {"pooling": objective.pooling, "parts": objective.parts, "pairs": objective.pairs}
    return None


def objective_told(said: Mapping[str, Any] | None) -> Objective:
    """The objective that another process told of."""
    return NextToken() if said is None else Contrastive(**said)


def objective_of(checkpoint: Checkpoint, data: Windows) -> Objective:
    """What a model is judged by on data that was drawn for it."""
    if not isinstance(data, PairedTexts):
        return NextToken()
    if checkpoint.embedding is None:
        raise InternalError("objective", "pairs of texts", "the model makes no embeddings")
    return Contrastive(checkpoint.embedding.pooling, data.parts, data.pairs)
