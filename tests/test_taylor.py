"""Taylor scores against autograd and finite differences on the whole stock model; what the methods make of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.engine.journal import work_folder
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.engine.sweeps import view_of
from secateur.engine.trials import CalibrationTrials
from secateur.errors import RequestError
from secateur.methods.adapt_pruner import importance
from secateur.methods.base import Study
from secateur.methods.llm_pruner import LlmPruner
from secateur.methods.taylor import Groups
from secateur.scores.taylor import saliency

DOUBLE = torch.float64
ORDERS = ("vectorize", "param_first", "param_second", "param_mix", "param_rms")
REDUCTIONS = ("sum", "mean", "max", "prod", "first")


def _request(notes: Path, method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "ratio": 0.15, "data": str(notes), "samples": 8, "length": 16, **more}


def _groups(model: Path, notes: Path, folder: Path, **options: Any) -> tuple[Groups, Tensor]:
    """Scored groups, and the windows they are scored on."""
    run = Run(
        prepare(make_request({"model": str(model), **_request(notes, "llm_pruner", options=options)})), folder, Silent()
    )
    assert run.windows is not None
    prepared, windows = run.prepared, run.windows
    study = Study(prepared.budget, torch.Generator(), lambda place, roles: view_of(run.checkpoint, place, roles))
    study.make_trials = lambda: CalibrationTrials(
        run.checkpoint, windows, prepared.dtype, prepared.device, run.work, run.journal
    )
    groups = Groups(study, prepared.method)  # type: ignore[arg-type]
    groups.measure()
    return groups, windows.ids


def _loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


def _gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _weights_of(model: Any, layer: int, kind: str, unit: int) -> dict[str, tuple[str, Any]]:
    """The rows and columns of a group, by hand: of a key/value head with the query heads that share it."""
    config, prefix = model.config, f"model.layers.{layer}."
    if kind == "ffn":
        row, column = (slice(unit, unit + 1), slice(None)), (slice(None), slice(unit, unit + 1))
        return {
            "gate": (prefix + "mlp.gate_proj.weight", row),
            "up": (prefix + "mlp.up_proj.weight", row),
            "down": (prefix + "mlp.down_proj.weight", column),
        }
    head, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    own, queries = slice(unit * head, (unit + 1) * head), slice(unit * share * head, (unit + 1) * share * head)
    return {
        "k": (prefix + "self_attn.k_proj.weight", (own, slice(None))),
        "q": (prefix + "self_attn.q_proj.weight", (queries, slice(None))),
        "v": (prefix + "self_attn.v_proj.weight", (own, slice(None))),
        "out": (prefix + "self_attn.o_proj.weight", (slice(None), queries)),
    }


_COLUMNS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _channel_of(model: Any, unit: int) -> dict[str, tuple[str, Any]]:
    """The rows and columns of a dimension of the stream, the embedding's first."""
    found = {}
    for name, parameter in model.named_parameters():
        reads = any(f"{word}.weight" in name for word in _COLUMNS)
        where = (slice(None), slice(unit, unit + 1)) if reads else (slice(unit, unit + 1), slice(None))
        found[name + (":down" if reads else "")] = (name, where[: parameter.ndim])
    return found


def _expected(model: Any, ids: Tensor, weights: dict[str, tuple[str, Any]], order: str, reduction: str) -> float:
    mean = _gradients(model, ids)
    each = [_gradients(model, row[None]) for row in ids]
    parameters = dict(model.named_parameters())
    found = []
    for role, (name, where) in weights.items():
        w, g = parameters[name][where].detach(), mean[name][where]
        fisher = torch.stack([one[name][where].square() for one in each]).mean(0)
        lines = {
            "vectorize": lambda w=w, g=g, role=role: (w * g).sum(0 if role.endswith(("down", "out")) else -1).abs(),
            "param_first": lambda w=w, g=g: (w * g).abs(),
            "param_second": lambda w=w, f=fisher: w * w * f,
            "param_mix": lambda w=w, g=g, f=fisher: (w * g - w * w * f / 2).abs(),
            "param_rms": lambda w=w, f=fisher: w.abs() * f.sqrt(),
        }[order]()
        found.append(float(lines.sum()))
    stacked = torch.tensor(found, dtype=DOUBLE)
    reduced = {"sum": stacked.sum(), "mean": stacked.mean(), "max": stacked.max(), "prod": stacked.prod()}
    return float(reduced.get(reduction, stacked[0]))


@pytest.mark.parametrize(
    ("order", "reduction"), [*((o, "sum") for o in ORDERS), *(("param_first", r) for r in REDUCTIONS)]
)
def test_scores_are_those_of_autograd(
    order: str, reduction: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """Whole groups under grouped queries; squares of every window, and the mean gradient beside them untouched."""
    folder = checkpoint("llama", DOUBLE)
    groups, ids = _groups(folder, notes, tmp_path / "run", taylor=order, reduction=reduction)
    model = models.load(folder, dtype=DOUBLE)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    for layer, kind, unit in ((0, "ffn", 3), (1, "kv", 0), (1, "kv", 2)):
        found = float(groups.scores[f"blocks.{layer}.{kind}"][unit])
        weights = _weights_of(model, layer, kind, unit)
        assert found == pytest.approx(_expected(model, ids, weights, order, reduction), rel=1e-3)


def test_channels_can_be_asked_for_again(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """The recipe of a run asks for nothing that its mode refuses."""
    wanted = _request(notes, "llm_pruner", options={"mode": "channel"})
    first = secateur.prune(checkpoint(), output=tmp_path / "first", **wanted)
    again = secateur.prune(recipe=tmp_path / "first" / "recipe.yaml", output=tmp_path / "again")
    assert again.achieved == first.achieved
    assert grid.hashes(tmp_path / "again", *grid.TIMED) == grid.hashes(tmp_path / "first", *grid.TIMED)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(("order", "reduction"), [("vectorize", "sum"), ("param_first", "max"), ("param_mix", "first")])
def test_channels_are_scored_with_all_that_meets_them(
    family: str, order: str, reduction: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """Every block, the norms, the head and the embedding: a tied table by both of its gradients together."""
    folder = checkpoint(family, DOUBLE)
    groups, ids = _groups(folder, notes, tmp_path / "run", mode="channel", taylor=order, reduction=reduction)
    model = models.load(folder, dtype=DOUBLE)
    for unit in (0, 17):
        expected = _expected(model, ids, _channel_of(model, unit), order, reduction)
        assert float(groups.scores["residual"][unit]) == pytest.approx(expected, rel=1e-3)


def test_a_channel_without_effect_goes_first(notes: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.embed_tokens.weight"][:, 5] = 0
        for layer in range(3):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"][5] = 0
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][5] = 0
        return tensors

    model = models.save(tmp_path / "model", "llama", DOUBLE, edit=edit)
    for steps in (1, 2):
        wanted = _request(
            notes, "llm_pruner", options={"mode": "channel", "taylor": "param_rms", "iterative_steps": steps}
        )
        plan, _ = grid.plan_of(model, tmp_path / f"run-{steps}", **wanted)
        assert set(plan.kept) == {"residual"}
        assert len(plan.kept["residual"]) == plan.after.residual < plan.before.residual
        assert 5 not in plan.kept["residual"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"allocation": "global"}, "one for all blocks"),
        ({"last": 1}, "one for all blocks"),
        ({"reduction": "prod"}, "too small"),
    ],
)
def test_channels_have_no_blocks(options: dict[str, Any], found: str, checkpoint: Checkpoints, notes: Path) -> None:
    with pytest.raises(RequestError, match=found):
        secateur.prune(
            checkpoint(), output="nowhere", **_request(notes, "llm_pruner", options={"mode": "channel", **options})
        )
    assert not Path("nowhere").exists()


def test_first_order_is_the_slope_of_the_loss(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Shrink one column: the loss changes by as much as the row vector's score says."""
    folder = checkpoint("llama", DOUBLE)
    groups, ids = _groups(folder, notes, tmp_path / "run", taylor="vectorize", targets="ffn")
    model = models.load(folder, dtype=DOUBLE)
    mean = _gradients(model, ids)
    weight = model.model.layers[1].mlp.down_proj.weight
    for unit in (0, 7, 11):
        losses = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                column = weight[:, unit].clone()
                weight[:, unit] *= 1 + step
                losses.append(float(_loss(model, ids)))
                weight[:, unit] = column
        slope = abs(losses[0] - losses[1]) / 2e-3
        parts = [mean[name] * model.get_parameter(name).detach() for name in _names(1)]
        others = sum(float(part[unit].sum().abs()) for part in parts)
        assert float(groups.scores["blocks.1.ffn"][unit]) == pytest.approx(slope + others, rel=1e-3)


def _names(layer: int) -> tuple[str, str]:
    return f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight"


def test_signs_of_windows_need_not_cancel() -> None:
    """Two windows that pull apart: the mean gradient says nothing, the root mean square does."""
    weight, zero, squares = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([9.0])
    assert float(saliency(weight, zero, squares, "param_first")) == 0
    assert float(saliency(weight, zero, squares, "param_rms")) == 6
    assert float(saliency(weight, zero, squares, "param_second")) == 36
    assert float(saliency(weight, zero, squares, "param_mix")) == -18


def test_a_neuron_without_effect_goes_first(notes: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in range(3):
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, 5] = 0
            tensors[f"model.layers.{layer}.mlp.gate_proj.weight"][5] = 0
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"][5] = 0
        return tensors

    model = models.save(tmp_path / "model", "llama", DOUBLE, edit=edit)
    plan, _ = grid.plan_of(model, tmp_path / "run", **_request(notes, "llm_pruner", options={"targets": "ffn"}))
    assert all(5 not in plan.kept[f"blocks.{layer}.ffn"] for layer in range(3))


def test_the_ends_are_left_whole(notes: Path, tmp_path: Path) -> None:
    assert LlmPruner().whole(32) == {0, 1, 2, 3, 30, 31}
    assert LlmPruner().whole(5) == {0}
    model = models.save(tmp_path / "model", "llama", num_hidden_layers=5)
    wanted = _request(notes, "llm_pruner", layout="per-layer")
    plan, _ = grid.plan_of(model, tmp_path / "run", **wanted, options={"last": 1, "iterative_steps": 2})
    assert plan.after.blocks[0] == plan.before.blocks[0]
    assert plan.after.blocks[-1] == plan.before.blocks[-1]
    assert all(plan.after.blocks[i].ffn < plan.before.blocks[i].ffn for i in (1, 2, 3))
    ranked, _ = grid.plan_of(model, tmp_path / "ranked", **wanted, options={"allocation": "global"})
    assert len({block.ffn for block in ranked.after.blocks[1:]}) > 1
    with pytest.raises(RequestError, match="left whole"):
        grid.plan_of(model, tmp_path / "all", **wanted, options={"first": 5})


def test_adaptation_meets_the_target_and_leaves_every_block_some(notes: Path, tmp_path: Path) -> None:
    """However strong the adaptation: no overshoot by a step, and no block without heads or neurons."""
    model = models.save(tmp_path / "model", "llama", num_hidden_layers=5)
    for amplitude, ratio in ((0.02, 0.2), (0.5, 0.45)):
        wanted = _request(notes, "adapt_pruner", layout="per-layer", ratio=ratio)
        out = tmp_path / f"out-{amplitude}"
        result = secateur.prune(model, output=out, **wanted, options={"amplitude": amplitude, "steps": 8})
        reached = result.achieved["params"] / result.achieved["params_before"]
        assert reached == pytest.approx(1 - ratio, abs=0.02)
        plan, _ = grid.plan_of(
            model, tmp_path / f"run-{amplitude}", **wanted, options={"amplitude": amplitude, "steps": 8}
        )
        assert min(block.kv for block in plan.after.blocks) >= 1
        assert min(block.ffn for block in plan.after.blocks) >= 1
        assert len(set(plan.after.blocks)) > 1
    with pytest.raises(RequestError, match="reaches from"):
        grid.plan_of(model, tmp_path / "far", **{**wanted, "ratio": 0.97})


def test_importance_is_centred_and_bounded() -> None:
    found = importance(torch.tensor([0.1, 0.4, 0.2, 0.9]))
    assert float(found.mean()) == pytest.approx(0, abs=1e-7)
    assert float(found.abs().max()) == pytest.approx(1)
    assert int(found.argmax()) == 3


def test_every_step_is_measured_behind_the_cuts_before(notes: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    original = Groups.edits

    def spy(self: Groups) -> dict[str, Tensor]:
        found = original(self)
        seen.append(sum(int((tensor == 0).all(0).sum()) for tensor in found.values()))
        return found

    with mock.patch.object(Groups, "edits", spy):
        model = models.save(tmp_path / "model", "llama")
        wanted = _request(notes, "adapt_pruner", layout="per-layer", ratio=0.3, options={"steps": 6})
        secateur.prune(model, output=tmp_path / "out", **wanted)
    assert seen[0] == 0
    assert len(seen) > 1
    assert all(one < other for one, other in pairwise(seen))


def test_adaptation_needs_layers_that_differ(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="differ from block to block") as caught:
        secateur.prune(checkpoint(), output=tmp_path / "out", **_request(notes, "adapt_pruner"))
    assert (caught.value.code, caught.value.exit_code) == ("not-native", 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["llm_pruner", "adapt_pruner"])
def test_killed_and_run_again(method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    options = {"iterative_steps": 3} if method == "llm_pruner" else {"steps": 8}
    wanted = _request(notes, method, layout="per-layer", options=options, ratio=0.3)
    secateur.prune(checkpoint(), output=tmp_path / "straight", **wanted)
    original, calls = Groups.measure, [0]

    class Killed(BaseException):
        pass

    def dying(self: Groups) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise Killed
        original(self)

    with mock.patch.object(Groups, "measure", dying), pytest.raises(Killed):
        secateur.prune(checkpoint(), output=tmp_path / "out", **wanted)
    assert work_folder(tmp_path / "out").is_dir()
    secateur.prune(checkpoint(), output=tmp_path / "out", **wanted)
    assert grid.hashes(tmp_path / "out", *grid.TIMED) == grid.hashes(tmp_path / "straight", *grid.TIMED)


@pytest.mark.parametrize("method", ["llm_pruner", "adapt_pruner"])
def test_from_the_command_line(method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    words = ["prune", str(checkpoint()), "-o", str(tmp_path / "out"), "--method", method, "--ratio", "0.2",
             "--data", str(notes), "--samples", "8", "--length", "16", "--layout", "per-layer"]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert models.load(tmp_path / "out").num_parameters() < 0.85 * models.load(checkpoint()).num_parameters()
