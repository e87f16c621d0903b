"""Calibration windows: seeded random non-overlapping windows of whole tokenised documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.sources import Document, documents
from secateur.errors import refuse

PADDING = -1
"""In token ids: nothing stands there, because another text is longer."""
_RESERVOIR = 64  # read at most this many times the tokens that are wanted


@dataclass(frozen=True)
class Windows:
    """Token ids for calibration.

    Attributes:
        ids: [count, length] int64.
        digest: SHA-256 of the documents they were drawn from.
    """

    ids: Tensor
    digest: str

    def record(self) -> dict[str, int | str]:
        return {"windows": self.ids.shape[0], "length": self.ids.shape[1], "sha256": self.digest}


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder.

    Args:
        trust_remote_code: let a tokenizer class that lies in the folder run.

    Raises:
        RequestError: the folder has none.
    """
    from transformers import AutoTokenizer

    from secateur.families.stock import quiet_transformers

    hint = "add tokenizer.json, or give token ids as .npy"
    asked = f"tokenizer of {str(folder)!r}"
    with refusing("no-tokenizer", asked, "the folder has no usable one", hint), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextmanager
def refusing(code: str, asked: str, found: str, hint: str = "") -> Iterator[None]:
    """Whatever a tokenizer raises becomes a refusal: templates raise many kinds, and a panic is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        refuse(code, asked, f"{found} ({' '.join(str(error).split())[:200]})", hint)


def encode(tokenizer: Any, document: Document) -> np.ndarray:
    """Token ids of one whole document, with the tokenizer's default special tokens.

    Raises:
        RequestError: a chat, and the tokenizer has no template for it, or a document that it cannot take.
    """
    if isinstance(document, np.ndarray):
        return document
    if isinstance(document, list) and not getattr(tokenizer, "chat_template", None):
        refuse("no-chat-template", "chat messages in the data", "the model's tokenizer has no chat template")
    with refusing("bad-document", f"encoding {str(document)[:60]!r}", "the model's tokenizer cannot take it"):
        if isinstance(document, list):
            ids = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
        else:
            ids = tokenizer(document, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)


def _bytes_of(document: Document) -> bytes:
    if isinstance(document, np.ndarray):
        return document.tobytes()
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def calibration_windows(
    source: str,
    folder: Path,
    vocab: int,
    samples: int,
    length: int,
    seed: int,
    field: str = "text",
    trust_remote_code: bool = False,
) -> Windows:
    """Draw windows from a source.

    Args:
        source: see :func:`secateur.data.sources.documents`.
        folder: checkpoint folder that holds the tokenizer.
        vocab: number of valid token ids.
        samples: windows wanted; fewer when the text holds fewer.
        length: tokens of a window.
        seed: of the draw.

    Raises:
        RequestError: unreadable source, or a text shorter than one window.
    """
    tokenizer: Any = None
    digest, pieces, total = hashlib.sha256(), [], 0
    for document in documents(source, field):
        if tokenizer is None and not isinstance(document, np.ndarray):
            tokenizer = load_tokenizer(folder, trust_remote_code)
        digest.update(_bytes_of(document))
        ids = encode(tokenizer, document)
        pieces.append(ids)
        total += len(ids)
        if total >= _RESERVOIR * samples * length:
            break
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    if len(stream) < length:
        found = f"{len(stream)} tokens, shorter than one window of {length}"
        refuse("short-text", f"data {source!r}", found, "give more text or a smaller --length")
    if stream.min() < 0 or stream.max() >= vocab:
        found = f"token ids from {stream.min()} to {stream.max()}, the model knows 0 to {vocab - 1}"
        refuse("bad-tokens", f"data {source!r}", found)
    available = len(stream) // length
    chosen = np.sort(np.random.default_rng(seed).choice(available, size=min(samples, available), replace=False))
    ids = stream[: available * length].reshape(available, length)[chosen]
    return Windows(torch.from_numpy(np.ascontiguousarray(ids)), digest.hexdigest())
