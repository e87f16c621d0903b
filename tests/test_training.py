"""Parts of the training: adapters, objective, order and rates."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint
from secateur.errors import RequestError
from secateur.training.adapters import adapt, cut_shares, merged, ranks_of
from secateur.training.loop import Length, batch_rows, rate_factor
from secateur.training.objective import Objective, divergence
from secateur.training.options import Training, default_rate


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "llama-tied", "mixtral", "gpt_oss", "falcon", "deepseek_v3", "qwen3_moe"]
)
def test_the_merged_model_is_the_adapted_one(name: str, cut: Checkpoints) -> None:
    """Also with a rank of its own for every matrix, and for stacked experts."""
    checkpoint, model = Checkpoint.open(cut(name)), models.load(cut(name))
    names = {key for key, _ in model.named_parameters()}
    options = Training(rank=3, ranks={"0": 5, "down": 2, "1.down": 4, "2": 0})
    ranks = ranks_of(checkpoint.architecture, options, None)
    adapted = adapt(model, checkpoint.architecture, ranks, 2.0, seed=0)
    found = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert len(found) == 2 * len(ranks)
    assert not any(".2." in key.partition("lora")[0] for key in found)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.values():
            parameter.normal_(std=0.1, generator=generator)
        expected = adapted(input_ids=models.token_ids(), use_cache=False).logits
        plain = merged(adapted)
        torch.testing.assert_close(plain(models.token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - models.load(cut(name))(models.token_ids()).logits).abs().max() > 0.1
    assert {key for key, _ in plain.named_parameters()} == names


def test_ranks_by_block_and_role(cut: Checkpoints) -> None:
    architecture = Checkpoint.open(cut()).architecture
    ranks = ranks_of(architecture, Training(rank=3, ranks={"0": 5, "down": 2, "1.down": 4}), None)
    assert ranks["model.layers.0.mlp.down_proj.weight"] == 5  # a block before a role
    assert ranks["model.layers.1.mlp.down_proj.weight"] == 4
    assert ranks["model.layers.2.mlp.down_proj.weight"] == 2
    assert ranks["model.layers.2.self_attn.q_proj.weight"] == 3
    some = ranks_of(architecture, Training(rank=100, roles=("q", "down")), None)
    assert {key.split(".")[-2] for key in some} == {"q_proj", "down_proj"}
    assert some["model.layers.0.self_attn.q_proj.weight"] == 48  # no more than the matrix has


def test_automatic_ranks_follow_the_cut(cut: Checkpoints, checkpoint: Checkpoints) -> None:
    """Equal cuts get equal ranks; a block that lost nothing gets the least."""
    small, dense = Checkpoint.open(cut()).architecture, Checkpoint.open(checkpoint()).architecture
    before = dense.sizes
    assert len(set(cut_shares(small, before))) == 1
    even = ranks_of(small, Training(ranks="auto"), before)
    assert set(even.values()) == {16}
    with mock.patch("secateur.training.adapters.cut_shares", return_value=[0.3, 0.1, 0.0]):
        uneven = ranks_of(small, Training(rank=4, ranks="auto"), before)
    assert [uneven[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(3)] == [9, 3, 1]
    with pytest.raises(RequestError, match="nothing was cut"):
        ranks_of(dense, Training(ranks="auto"), before)
    with pytest.raises(RequestError, match="unknown what was cut"):
        ranks_of(dense, Training(ranks="auto"), None)


def test_divergence_is_zero_of_equals_only() -> None:
    one, other = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    assert float(divergence(one, one, 2.0)) == pytest.approx(0, abs=1e-6)
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=other[row, at] / 2),
            torch.distributions.Categorical(logits=one[row, at] / 2),
        )
        for row in range(2)
        for at in range(4)
    )
    assert float(divergence(one, other, 2.0)) == pytest.approx(4 * float(expected) / 8, rel=1e-5)


def test_the_objective_mixes(checkpoint: Checkpoints, cut: Checkpoints) -> None:
    teacher, student, ids = models.load(checkpoint()), models.load(cut()), models.token_ids()
    with torch.no_grad():
        losses = [float(Objective(Training(distill=w), teacher)(student, ids)[0]) for w in (0.0, 0.25, 1.0)]
        assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)
        assert float(Objective(Training(distill=1.0, hidden=1.0), teacher)(teacher, ids)[0]) == pytest.approx(
            0, abs=1e-5
        )


@given(batch=st.integers(1, 9), count=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_window_once_per_epoch(batch: int, count: int, seed: int) -> None:
    rows = np.concatenate([batch_rows(step, batch, count, seed) for step in range(count)])
    assert len(rows) == batch * count
    for epoch in np.split(rows, batch):
        assert sorted(epoch) == list(range(count))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule: str) -> None:
    factors = [rate_factor(share / 100, schedule, 0.1) for share in range(101)]
    assert factors[0] == 0
    assert max(factors) == factors[10] == 1
    assert factors[100] == (1 if schedule == "constant" else 0)
    assert Length(steps=10).progress(5, 0) == 0.5
    assert Length(steps=10, seconds=60).progress(5, 45) == 0.75


def test_the_default_rate_falls_with_the_width() -> None:
    assert default_rate("lora", 512) == default_rate("lora", 256) / 2
    assert default_rate("full", 8) == 4 * default_rate("full", 256)
