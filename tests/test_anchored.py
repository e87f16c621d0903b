"""AdamR: Adam with decay towards where it began."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from recovery import recover
from secateur.errors import RequestError
from secateur.training.anchored import AdamR


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_decays_to_the_start_without_gradient(norm: str) -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = AdamR([weight], lr=0.1, strength=0.5, norm=norm)  # type: ignore[arg-type]
    with torch.no_grad():
        weight += torch.randn(4, 3, dtype=torch.float64)
    distances = []
    for _ in range(600):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        distances.append(float((weight.detach() - start).abs().max()))
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 1e-9


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_is_the_published_rule(norm: str) -> None:
    """Step by step against the formulas, with bias-corrected moments averaged over all parameters."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), torch.nn.Parameter(torch.randn(5).double())]
    lr, strength, betas, eps = 0.03, 0.04, (0.9, 0.99), 1e-8
    optimizer = AdamR(weights, lr, strength, norm, betas, eps)  # type: ignore[arg-type]
    starts = [weight.detach().clone() for weight in weights]
    expected = [start.clone() for start in starts]
    first, second = [torch.zeros_like(s) for s in starts], [torch.zeros_like(s) for s in starts]
    for step in range(1, 30):
        gradients = [torch.randn_like(start) for start in starts]
        for i, gradient in enumerate(gradients):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * gradient
            second[i] = betas[1] * second[i] + (1 - betas[1]) * gradient**2
        corrected = [moment / (1 - betas[1] ** step) for moment in second]
        root = math.sqrt(float(torch.cat([moment.flatten() for moment in corrected]).mean()))
        for i, start in enumerate(starts):
            delta = expected[i] - start
            pull = lr * strength / root
            expected[i] = expected[i] - (
                pull * delta if norm == "l2" else delta.sign() * torch.minimum(delta.abs(), torch.tensor(pull))
            )
            expected[i] -= lr * first[i] / (1 - betas[0] ** step) / (corrected[i].sqrt() + eps)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        for weight, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_strength_nought_is_adam() -> None:
    one, other = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    ours, adam = AdamR([one], lr=0.1, strength=0.0), torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for step in range(5):
        for weight in (one, other):
            weight.grad = torch.arange(5.0) - step
        ours.step()
        adam.step()
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="l3"):
        AdamR([one], norm="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below nought"):
        AdamR([one], strength=-1.0)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_recover_with_an_anchor_moves_less(norm: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    sizes = []
    start = dict(models.load(checkpoint()).named_parameters())
    strength = {"l2": 1.0, "l1": 0.01}[norm]
    for name, options in (("plain", {}), ("anchored", {"anchor": norm, "anchor_strength": strength})):
        recover(checkpoint(), tmp_path / name, notes, {**options, "learning_rate": 3e-3}, method="full")
        end = dict(models.load(tmp_path / name).named_parameters())
        sizes.append(sum(float((end[key] - tensor).detach().square().sum()) for key, tensor in start.items()))
    assert sizes[1] < 0.8 * sizes[0]
    record = json.loads((tmp_path / "anchored" / "secateur.json").read_text())
    assert record["recovery"][0]["requested"]["options"]["anchor"] == norm
    recover(checkpoint(), tmp_path / "again", notes, {**options, "learning_rate": 3e-3}, method="full")
    assert (
        grid.hashes(tmp_path / "again")["model.safetensors"] == grid.hashes(tmp_path / "anchored")["model.safetensors"]
    )


def test_anchor_is_refused_where_it_has_no_meaning(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="adapters begin at nothing"):
        recover(checkpoint(), tmp_path / "out", notes, {"anchor": "l2"}, method="lora")
    with pytest.raises(RequestError, match="weight_decay"):
        recover(checkpoint(), tmp_path / "out", notes, {"anchor": "l2", "weight_decay": 0.1}, method="full")
    with pytest.raises(RequestError, match="anchor"):
        secateur.recover(checkpoint(), method="full", data=notes, output=tmp_path / "o", options={"anchor": "l3"})
