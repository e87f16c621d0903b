"""The kernels of joint against brute force, and its decisions on planted redundancy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.budgets.tradeoff import Table, cheapest, steps
from secateur.checkpoints import Checkpoint, Folder
from secateur.engine.blocks import BlockRunner
from secateur.engine.edited import EditedCheckpoint
from secateur.engine.taps import Taps
from secateur.engine.walk import Walk
from secateur.mends import aim
from secateur.mends.values import value_basis
from secateur.methods.allocating import Curves
from secateur.scores.elimination import eliminate
from zoo import Where

DOUBLE = torch.float64


def _problem(seed: int, width: int = 12, out: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mean Gram and metric."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(300, width, dtype=DOUBLE, generator=generator) @ torch.randn(
        width, width, dtype=DOUBLE, generator=generator
    )
    root = torch.randn(out, out, dtype=DOUBLE, generator=generator)
    return torch.randn(out, width, dtype=DOUBLE, generator=generator), signal.t() @ signal / 300, root @ root.t()


def _loss(weight: Tensor, gram: Tensor, metric: Tensor, gone: list[int]) -> float:
    """Half of tr(F E) when the others make up for columns that are gone, by least squares."""
    kept = [i for i in range(len(gram)) if i not in gone]
    best = weight[:, kept] + weight[:, gone] @ gram[gone][:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    error = weight.clone()
    error[:, kept] -= best
    return float(torch.trace(metric @ error @ gram @ error.t()) / 2)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_elimination_against_brute_force(seed: int, group: int) -> None:
    """Every step removes the unit that is cheapest then, and the curve is the exact least-squares loss."""
    weight, gram, metric = _problem(seed)
    found = eliminate(weight, gram, metric, group, 1e-12)
    units, gone = 12 // group, list[int]()
    columns = lambda unit: list(range(unit * group, (unit + 1) * group))  # noqa: E731
    for step in range(units - 1):
        there = [unit for unit in range(units) if columns(unit)[0] not in gone]
        losses = {unit: _loss(weight, gram, metric, gone + columns(unit)) for unit in there}
        chosen = int(found.order[step])
        assert losses[chosen] == pytest.approx(min(losses.values()), rel=1e-6)
        assert float(found.costs[step + 1]) == pytest.approx(losses[chosen], rel=1e-6)
        gone += columns(chosen)
    assert sorted(found.order.tolist()) == list(range(units))
    assert (found.costs.diff() >= -1e-9).all()
    assert found.kept(2).tolist() == sorted(found.order[-2:].tolist())


def test_silent_and_duplicate_columns_go_first_at_no_cost() -> None:
    weight, gram, metric = _problem(3)
    weight[:, 7] = 0
    gram[:, 4], gram[4] = gram[:, 2], gram[2]
    gram[4, 4] = gram[2, 2]
    found = eliminate(weight, gram, metric, 1, 1e-10)
    assert set(found.order[:2].tolist()) <= {7, 4, 2}
    assert float(found.costs[2]) < 1e-6 * float(found.costs[-1])


@settings(max_examples=40)
@given(data=st.data())
def test_tradeoff_of_convex_tables_is_the_best(data: st.DataObject) -> None:
    """Against all combinations, where every step saves as much."""
    tables = []
    for _ in range(data.draw(st.integers(1, 3))):
        slopes = sorted(data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=5)))
        tables.append(steps(torch.tensor([0.0, *torch.tensor(slopes).cumsum(0).tolist()], dtype=DOUBLE), 1, 1.0))
    most = sum(len(table.costs) - 1 for table in tables)
    need = data.draw(st.integers(0, most))
    chosen = cheapest(tables, need)
    assert sum(chosen) == need
    every = product(*(range(len(table.costs)) for table in tables))

    def cost(pick: Sequence[int]) -> float:
        return sum(float(table.costs[i]) for table, i in zip(tables, pick, strict=True))

    assert cost(chosen) == min(cost(pick) for pick in every if sum(pick) == need)


def test_tradeoff_fills_up_beside_a_large_step() -> None:
    """A choice that overshoots is left, and small steps elsewhere make up for it."""
    large = Table(torch.tensor([0.0, 0.1], dtype=DOUBLE), torch.tensor([0.0, 100.0], dtype=DOUBLE))
    small = steps(torch.arange(41, dtype=DOUBLE), 1, 1.0)
    assert cheapest([large, small], 30) == [0, 30]
    assert cheapest([large, small], 120) == [1, 20]


@pytest.mark.parametrize("heads", [1, 3])
def test_value_basis_against_the_error_it_promises(heads: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    readers = [torch.randn(7, 6, dtype=DOUBLE, generator=generator) for _ in range(heads)]
    signals = [torch.randn(200, 6, dtype=DOUBLE, generator=generator) for _ in range(heads)]
    root = torch.randn(7, 7, dtype=DOUBLE, generator=generator)
    metric = root @ root.t()
    basis = value_basis(readers, [signal.t() @ signal / 200 for signal in signals], metric)
    assert torch.allclose(basis.restore @ basis.reduce, torch.eye(6, dtype=DOUBLE), atol=1e-5)
    last = torch.zeros(6, dtype=DOUBLE)
    last[-1] = 1
    dropped = basis.restore @ torch.diag(last) @ basis.reduce
    errors = [reader @ dropped @ signal.t() for reader, signal in zip(readers, signals, strict=True)]
    lost = sum(float(torch.trace(metric @ error @ error.t()) / 200 / 2) for error in errors)
    assert float(basis.costs[1]) == pytest.approx(lost, rel=1e-4)
    if heads == 1:  # the optimum: singular values of the product in both metrics
        left, right = torch.linalg.cholesky(metric).t(), torch.linalg.cholesky(signals[0].t() @ signals[0] / 200)
        values = torch.linalg.svdvals(left @ readers[0] @ right)
        assert torch.allclose(basis.costs[1:], values.square().flip(0).cumsum(0) / 2, rtol=1e-4)


def test_aim_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    signal, wanted = (torch.randn(100, width, dtype=DOUBLE, generator=generator) for width in (8, 5))
    weight, gram = torch.randn(5, 8, dtype=DOUBLE, generator=generator), signal.t() @ signal
    ridge = (1e-2 * gram.diagonal().mean()).sqrt() * torch.eye(8, dtype=DOUBLE)
    left, right = torch.cat([signal, ridge]), torch.cat([wanted, ridge @ weight.t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    assert torch.allclose(aim(weight, gram, wanted.t() @ signal, 1e-2), expected)


def _noted(model: Any, where: Where, place: int, ids: Tensor) -> dict[str, Tensor]:
    """Input of a block, and inputs and outputs (``y``) of the matrices that close its branches, tokens in rows."""
    notes: dict[str, Tensor] = {}
    block = model.get_submodule(where.blocks)[place]

    def entered(_: Any, inputs: Any, named: Any) -> None:
        notes["x"] = inputs[0] if inputs else named["hidden_states"]

    block.register_forward_pre_hook(entered, with_kwargs=True)
    for key, path in (("out", where.attention_out), ("down", where.ffn_reader)):

        def passed(_: Any, inputs: Any, output: Any, key: str = key) -> None:
            notes.update({key: inputs[0], f"{key}y": output})

        block.get_submodule(path).register_forward_hook(passed)
    masking.logits(model, ids)
    return {key: value.flatten(0, -2) for key, value in notes.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pairs_compare_the_dense_model_with_the_cut_one(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Against hooks on two whole stock models, one of them edited in its first block."""
    dense = Checkpoint(Folder(checkpoint(family, DOUBLE)))
    name = "blocks.0.down.weight"
    edits = {name: dense.read(0)[name] * 0.5}
    ids, place = models.token_ids(), 1
    runners = [BlockRunner(dense.architecture, DOUBLE, torch.device("cpu"), dense.rest()) for _ in range(2)]
    beside = Walk(dense, runners[0], ids, tmp_path, "dense")
    edited = EditedCheckpoint(dense, edits)
    walk = Walk(edited, runners[1], ids, tmp_path, "cut", beside)
    walk.run(edited.read(0))
    taps = Taps(runners[1], place, {"q.cross", "out.target", "down.target"})
    walk.run(edited.read(place), taps)
    found, where, seen = taps.evidence(), models.ALL[family].where, []
    state = {p.name: p.pack({**dense.read(0), **edits}) for p in dense.architecture.packed_of(0) if name in p.canonical}
    for changes in ({}, state):
        model = models.load(checkpoint(family, DOUBLE), dtype=DOUBLE)
        masking.put(model, changes)
        seen.append(_noted(model, where, place, ids))
    one, other = seen
    behind = one["x"] - other["x"]
    assert torch.allclose(found["out.target"], (one["outy"] + behind).t() @ other["out"], rtol=1e-5, atol=1e-8)
    behind = behind + one["outy"] - other["outy"]
    assert torch.allclose(found["down.target"], (one["downy"] + behind).t() @ other["down"], rtol=1e-5, atol=1e-8)
    assert found["q.cross"].shape == (one["x"].shape[1],) * 2


def test_planted_redundancy_goes_first(notes: Path, tmp_path: Path) -> None:
    """Silent neurons of one block are what a small budget takes, and the function stays."""
    silent = list(range(0, 1000, 2))

    def plant(state: dict[str, Tensor]) -> dict[str, Tensor]:
        down = state["model.layers.1.mlp.down_proj.weight"]
        down[:, silent[: down.shape[1] // 2]] = 0
        return state

    model = models.save(tmp_path / "model", "llama", DOUBLE, edit=plant)
    request = {"method": "joint", "ratio": 0.03, "data": notes, "samples": 8, "length": 32, "layout": "per-layer"}
    plan, _ = grid.plan_of(model, tmp_path / "out", **request)
    before, after = ([(b.ffn, b.kv) for b in sizes.blocks] for sizes in (plan.before, plan.after))
    assert [i for i in range(len(before)) if before[i] != after[i]] == [1]
    assert set(range(before[1][0])) - set(plan.kept["blocks.1.ffn"].tolist()) <= set(silent)


def test_sizes_of_rounds_shrink_and_meet_the_budget(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    request = {"method": "joint", "ratio": 0.2, "data": notes, "samples": 8, "length": 32, "layout": "per-layer"}
    result = secateur.prune(checkpoint("llama"), output=tmp_path / "out", options={"passes": 3}, **request)
    grid.check_counts(result, tmp_path / "out")
    removed = 1 - result.achieved["params"] / result.achieved["params_before"]
    assert removed == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("layout", ["native", "per-layer"])
def test_a_block_that_does_nothing_goes_whole(layout: str, notes: Path, tmp_path: Path) -> None:
    """Both branches of a block that writes nothing are tried, and go: as a block natively, as branches per layer."""

    def plant(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"model.layers.1.{name}.weight"].zero_()
        return state

    model = models.save(tmp_path / "model", "llama", DOUBLE, edit=plant)
    block = sum(p.numel() for p in Checkpoint(Folder(model)).read(1).values())
    ratio = block / Checkpoint(Folder(model)).params
    request = {"method": "joint", "ratio": ratio, "data": notes, "samples": 8, "length": 32, "layout": layout}
    plan, _ = grid.plan_of(model, tmp_path / "scratch", **request)
    result = secateur.prune(model, output=tmp_path / "out", **request)
    if layout == "native":
        assert 1 not in plan.blocks
        assert len(plan.after.blocks) == len(plan.before.blocks) - 1
    else:
        assert (plan.after.blocks[1].kv, plan.after.blocks[1].ffn) == (0, 0)
    assert {"ffn.1", "kv.1"} <= set(plan.notes["calibration"])
    assert result.achieved["params"] / result.achieved["params_before"] == pytest.approx(1 - ratio, abs=0.02)


def test_calibrated_curves_end_where_they_were_measured() -> None:
    """The whole branch costs what was measured, a small cut what the second order says; curves keep rising."""
    curve = torch.linspace(0, 1, 21, dtype=DOUBLE) ** 2 * 0.3
    curves = Curves({"ffn.0": curve, "kv.0": curve, "value.0": curve / 10})
    for factor in (0.5, 1.0, 3.0):
        found = curves.measured({"ffn.0": 0.3 * factor})
        assert float(found.ffn(0)[-1]) == pytest.approx(0.3 * factor)
        assert float(found.ffn(0)[1] / curve[1]) == pytest.approx(1, abs=0.01)
        assert bool((found.ffn(0).diff() > 0).all())
        assert found.attention(0, 3, 2, 4) == pytest.approx(float(curve[3] + 2 * curve[4] / 10))
    assert bool((curves.measured({"ffn.0": -1.0}).ffn(0).diff() > 0).all())


def test_a_tied_model_pays_for_untying(notes: Path, tmp_path: Path) -> None:
    """Where the stream has few directions, narrowing it is worth a head of its own; the written count includes it."""

    def plant(state: dict[str, Tensor]) -> dict[str, Tensor]:
        width = state["model.embed_tokens.weight"].shape[1]
        for name, tensor in state.items():
            if name.endswith("embed_tokens.weight"):
                tensor[:, width // 2 :] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[width // 2 :] = 0
        return state

    model = models.save(tmp_path / "model", "llama", DOUBLE, edit=plant, tie_word_embeddings=True)
    request = {"method": "joint", "ratio": 0.2, "data": notes, "samples": 8, "length": 32, "layout": "native"}
    plan, _ = grid.plan_of(model, tmp_path / "scratch", **request)
    assert plan.before.tied
    assert not plan.after.tied
    assert plan.after.residual < plan.before.residual
    grid.check_counts(secateur.prune(model, output=tmp_path / "out", **request), tmp_path / "out")
