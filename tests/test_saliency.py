"""Densities that are measured and scores from gradients: knapsack, rate-distortion, ECoFLaP, SNIP, GraSP, SynFlow."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.budgets.knapsack import choose
from secateur.checkpoints import Checkpoint, Folder
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.errors import RequestError
from secateur.methods.synflow import Flow
from secateur.spaces.weights import all_matrices

DOUBLE = torch.float64
CURVES = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 5)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(CURVES, st.integers(1, 40))
def test_the_knapsack_is_the_brute_force(curves: list[list[tuple[int, float]]], budget: int) -> None:
    costs, losses = ([[point[i] for point in curve] for curve in curves] for i in (0, 1))
    possible = [
        (sum(loss[i] for loss, i in zip(losses, found, strict=True)), found)
        for found in itertools.product(*(range(len(curve)) for curve in curves))
        if sum(cost[i] for cost, i in zip(costs, found, strict=True)) <= budget
    ]
    if not possible:
        with pytest.raises(RequestError):
            choose(costs, losses, budget, budget)  # type: ignore[arg-type]
        return
    points = choose(costs, losses, budget, budget)  # type: ignore[arg-type]
    assert sum(cost[i] for cost, i in zip(costs, points, strict=True)) <= budget
    assert sum(loss[i] for loss, i in zip(losses, points, strict=True)) == pytest.approx(min(possible)[0])


STOCK = {
    **{role: f"self_attn.{role}_proj" for role in "qkv"},
    "out": "self_attn.o_proj",
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}


def _stock(name: str) -> str:
    """A matrix of a Llama as the stock class calls it."""
    _, block, role, _ = name.split(".")
    return f"model.layers.{block}.{STOCK[role]}.weight"


def _request(notes: Path, method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "data": str(notes), "samples": 8, "length": 16, "options": {"sparsity": 0.5, **options}}


def _loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def _windows(model: Path, notes: Path, folder: Path) -> Tensor:
    run = Run(prepare(make_request({"model": str(model), **_request(notes, "snip")})), folder, Silent())
    assert run.windows is not None
    return run.windows.ids


def _kept(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The best of all scores together."""
    pooled = torch.cat([each.flatten() for each in scores.values()])
    least = pooled.sort(descending=True).values[round(share * len(pooled)) - 1]
    return {name: each >= least for name, each in scores.items()}


def _equal(masks: Any, expected: dict[str, Tensor]) -> float:
    """Share of entries in which masks agree."""
    same = sum(int((masks[name] == mask).sum()) for name, mask in expected.items())
    return same / sum(mask.numel() for mask in expected.values())


def test_snip_is_the_gradient_of_a_gate(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama", DOUBLE)
    plan, _ = grid.plan_of(folder, tmp_path / "plan", **_request(notes, "snip"))
    model, ids = models.load(folder, dtype=DOUBLE), _windows(folder, notes, tmp_path / "ids")
    names = {_stock(name): name for name in plan.masks}
    gates = {stock: torch.ones_like(p, requires_grad=True) for stock, p in model.named_parameters() if stock in names}
    weights = dict(model.named_parameters())
    gated = {stock: weights[stock].detach() * gate for stock, gate in gates.items()}
    out = torch.func.functional_call(model, gated, (), {"input_ids": ids, "use_cache": False})
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = torch.autograd.grad(loss, list(gates.values()))
    scores = {names[stock]: gradient.abs() for stock, gradient in zip(gates, found, strict=True)}
    assert _equal(plan.masks, _kept(scores, 0.5)) > 0.9999


def test_grasp_is_the_slope_of_the_gradient_norm(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """w (H g), by differentiating half the squared gradient once more."""
    folder = checkpoint("llama", DOUBLE)
    plan, _ = grid.plan_of(folder, tmp_path / "plan", **_request(notes, "grasp", step=1e-4))
    model, ids = models.load(folder, dtype=DOUBLE), _windows(folder, notes, tmp_path / "ids")
    model.set_attn_implementation("eager")
    names = {_stock(name): name for name in plan.masks}
    chosen = {stock: p for stock, p in model.named_parameters() if stock in names}
    first = torch.autograd.grad(_loss(model, ids), list(chosen.values()), create_graph=True)
    half = sum(gradient.square().sum() for gradient in first) / 2
    assert isinstance(half, Tensor)
    second = torch.autograd.grad(half, list(chosen.values()))
    products = zip(chosen.items(), second, strict=True)
    scores = {names[stock]: p.detach() * product for (stock, p), product in products}
    assert _equal(plan.masks, _kept(scores, 0.5)) > 0.999


def test_synaptic_flow_is_the_gradient_of_a_sum_and_conserved(checkpoint: Checkpoints) -> None:
    """Against autograd on the linear network itself, written out for a Llama."""
    source = Checkpoint(Folder(checkpoint("llama", DOUBLE)))
    architecture, sizes = source.architecture, source.architecture.sizes
    weights = {}
    for place in range(len(sizes.blocks)):
        weights |= source.read(place)
    matrices = {m.name: weights[m.name].abs().requires_grad_(True) for m in all_matrices(architecture)}
    stream = torch.ones(sizes.residual, dtype=DOUBLE)
    for block in range(len(sizes.blocks)):
        own = {role: matrices[f"blocks.{block}.{role}.weight"] for role in STOCK}
        values = (own["v"] @ stream).view(-1, sizes.head).repeat_interleave(sizes.blocks[block].group, 0).flatten()
        stream = stream + own["out"] @ values
        stream = stream + own["down"] @ (own["gate"] @ stream + own["up"] @ stream)
    (stream.sum() / stream.sum().detach()).backward()
    expected = {name: m.grad * m.detach() for name, m in matrices.items() if m.grad is not None}
    assert len(expected) == 5 * len(sizes.blocks)
    found = Flow(architecture, weights).scores()
    for name, score in expected.items():
        assert torch.allclose(found[name], score, rtol=1e-9)
    for block in range(len(sizes.blocks)):
        sums = {role: float(found[f"blocks.{block}.{role}.weight"].sum()) for role in STOCK}
        assert sums["v"] == pytest.approx(sums["out"])
        assert [sums["q"], sums["k"]] == pytest.approx([sums["v"]] * 2), "what only chooses has the share of the values"
        assert sums["gate"] + sums["up"] == pytest.approx(sums["down"])


def test_rounds_keep_a_matrix_alive_that_one_round_empties(checkpoint: Checkpoints, tmp_path: Path) -> None:
    kept = {}
    for steps in (1, 30):
        request = {"method": "synflow", "options": {"sparsity": 0.99, "steps": steps}}
        plan, _ = grid.plan_of(checkpoint(), tmp_path / str(steps), **request)
        kept[steps] = min(plan.counts.values())
        assert sum(plan.counts.values()) == plan.notes["weights"]["kept"]
    assert kept[1] <= kept[30]
    assert kept[30] > 0


@pytest.mark.parametrize("method", ["ecoflap", "rd_dp_allocation", "snip", "grasp"])
def test_measured_densities_are_exact_and_differ(
    method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    result = secateur.prune(checkpoint(), output=tmp_path / "out", **_request(notes, method))
    kept = {n: int((p != 0).sum()) for n, p in models.load(tmp_path / "out").named_parameters() if "proj" in n}
    assert result.achieved["nonzero_before"] - result.achieved["nonzero"] == sum(
        p.numel() for n, p in models.load(tmp_path / "out").named_parameters() if n in kept
    ) - sum(kept.values())
    blocks = [sum(count for name, count in kept.items() if f"layers.{block}." in name) for block in range(2)]
    assert blocks[0] != blocks[1]


def _domain(tmp_path: Path) -> Path:
    path = tmp_path / "domain.txt"
    path.write_text(models.text(300, seed=5))
    return path


def test_d_pruner_is_taylor_and_its_penalty_acts(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Without the penalty |g w - F w^2 / 2| of the domain; with either form of it other weights stay."""
    folder, domain = checkpoint("llama", DOUBLE), _domain(tmp_path)
    masks = {}
    for name, options in {
        "plain": {"penalty": "none"},
        "nothing": {"strength": 0.0},
        "curvature": {},
        "step": {"penalty": "step"},
    }.items():
        request = _request(notes, "d_pruner", domain=str(domain), **options)
        masks[name] = grid.plan_of(folder, tmp_path / name, **request)[0].masks
    model, ids = models.load(folder, dtype=DOUBLE), _windows(folder, domain, tmp_path / "ids")
    names = {_stock(name): name for name in masks["plain"]}
    chosen = {stock: p for stock, p in model.named_parameters() if stock in names}
    each = [torch.autograd.grad(_loss(model, ids[i : i + 1]), list(chosen.values())) for i in range(len(ids))]
    for position, (stock, weight) in enumerate(chosen.items()):
        found = torch.stack([window[position] for window in each])
        wide = weight.detach()
        scores = (found.mean(0) * wide - 0.5 * found.square().mean(0) * wide.square()).abs()
        expected = _kept({names[stock]: scores}, 0.5)
        assert _equal(masks["plain"], expected) > 0.999
        assert _equal(masks["nothing"], expected) > 0.999
    for name in ("curvature", "step"):
        differing = sum(int((masks[name][n] != masks["plain"][n]).sum()) for n in masks["plain"])
        assert differing > 0.01 * sum(mask.numel() for mask in masks["plain"].values())


def test_signals_of_gaprune_act_unless_they_are_scaled_as_released(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """The released scaling gives the masks of magnitude, to a thousandth; ours does not."""
    folder, domain = checkpoint("llama", DOUBLE), _domain(tmp_path)
    plans = {}
    for name, options in {"literal": {"literal": True}, "ours": {}}.items():
        request = _request(notes, "gaprune", domain=str(domain), **options)
        plans[name] = grid.plan_of(folder, tmp_path / name, **request)[0]
    options = {"spaces": "weights", "part": "ffn", "allocation": "global", "sparsity": 0.5}
    magnitude = grid.plan_of(folder, tmp_path / "magnitude", method="magnitude", options=options)[0]
    expected = {name: magnitude.masks[name] for name in magnitude.masks}
    assert _equal(plans["literal"].masks, expected) > 0.99
    assert _equal(plans["ours"].masks, expected) < 0.98


def test_a_domain_needs_its_text(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="text of the domain"):
        secateur.prune(checkpoint(), output=tmp_path / "out", **_request(notes, "d_pruner"))
    assert not (tmp_path / "out").exists()
