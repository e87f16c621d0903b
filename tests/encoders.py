"""Tiny sentence encoders: checkpoint folders as sentence-transformers writes them, and texts that belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

import models
from secateur.families.stock import quiet_transformers
from zoo import COMMON, CONTEXT, GQA, Tiny, Where

BERT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
}
ENCODERS: dict[str, Tiny] = {
    "bert": Tiny(
        BERT,
        Where(
            "encoder.layer",
            ("embeddings.word_embeddings", "embeddings.position_embeddings"),
            "attention.output.dense",
            "output.dense",
            "output.dense",
            attention="attention.self",
            ffn_readers=("intermediate.dense",),
        ),
    ),
    "qwen3": Tiny(GQA, Where("layers", ("embed_tokens",), final_norm="norm")),
}
"""Models without a head."""


def stock(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A stock model without a head, with random weights."""
    config = AutoConfig.for_model(name, **{**COMMON, **ENCODERS[name].config, **changes})
    with quiet_transformers():
        return models.randomised(AutoModel.from_config(config, dtype=dtype).eval())


def save(
    folder: Path, name: str = "bert", dtype: torch.dtype = torch.float32, pooling: str = "", **changes: Any
) -> Path:
    """Write a checkpoint folder, with the files of sentence-transformers where a pooling is named."""
    with quiet_transformers():
        stock(name, dtype, **changes).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    if pooling:
        described(folder, pooling)
    return folder


def described(folder: Path, pooling: str) -> None:
    """Say in the way of sentence-transformers how texts become vectors."""
    kind = "sentence_transformers.models."
    modules = [{"path": "", "type": f"{kind}Transformer"}, {"path": "1_Pooling", "type": f"{kind}Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    switches = {
        f"pooling_mode_{each}": each == pooling for each in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(switches))


def write_pairs(path: Path, count: int = 40, seed: int = 0, negatives: bool = False) -> Path:
    """Pairs of seeded texts of different lengths."""
    lines = []
    for i in range(count):
        words = models.text(3, seed * count + i).split()
        made = {"query": " ".join(words[: 3 + i % 5]), "positive": " ".join(words[3 + i % 5 : 9 + i % 7])}
        lines.append(made | ({"negative": " ".join(words[-4 - i % 3 :])} if negatives else {}))
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def write_scored(path: Path, count: int = 30) -> Path:
    """Scored pairs of sentences."""
    lines = []
    for i in range(count):
        words = models.text(2, 1000 + i).split()
        lines.append(
            {"sentence1": " ".join(words[:6]), "sentence2": " ".join(words[4 : 9 + i % 4]), "score": i % 7 / 2}
        )
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path
