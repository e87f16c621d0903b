"""Texts that belong together: ``{"query": ..., "positive": ...}``, with a ``negative`` where there is one.

What embedding models are judged by. A query shall be nearer to its positive than to the positives (and negatives) of
the other lines that it is drawn with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from secateur.data.sources import json_lines, source_files
from secateur.data.windows import PADDING, Windows, load_tokenizer, refusing
from secateur.errors import refuse

TOGETHER: Final = 8
"""Pairs that compete with each other: the paper's micro-batches are as large."""
_HINT: Final = 'a .jsonl file with lines {"query": "...", "positive": "..."}, and "negative" if there are any'
_QUERY: Final = ("query", "anchor")


@dataclass(frozen=True)
class PairedTexts(Windows):
    """Texts of pairs, group by group: the queries of a group, their positives, their negatives.

    Rows of ``ids`` are as long as the longest text, the others are filled up with ``PADDING``.

    Attributes:
        parts: texts of an example, 2 or 3.
        pairs: examples of a group.
    """

    parts: int
    pairs: int

    def record(self) -> dict[str, int | str]:
        return {**super().record(), "pairs": len(self.ids) // self.parts, "parts": self.parts, "together": self.pairs}


def read_pairs(source: str) -> list[tuple[str, ...]]:
    """The examples of a file (or of all .jsonl files of a folder): query, positive, and negative if they have one.

    Raises:
        RequestError: no such file, a line without the fields, or with a negative where others have none.
    """
    found: list[tuple[str, ...]] = []
    files = [path for path in source_files(source) if path.suffix == ".jsonl"]
    if not files:
        what = "it holds no pairs" if Path(source).exists() else "there is no such file or folder"
        refuse("no-data", f"data {source!r} for a model of embeddings", what, _HINT)
    for path in files:
        for where, record in json_lines(path):
            example = _example(record, where)
            if found and len(example) != len(found[0]):
                refuse(
                    "bad-pairs", where, "some lines have a negative and some have none", "give all of them one, or none"
                )
            found.append(example)
    return found


def _example(record: Any, where: str) -> tuple[str, ...]:
    fields = record if isinstance(record, dict) else {}
    query = next((fields[key] for key in _QUERY if key in fields), None)
    example = (query, fields.get("positive"), *([fields["negative"]] if "negative" in fields else []))
    if not all(isinstance(text, str) and text.strip() for text in example):
        refuse("bad-pairs", where, f"its fields are {', '.join(map(str, fields)) or 'none'}", _HINT)
    return example


def paired_texts(
    source: str, folder: Path, vocab: int, samples: int, length: int, seed: int, trust_remote_code: bool = False
) -> PairedTexts:
    """Draw pairs from a source.

    Args:
        source: see :func:`read_pairs`.
        folder: checkpoint folder that holds the tokenizer.
        vocab: number of valid token ids.
        samples: pairs wanted; fewer where the source holds fewer, and always whole groups.
        length: tokens at which a text is cut.
        seed: of the draw.

    Raises:
        RequestError: unreadable source, or a single pair, which has nothing to compete with.
    """
    examples = read_pairs(source)
    digest = hashlib.sha256(json.dumps(examples, ensure_ascii=False).encode()).hexdigest()
    wanted = min(samples, len(examples))
    together = min(TOGETHER, wanted)
    if together < 2:
        refuse("short-text", f"data {source!r}", f"{wanted} pair has no other to compete with", "give more pairs")
    chosen = np.random.default_rng(seed).choice(len(examples), size=wanted - wanted % together, replace=False)
    groups = [[examples[i] for i in chosen[start : start + together]] for start in range(0, len(chosen), together)]
    texts = [text for group in groups for part in zip(*group, strict=True) for text in part]
    ids = encoded(load_tokenizer(folder, trust_remote_code), texts, length)
    if int(ids.max()) >= vocab:
        refuse("bad-tokens", f"data {source!r}", "the tokenizer's ids exceed the model's vocabulary")
    return PairedTexts(ids, digest, len(examples[0]), together)


def encoded(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Token ids of texts, cut at ``length``, [texts, longest], filled up with ``PADDING`` at the right."""
    with refusing("bad-document", f"encoding {texts[0][:60]!r} and others", "the model's tokenizer cannot take them"):
        rows = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), PADDING, dtype=torch.int64)
    for row, found in zip(ids, rows, strict=True):
        row[: len(found)] = torch.tensor(found)
    return ids
