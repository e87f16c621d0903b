"""Perplexity against a direct computation with transformers."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
import secateur
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint
from secateur.meters import perplexity as meter

CPU = torch.device("cpu")


@torch.no_grad()
def direct(folder: Path, text: str, context: int) -> tuple[float, int]:
    """The definition, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    total, count = 0.0, 0
    for start in range(0, len(ids) - context + 1, context):
        window = ids[start : start + context]
        scores = model(window[None]).logits[0].log_softmax(-1)
        total -= float(scores[:-1].gather(1, window[1:, None]).double().sum())
        count += context - 1
    return math.exp(total / count), count


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen2"])
def test_definition(name: str, checkpoint: Checkpoints, held_out: Path) -> None:
    figures = secateur.evaluate(checkpoint(name), text=held_out, context=48)
    wanted, tokens = direct(checkpoint(name), held_out.read_text(), 48)
    assert figures["tokens"] == tokens
    assert figures["context"] == 48
    assert figures["perplexity"] == pytest.approx(wanted, rel=1e-5)


def test_context_is_at_most_the_model_s(checkpoint: Checkpoints, held_out: Path) -> None:
    assert secateur.evaluate(checkpoint(), text=held_out, context=1000)["context"] == models.CONTEXT


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-bare", "opt", "mixtral", "qwen2", "sharded"])
def test_streamed_is_whole(name: str, checkpoint: Checkpoints, held_out: Path) -> None:
    """Block by block from the file, as for a model larger than memory."""
    source = Checkpoint.open(checkpoint(name))
    text = meter.Text.read(str(held_out), source, 32)
    whole = meter.perplexity(source, text, torch.float32, CPU)
    with mock.patch.object(meter, "fits", return_value=False):
        streamed = meter.perplexity(source, text, torch.float32, CPU)
    assert streamed == pytest.approx(whole, rel=1e-6)


@pytest.mark.assets
def test_reference_figure(assets: Path) -> None:
    """The figure that came with the model."""
    figures = secateur.evaluate(
        assets / "lm" / "stories260k-llama", text=assets / "text" / "tinystories-sample" / "test.txt", context=256
    )
    assert figures["perplexity"] == pytest.approx(5.651, abs=1e-3)
