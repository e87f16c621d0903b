"""disp_llm and the gates it learns: gradients, counts, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint, Folder
from secateur.engine.prepare import costs_of
from secateur.errors import RequestError
from secateur.gates import ESTIMATORS, GatedNetwork, Gates, LearningOptions, gate, learn
from secateur.gates.learning import size_penalty

DOUBLE = torch.float64
SMALL: dict[str, Any] = {"samples": 8, "length": 32, "layout": "per-layer"}
FAMILIES = ("llama", "gpt2", "mixtral")


def _network(folder: Path, sharing: Any = "none") -> GatedNetwork:
    model = models.load(folder, dtype=DOUBLE, experts_implementation="eager").requires_grad_(False)
    return GatedNetwork(model, Gates(Checkpoint(Folder(folder)).architecture, sharing))


def _masks(gates: Gates, seed: int, share: float = 0.7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.rand(g.size, generator=generator, dtype=DOUBLE) < share).double() for n, g in gates.gates.items()}


def _plain_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("sharing", ["none", "same", "structural"])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_change_nothing(family: str, sharing: str, checkpoint: Checkpoints) -> None:
    network, ids = _network(checkpoint(family, DOUBLE), sharing), models.token_ids()
    expected = _plain_loss(network.model, ids)
    ones = {name: torch.ones(g.size, dtype=DOUBLE) for name, g in network.gates.gates.items()}
    with network.open():
        assert float(network.loss(ids, ones)) == float(expected)
        assert float(network.loss(ids, _masks(network.gates, 0))) != float(expected)
    assert float(_plain_loss(network.model, ids)) == float(expected), "hooks stay behind"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_against_finite_differences(family: str, checkpoint: Checkpoints) -> None:
    network, ids, step = _network(checkpoint(family, DOUBLE)), models.token_ids(), 1e-5
    masking.swap_precise_parts(network.model)
    generator = torch.Generator().manual_seed(1)
    values = {
        n: torch.rand(g.size, dtype=DOUBLE, generator=generator).requires_grad_(True)
        for n, g in network.gates.gates.items()
    }
    with network.open():
        found = dict(zip(values, torch.autograd.grad(network.loss(ids, values), list(values.values())), strict=True))
        for name in list(values)[:: max(1, len(values) // 6)]:
            entry = int(found[name].abs().argmax())
            losses = []
            for shift in (step, -step):
                moved = {key: value.detach().clone() for key, value in values.items()}
                moved[name][entry] += shift
                losses.append(float(network.loss(ids, moved)))
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(found[name][entry]), rel=1e-4, abs=1e-8)


def test_reinmax_is_unbiased_to_second_order() -> None:
    """Against the exact gradient of E f(b), f quadratic; the soft gates of the released code are not."""
    logits = torch.tensor([-3.4, -3.0, -2.7, -2.0, 0.0], dtype=DOUBLE)  # open with chances from 0.27 to 1
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=DOUBLE)

    def cost(values: Tensor) -> Tensor:
        return (weight * values + 1.7 * values.square()).sum() + 0.8 * values.sum().square()

    exact = logits.clone().requires_grad_(True)
    chance = torch.sigmoid((exact + 3) / 0.4)
    cubes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * 5)
    odds = torch.where(cubes > 0, chance, 1 - chance).prod(1)
    (wanted,) = torch.autograd.grad(sum(p * cost(c) for p, c in zip(odds, cubes, strict=True)), exact)
    generator, total, draws = torch.Generator().manual_seed(0), torch.zeros(5, dtype=DOUBLE), 4000
    samples = []
    for _ in range(draws):
        learned = logits.clone().requires_grad_(True)
        values, hard = gate(learned, "reinmax", generator)
        assert set(values.tolist()) <= {0.0, 1.0}
        assert torch.equal(values, hard)
        (gradient,) = torch.autograd.grad(cost(values), learned)
        samples.append(gradient)
        total += gradient / draws
    error = torch.stack(samples).std(0) / draws**0.5
    assert ((total - wanted).abs() < 4 * error + 1e-9).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gates_start_open_and_are_counted_as_integers(estimator: Any) -> None:
    values, hard = gate(torch.zeros(1000), estimator, torch.Generator().manual_seed(0))
    assert float(values.mean()) > 0.99
    assert set(hard.detach().tolist()) <= {0.0, 1.0}
    for value in (-30.0, 30.0):
        values, hard = gate(torch.full((10,), value), estimator, None)
        assert values.round().tolist() == hard.tolist() == [float(value > 0)] * 10


def test_the_penalty_is_symmetric() -> None:
    """In the logarithm of the share, zero where it is as wanted."""
    for factor in (1.1, 2.0, 7.0):
        above, below = (size_penalty(torch.tensor(0.3 * f), 0.3) for f in (factor, 1 / factor))
        assert float(above) == pytest.approx(float(below), rel=1e-5) == pytest.approx(float(torch.tensor(factor).log()))
    assert float(size_penalty(torch.tensor(0.5), 0.5)) == 0


@pytest.mark.parametrize("sharing", ["none", "same", "structural"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama-tied", "qwen2_moe"])
def test_counts_are_exact(family: str, sharing: str, checkpoint: Checkpoints) -> None:
    """The polynomial against the parameters of the sizes it stands for; middles of one block alike."""
    source = Checkpoint(Folder(checkpoint(family)))
    gates, costs = Gates(source.architecture, sharing), costs_of(source)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    counts = {}
    for names in gates.groups().values():
        share = float(torch.rand(1, generator=generator))
        counts |= {name: max(1, int(share * gates.gates[name].size)) for name in names}
    gone = gates.dense - gates.params(counts)
    assert isinstance(gone, int)
    if sharing != "structural" or "moe" not in family:
        assert costs.params(gates.architecture.sizes) - costs.params(gates.sizes(counts)) == gone


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_learning_meets_the_size(estimator: Any, checkpoint: Checkpoints) -> None:
    network = _network(checkpoint("llama"))
    network.model.float()
    shares: list[float] = []
    options = LearningOptions(estimator=estimator, steps=250, batch_tokens=16, rate=5e-3)
    ids = models.token_ids(8, 16)
    learn(network, ids, 0.7, options, torch.Generator().manual_seed(0), lambda _, __, share: shares.append(share))
    assert abs(sum(shares[-20:]) / 20 - 0.7) < 0.01
    few = options.model_copy(update={"steps": 20})
    logits, again = (learn(network, ids, 0.7, few, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(logits[name], again[name]) for name in logits)
    assert all(parameter.grad is None for parameter in network.model.parameters())


def _prune(model: Path, output: Path, notes: Path, ratio: float | None = 0.15, **options: Any) -> dict[str, Any]:
    layout = "native" if options.get("constrained") == "same" else "per-layer"
    size = {} if ratio is None else {"ratio": ratio}
    made = {**SMALL, "layout": layout, "options": options, **size}
    secateur.prune(model, method="disp_llm", data=notes, output=output, **made)
    record: dict[str, Any] = json.loads((output / "secateur.json").read_text())
    return record


LEARNED = {"steps": 6, "batch_tokens": 64}


def test_the_export_is_exact_and_not_random(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Two exports are the same (the released code draws noise), indices lie in the weights (not in Python source), and
    the share is that of the parameters."""
    from safetensors.torch import load_file

    model = checkpoint("llama")
    record = _prune(model, tmp_path / "a", notes, **LEARNED)
    _prune(model, tmp_path / "b", notes, **LEARNED)
    assert grid.hashes(tmp_path / "a", *grid.TIMED) == grid.hashes(tmp_path / "b", *grid.TIMED)
    state = load_file(tmp_path / "a" / "model.safetensors")
    indices = {name: tensor for name, tensor in state.items() if name.endswith("_index")}
    assert indices
    assert all(tensor.dtype == torch.int32 and (tensor.diff() > 0).all() for tensor in indices.values())
    assert "[[0, " not in (tmp_path / "a" / "modeling_secateur.py").read_text()
    source = Checkpoint(Folder(model))
    gates, left = Gates(source.architecture, "none"), sum(t.numel() for n, t in state.items() if n not in indices)
    share = 1 - (source.params - left) / gates.dense
    assert record["notes"]["kept_share"] == pytest.approx(share, abs=1e-6)
    assert abs(left / source.params - 0.85) < 0.01


def test_hard_gates_are_the_export(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """The gated network, each signal gated once (the released code squares soft gates of the neurons), and the model
    on disk have the same loss."""
    model, ids = checkpoint("llama", DOUBLE), models.token_ids()
    asked = {"method": "disp_llm", "ratio": 0.15, "data": notes, "options": {"mode": "fisher"}, **SMALL}
    secateur.prune(model, output=tmp_path / "out", **asked)
    plan, _ = grid.plan_of(model, tmp_path / "planned", **asked)
    network = _network(model)
    masking.swap_precise_parts(network.model)
    values = {name: torch.zeros(g.size, dtype=DOUBLE) for name, g in network.gates.gates.items()}
    for name, mask in values.items():
        mask[plan.kept.get(name, torch.arange(len(mask)))] = 1
    with network.open():
        expected = float(network.loss(ids, values))
    cut = masking.swap_precise_parts(secateur.load(tmp_path / "out", dtype=DOUBLE))
    assert float(_plain_loss(cut.requires_grad_(False), ids)) == pytest.approx(expected, rel=1e-7)


def test_no_selection_is_empty(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Even where the target leaves next to nothing."""
    record = _prune(checkpoint("llama"), tmp_path / "out", notes, ratio=0.6, mode="fisher")
    for block in record["after"]["blocks"]:
        assert block["ffn"] > 0
    cut = secateur.load(tmp_path / "out")
    assert all(buffer.numel() for name, buffer in cut.named_buffers() if name.endswith("_index"))


def test_logits_serve_another_ratio(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    _prune(checkpoint(), first, notes, **LEARNED)
    learned = {"logits": str(first / "learned" / "disp-llm-logits.safetensors")}
    _prune(checkpoint(), same, notes, **learned)
    assert (same / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    more = _prune(checkpoint(), other, notes, ratio=0.25, **learned)["after"]
    less = json.loads((first / "secateur.json").read_text())["after"]
    assert sum(b["ffn"] for b in more["blocks"]) < sum(b["ffn"] for b in less["blocks"])
    with pytest.raises(RequestError, match="another model"):
        _prune(checkpoint("gpt2"), tmp_path / "no", notes, **learned)


def test_the_papers_own_ratio_counts_blocks_only(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    _prune(checkpoint("llama"), tmp_path / "out", notes, ratio=None, mode="fisher", sparsity=0.3)
    inside = [
        sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
        for model in (secateur.load(checkpoint("llama")), secateur.load(tmp_path / "out"))
    ]
    assert inside[1] / inside[0] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral"])
def test_one_selection_for_the_model_is_stock(
    family: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    model, options = checkpoint(family, DOUBLE), {"constrained": "same", "mode": "fisher"}
    record = _prune(model, tmp_path / "out", notes, ratio=0.5, **options)
    asked = {**SMALL, "layout": "native", "method": "disp_llm", "ratio": 0.5, "data": notes, "options": options}
    plan, _ = grid.plan_of(model, tmp_path / "planned", **asked)
    grid.check_masked(model, tmp_path / "out", family, plan)
    assert record["after"]["residual"] < record["before"]["residual"]
    assert models.load(tmp_path / "out").config.hidden_size == record["after"]["residual"]
    with pytest.raises(RequestError, match="per-layer"):
        secateur.prune(checkpoint("llama"), method="disp_llm", ratio=0.2, data=notes, output=tmp_path / "no")


def test_structural_narrows_groups_too(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    model = checkpoint("llama", DOUBLE)
    options = {"constrained": "structural", "mode": "fisher"}
    asked = {"method": "disp_llm", "ratio": 0.35, "data": notes, "options": options, **SMALL}
    secateur.prune(model, output=tmp_path / "out", **asked)
    plan, _ = grid.plan_of(model, tmp_path / "planned", **asked)
    assert {name.rpartition(".")[2] for name in plan.kept} >= {"residual", "ffn"}
    grid.check_masked(model, tmp_path / "out", "llama", plan)


def test_a_layer_norm_admits_no_selection_of_the_stream(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="mean"):
        _prune(checkpoint("gpt2"), tmp_path / "out", notes, constrained="structural", mode="fisher")
