"""dotresize and dynamic_slicing: transport plans, merges, schedules."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.budgets.schedule import redundancy, slices
from secateur.errors import RequestError
from secateur.evidence import Samples
from secateur.scores.transport import directions_of, pair_costs, targets, transport

DOUBLE = torch.float64
SMALL: dict[str, Any] = {"samples": 8, "length": 32, "layout": "per-layer"}


def _signals(seed: int, rows: int = 80, width: int = 12) -> Tensor:
    return torch.randn(rows, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# -- transport -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_marginals_and_optimality(seed: int, strength: float) -> None:
    """Uniform marginals; and the plan is that of plain Sinkhorn scaling, where numbers allow it."""
    cost = torch.rand(20, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    plan = transport(cost, strength, 5000)
    assert torch.allclose(plan.sum(1), torch.full((20,), 1 / 20, dtype=DOUBLE), atol=1e-6)
    assert torch.allclose(plan.sum(0), torch.full((7,), 1 / 7, dtype=DOUBLE), atol=1e-6)
    kernel = torch.exp(-cost / cost.mean() / strength)
    left, right = torch.ones(20, dtype=DOUBLE), torch.ones(7, dtype=DOUBLE)
    for _ in range(20000):
        left = (1 / 20) / (kernel @ right)
        right = (1 / 7) / (kernel.t() @ left)
    assert torch.allclose(plan, left[:, None] * kernel * right, atol=1e-6)


def test_a_small_lambda_assigns_clusters() -> None:
    """Separated clusters of equal size: every neuron goes to the target of its own cluster."""
    centres, noise = _signals(0, width=3) * 10, _signals(1, width=12) * 0.01
    signals = centres.repeat_interleave(4, 1) + noise
    cost, _ = pair_costs(signals, signals.t() @ signals, "l1", False, False)
    plan = transport(cost[:, [0, 4, 8]], 1e-3)
    owners = torch.eye(3, dtype=DOUBLE).repeat_interleave(4, 0) / 12
    assert torch.allclose(plan, owners, atol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_costs_against_their_definitions(signed: bool, normalise: bool) -> None:
    signals = _signals(3)
    columns = signals / signals.norm(dim=0) if normalise else signals
    for cost in ("l1", "squared"):
        found, signs = pair_costs(signals, signals.t() @ signals, cost, normalise, signed)  # type: ignore[arg-type]
        for i in range(12):
            for j in range(12):
                gaps = [columns[:, i] - sign * columns[:, j] for sign in ((1, -1) if signed else (1,))]
                every = [float(g.abs().sum() if cost == "l1" else g.square().sum()) for g in gaps]
                assert float(found[i, j]) == pytest.approx(min(every), abs=1e-9)
                assert float(signs[i, j]) == (1.0 if every[0] <= min(every) + 1e-12 else -1.0)


def test_the_merge_is_a_projector() -> None:
    """Q Q^T == T T^+, whatever R: columns of T scaled or mixed give the same projector."""
    signals = _signals(4)
    cost, _ = pair_costs(signals, signals.t() @ signals, "l1", True, False)
    kept = targets(signals, cost, 5)
    plan = transport(cost[:, kept], 0.1)
    directions = directions_of(plan, kept)
    assert torch.allclose(directions @ directions.t(), plan @ torch.linalg.pinv(plan), atol=1e-9)
    mixed = directions_of(plan @ _signals(5, 5, 5), kept)
    assert torch.allclose(mixed @ mixed.t(), directions @ directions.t(), atol=1e-8)


def test_a_flat_plan_falls_back_to_units() -> None:
    """A huge lambda makes all columns equal: one direction is left, kept units make up for the others."""
    kept = torch.tensor([1, 4, 7])
    directions = directions_of(torch.full((10, 3), 1 / 30, dtype=DOUBLE), kept)
    assert torch.allclose(directions.t() @ directions, torch.eye(3, dtype=DOUBLE), atol=1e-12)
    projector = directions @ directions.t()
    ones = torch.ones(10, dtype=DOUBLE)
    assert torch.allclose(projector @ ones, ones, atol=1e-9)
    span = torch.cat([ones[:, None], torch.eye(10, dtype=DOUBLE)[:, kept]], 1)
    assert torch.allclose(span @ torch.linalg.pinv(span) @ directions, directions, atol=1e-9)


@pytest.mark.parametrize("cost", ["l1", "squared"])
def test_duplicates_are_merged_exactly(cost: Any) -> None:
    """d = 2k neurons in pairs: one of each pair is a target, and the projector changes nothing."""
    signals = _signals(6, width=6).repeat(1, 2)
    distances, _ = pair_costs(signals, signals.t() @ signals, cost, False, False)
    kept = targets(signals, distances, 6)
    assert sorted(int(i) % 6 for i in kept) == list(range(6))
    directions = directions_of(transport(distances[:, kept], 0.1), kept)
    assert torch.allclose(signals @ directions @ directions.t(), signals, atol=1e-9)


def test_samples_are_spread_and_pass_over_first_tokens() -> None:
    collector = Samples(10)
    for start in range(0, 64, 8):
        signal = torch.arange(start * 9, (start + 8) * 9).view(8, 9, 1).float()
        collector.add(signal)
    rows = collector.named("x")["x.samples"].flatten()
    assert 10 <= len(rows) < 20
    assert (rows % 9 != 0).all()
    places = (rows // 9) * 8 + rows % 9 - 1  # among the rows that count
    assert len(set(places.diff().tolist())) == 1


# -- dotresize on models ---------------------------------------------------------------------------------------------


def test_pca_is_slicegpt_bit_for_bit(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for layout in ("native", "per-layer"):
        made = {**SMALL, "layout": layout, "data": notes, "ratio": 0.15}
        one, other = tmp_path / f"one-{layout}", tmp_path / f"other-{layout}"
        secateur.prune(checkpoint("llama"), method="slicegpt", output=one, **made)
        secateur.prune(checkpoint("llama"), method="dotresize", options={"basis": "pca"}, output=other, **made)
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("cost", ["l1", "squared"])
def test_duplicated_neurons_go_for_nothing(cost: str, notes: Path, tmp_path: Path) -> None:
    """The FFN variant: half of the neurons are copies, and half of them go."""
    model = models.save(tmp_path / "model", "llama", DOUBLE)
    state = load_file(model / "model.safetensors")
    for name, tensor in state.items():
        if ".mlp." in name:
            half = tensor.shape[1 if "down" in name else 0] // 2
            if "down" in name:
                state[name] = torch.cat([tensor[:, :half]] * 2, 1).contiguous()
            else:
                state[name] = torch.cat([tensor[:half]] * 2).contiguous()
    save_file(state, model / "model.safetensors", {"format": "pt"})
    options = {"spaces": "ffn", "sparsity": 0.5, "cost": cost, "strength": 1e-3}
    output = tmp_path / "out"
    secateur.prune(model, method="dotresize", output=output, data=notes, samples=8, length=32, options=options)
    ids = models.token_ids()
    dense, cut = (models.load(folder, dtype=DOUBLE) for folder in (model, output))
    assert masking.difference(masking.logits(dense, ids), masking.logits(cut, ids)) < 1e-6
    assert cut.config.intermediate_size * 2 == dense.config.intermediate_size


def test_without_the_extra_it_says_so(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ot.bregman", None)
    with pytest.raises(RequestError, match=r"secateur\[ot\]"):
        secateur.prune(
            checkpoint(), method="dotresize", ratio=0.15, data=notes, samples=8, length=32, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


# -- schedules -------------------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    """Section 11 of the notes on the paper: L = 4, S_P = 30 %, S_B = 10 %, d = 4096."""
    found = slices([0.0, 0.5, 1.0, 0.5], 0.30, 0.10, 0.8)
    assert found == pytest.approx([0.10, 0.30, 0.50, 0.30])
    assert [int(4096 * (1 - share)) // 8 * 8 for share in found] == [3680, 2864, 2048, 2864]
    assert slices([0, 0, 0, 1], 0.30, 0.10, 0.95)[3] == pytest.approx(0.9)


def test_no_share_exceeds_what_there_is() -> None:
    """The released code gives 1.2 here, and a negative width; ours clips, and the others make up for it."""
    found = slices([0, 0, 0, 1], 0.30, 0.0, 0.8)
    assert found[3] == pytest.approx(0.8)
    assert sum(found) / 4 == pytest.approx(0.30)
    found = slices([0, 0.1, 0.2, 1], 0.30, 0.0, 0.8)
    assert max(found) == pytest.approx(0.8)
    assert sum(found) / 4 == pytest.approx(0.30)
    assert found == sorted(found)


@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    mean=st.floats(0.01, 0.79),
    amount=st.floats(0, 1),
)
def test_the_mean_is_as_asked(weights: list[float], mean: float, amount: float) -> None:
    found = slices(weights, mean, (1 - amount) * mean, 0.8)
    assert float(sum(map(Fraction, found)) / len(found)) == pytest.approx(mean, abs=1e-9)
    assert all(-1e-12 <= share <= 0.8 + 1e-12 for share in found)


def test_raw_sums_are_not_mistaken_for_redundancy() -> None:
    """The layer that changes most has the redundancy 0, whatever unit the influence has."""
    assert redundancy([3.0, 1.0, 2.0]) == [0.0, 1.0, 0.5]
    assert redundancy([300.0, 100.0, 200.0]) == [0.0, 1.0, 0.5]
    assert redundancy([1.0, 1.0]) == [0.0, 0.0]


def _dynamic(model: Path, output: Path, notes: Path, **options: Any) -> dict[str, Any]:
    ratio = {} if "sparsity" in options else {"ratio": 0.15}
    method = options.pop("method", "dynamic_slicing")
    secateur.prune(model, method=method, data=notes, output=output, options=options, **SMALL, **ratio)
    record: dict[str, Any] = json.loads((output / "secateur.json").read_text())
    return record


@pytest.mark.parametrize("knob", [{}, {"sparsity": 0.3}])
def test_without_an_amount_it_is_slicegpt(
    knob: dict[str, float], checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    for name in ("llama", "gpt2"):
        one, other = tmp_path / f"one-{name}", tmp_path / f"other-{name}"
        _dynamic(checkpoint(name), one, notes, amount=0, **knob)
        _dynamic(checkpoint(name), other, notes, method="slicegpt", **knob)
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def _widths(record: dict[str, Any]) -> list[int]:
    return [block["attention_read"] or record["after"]["residual"] for block in record["after"]["blocks"]]


def test_a_layer_that_does_nothing_is_cut_most(notes: Path, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama", DOUBLE)
    state = load_file(model / "model.safetensors")
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.1.{role}.weight"].zero_()
    save_file(state, model / "model.safetensors", {"format": "pt"})
    widths = _widths(_dynamic(model, tmp_path / "out", notes, amount=1.0))
    assert widths[1] == min(widths) < max(widths)


def test_the_shortcuts_are_saved(notes: Path, tmp_path: Path) -> None:
    """What lies in the folder computes what was planned, shortcuts included (the released code loses them)."""
    model = models.save(tmp_path / "model", "llama", DOUBLE)
    record = _dynamic(model, tmp_path / "out", notes, sparsity=0.3, base=0.1)
    full, widths = record["before"]["residual"], _widths(record)
    assert len(set(widths)) > 1
    assert all(width % 8 == 0 or width == full for width in widths)
    cut = secateur.load(tmp_path / "out", dtype=DOUBLE)
    assert sum(name.endswith(".shortcut") for name, _ in cut.named_parameters()) == 2 * len(widths)
    asked = {"method": "dynamic_slicing", "data": notes, "options": {"sparsity": 0.3, "base": 0.1}, **SMALL}
    plan, _ = grid.plan_of(model, tmp_path / "planned", **asked)
    dense = masking.swap_precise_parts(models.load(model, dtype=DOUBLE))
    expected = masking.logits(masking.mask(dense, models.ALL["llama"].where, plan), models.token_ids())
    found = masking.logits(masking.swap_precise_parts(cut), models.token_ids())
    assert masking.difference(expected, found) < 1e-10


def test_schedules_serve_every_basis(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for method in ("slicegpt", "dotresize"):
        record = _dynamic(checkpoint(), tmp_path / method, notes, method=method, schedule="redundancy", amount=1.0)
        assert len(set(_widths(record))) > 1
        options = {"schedule": "redundancy"}
        with pytest.raises(RequestError, match="per-layer"):
            secateur.prune(checkpoint(), method=method, ratio=0.15, data=notes, options=options, output=tmp_path / "no")


def test_the_whole_head(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    record = _dynamic(checkpoint(), tmp_path / "out", notes, head="whole")
    assert record["after"]["residual"] == record["before"]["residual"]
    assert record["after"]["stem_read"] == 0
