"""How well the cosine of two embeddings orders pairs of sentences: Spearman's rank correlation with people's scores.

Files are those of STS tasks: lines ``{"sentence1": ..., "sentence2": ..., "score": ...}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from secateur.checkpoints import Checkpoint
from secateur.checkpoints.embedding import MODULES
from secateur.data.pairs import encoded
from secateur.data.sources import json_lines
from secateur.data.windows import PADDING, load_tokenizer
from secateur.engine.blocks import fed, given_by
from secateur.engine.objectives import pooled
from secateur.engine.prepare import longest_text
from secateur.errors import refuse

_BATCH = 64
_HINT = 'lines like {"sentence1": "...", "sentence2": "...", "score": 3.5}'


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs of sentences and how alike people find them."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def read(cls, path: str) -> ScoredPairs:
        """The pairs of a .jsonl file.

        Raises:
            RequestError: no such file, a line without the fields, or scores that are all the same.
        """
        rows = [_row(record, where) for where, record in json_lines(Path(path))]
        first, second, scores = zip(*rows, strict=True)
        if len(set(scores)) < 2:
            refuse("bad-pairs", f"pairs {path!r}", "their scores are all the same, and there is no order to find")
        return cls(first, second, scores)


def _row(record: Any, where: str) -> tuple[str, str, float]:
    fields = record if isinstance(record, dict) else {}
    first, second, score = (fields.get(key) for key in ("sentence1", "sentence2", "score"))
    if not (isinstance(first, str) and isinstance(second, str) and isinstance(score, int | float)):
        refuse("bad-pairs", where, f"its fields are {', '.join(map(str, fields)) or 'none'}", _HINT)
    return first, second, float(score)


def similarity(checkpoint: Checkpoint, pairs: ScoredPairs, model: torch.nn.Module, device: torch.device) -> float:
    """Spearman's rank correlation of cosines and scores, -1 to 1.

    Args:
        checkpoint: where the model was loaded from; its tokenizer reads the texts, its folder says how they are pooled.
        model: the loaded model.

    Raises:
        RequestError: the model makes no embeddings.
    """
    one, other = embeddings(checkpoint, [*pairs.first, *pairs.second], model, device).chunk(2)
    return spearman((one * other).sum(1).cpu().numpy(), np.asarray(pairs.scores))


@torch.no_grad()
def embeddings(checkpoint: Checkpoint, texts: list[str], model: Any, device: torch.device) -> Tensor:
    """Embeddings of length 1, [texts, width], in float32 or wider."""
    embedding = checkpoint.embedding
    if embedding is None:
        found = f"{type(model).__name__} predicts tokens, and no {MODULES} says how a text becomes a vector"
        refuse("no-embedding", "the similarity of pairs", found, "a model of sentence embeddings, or --text")
    tokenizer, length = load_tokenizer(checkpoint.folder.path), longest_text(checkpoint)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of about one length share a batch
    batches: list[Tensor] = []
    for start in range(0, len(order), _BATCH):
        ids = encoded(tokenizer, [texts[i] for i in order[start : start + _BATCH]], length)
        signals = given_by(model.base_model(**fed(ids.to(device)), use_cache=False))
        batches.append(functional.normalize(pooled(signals, ids != PADDING, embedding.pooling), dim=-1))
    back = torch.tensor(order).argsort()
    return torch.cat(batches)[back.to(device)]


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Rank correlation of two series; ties share the mean of their ranks. 0 where a series is constant."""
    ranks = [_ranks(np.asarray(values)) for values in (one, other)]
    if any(each.std() == 0 for each in ranks):
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    found: np.ndarray = (last - (count - 1) / 2)[place]
    return found
