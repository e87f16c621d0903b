"""Evidence, least squares, column scores and trials against direct computations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import masking
import models
import secateur
from conftest import Checkpoints
from secateur.budgets import Budget
from secateur.checkpoints import Checkpoint, Folder
from secateur.data.windows import Windows
from secateur.engine.blocks import BlockRunner
from secateur.engine.journal import Journal
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.engine.taps import Taps
from secateur.engine.trials import CalibrationTrials
from secateur.engine.walk import Walk
from secateur.families import Sizes
from secateur.mends import refit
from secateur.methods import registry
from secateur.methods.base import Method, Study
from secateur.plans import Mend, Plan
from secateur.scores.columns import column_scores
from secateur.spaces import BlockView

DOUBLE = torch.float64


def _data(seed: int, tokens: int = 200, width: int = 24, out: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(tokens, width, dtype=DOUBLE, generator=generator).relu()
    return torch.randn(out, width, dtype=DOUBLE, generator=generator), signal


@pytest.mark.parametrize("damping", [1e-9, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_refit_is_the_least_squares_solution(seed: int, damping: float) -> None:
    """Against lstsq on the signals themselves, the ridge written as extra rows that ask for the old weights."""
    weight, signal = _data(seed)
    kept = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:15].sort().values
    gram = signal.t() @ signal
    ridge = (damping * gram[kept][:, kept].diagonal().mean()).sqrt() * torch.eye(15, dtype=DOUBLE)
    left = torch.cat([signal[:, kept], ridge])
    right = torch.cat([signal @ weight.t(), ridge @ weight[:, kept].t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    found = refit(weight, gram, kept, damping)
    assert torch.allclose(found[:, kept], expected, atol=1e-8)
    removed = [i for i in range(24) if i not in kept.tolist()]
    assert not found[:, removed].any()


def test_refit_of_duplicates_is_exact_and_of_silent_columns_changes_nothing() -> None:
    weight, signal = _data(0)
    signal[:, 20] = signal[:, 3]
    signal[:, 21] = 0
    kept = torch.tensor([i for i in range(24) if i not in (20, 21)])
    found = refit(weight, signal.t() @ signal, kept, 1e-12)
    assert torch.allclose(signal @ found.t(), signal @ weight.t(), atol=1e-8)
    silent = torch.tensor([i for i in range(24) if i != 21])
    assert torch.equal(refit(weight, signal.t() @ signal, silent, 1e-2)[:, silent], weight[:, silent])


def test_a_strong_ridge_is_plain_slicing() -> None:
    weight, signal = _data(1)
    kept = torch.arange(10)
    found = refit(weight, signal.t() @ signal, kept, 1e12)
    assert torch.allclose(found[:, :10], weight[:, :10], atol=1e-8)


def test_column_scores_against_their_definitions() -> None:
    """OBS is the error that least squares leave without one column; leverage the diagonal of the smoother."""
    weight, signal = _data(2)
    gram = signal.t() @ signal
    wanda = column_scores(weight, gram, "wanda", 1e-2)
    assert torch.allclose(wanda, weight.abs().sum(0) * signal.norm(dim=0))
    leverage = column_scores(weight, gram, "leverage", 1e-2)
    ridge = 1e-2 * gram.diagonal().mean()
    smoother = gram @ torch.linalg.inv(gram + ridge * torch.eye(24, dtype=DOUBLE))
    assert torch.allclose(leverage, smoother.diagonal())
    obs = column_scores(weight, gram, "obs", 1e-12)
    for gone in range(24):
        kept = torch.tensor([i for i in range(24) if i != gone])
        left = signal @ (refit(weight, gram, kept, 1e-12) - weight).t()
        assert left.square().sum() == pytest.approx(float(obs[gone]), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_taps_see_what_the_readers_see(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Their Gram, through a matrix, is that of its outputs, hooked independently on the stock model."""
    source = Checkpoint(Folder(checkpoint(family, DOUBLE)))
    architecture, ids = source.architecture, models.token_ids()
    runner = BlockRunner(architecture, DOUBLE, torch.device("cpu"), source.rest())
    walk = Walk(source, runner, ids, tmp_path, "walk")
    tensors = source.read(0)
    taps = Taps(runner, 0, {"down.gram", "out.moments", "influence"})
    before = walk.activations.values.clone()
    walk.run(tensors, taps)
    evidence = taps.evidence()
    model = models.load(checkpoint(family, DOUBLE), dtype=DOUBLE, experts_implementation="eager")
    where, seen = models.ALL[family].where, {}
    block = model.get_submodule(where.blocks)[0]
    hooks = {"out": block.get_submodule(where.attention_out)}
    if "experts.0.down.gram" not in evidence:
        hooks["down"] = block.get_submodule(where.ffn_reader)
    for name, module in hooks.items():
        module.register_forward_pre_hook(lambda _, i, name=name: seen.update({name: i[0].flatten(0, -2)}))
    masking.logits(model, ids)
    assert torch.allclose(evidence["out.squares"], seen["out"].square().sum(0))
    assert torch.allclose(evidence["out.sum"], seen["out"].sum(0))
    if "down" in seen:
        assert torch.allclose(evidence["down.gram"], seen["down"].t() @ seen["down"])
    else:
        visits = sum(int(evidence[f"experts.{e}.down.count"]) for e in range(architecture.sizes.blocks[0].experts))
        assert visits == ids.numel() * architecture.sizes.active_experts
    one, other = before[:, 1:].flatten(0, 1), walk.activations.values[:, 1:].flatten(0, 1)
    cosine = torch.nn.functional.cosine_similarity(one, other)
    assert evidence["influence"][0] == pytest.approx(float((1 - cosine).mean()))


@pytest.mark.parametrize("wanted", [("out.gram",), ("down.gram",), ("q.moments", "out.gram", "down.moments")])
def test_a_walk_that_stays_goes_no_further_than_its_last_tap(
    wanted: tuple[str, ...], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = Checkpoint(Folder(checkpoint("llama", DOUBLE)))
    runner = BlockRunner(source.architecture, DOUBLE, torch.device("cpu"), source.rest())
    walk = Walk(source, runner, models.token_ids(), tmp_path, "walk")
    tensors, calls = source.read(0), []
    counted = runner.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    short = Taps(runner, 0, set(wanted))
    walk.run(tensors, short, advance=False)
    assert not calls
    whole = Taps(runner, 0, {*wanted, "influence"})
    walk.run(tensors, whole, advance=False)
    assert calls
    counted.remove()
    found = short.evidence()
    assert {name.rpartition(".")[0] for name in found} == {name.rpartition(".")[0] for name in wanted}
    assert all(torch.equal(values, whole.evidence()[name]) for name, values in found.items())


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("stages", [("down",), ("out", "down"), ("q", "out", "down")])
def test_a_block_goes_on_from_what_its_readers_read_to_the_bit(
    family: str, stages: tuple[str, ...], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Stage by stage other matrices; statistics and outputs are those of a walk that runs every block whole."""
    source = Checkpoint(Folder(checkpoint(family, torch.float32)))
    found: list[list[Tensor]] = []
    for short in (True, False):
        runner = BlockRunner(source.architecture, torch.float32, torch.device("cpu"), source.rest())
        walk = Walk(source, runner, models.token_ids(), tmp_path, f"walk-{short}")
        found.append([])
        calls: list[int] = []
        while walk.block < len(runner.blocks):
            tensors = source.read(walk.block)
            for role in stages:
                taps = Taps(runner, walk.block, {f"{role}.gram"})
                walk.run(tensors, taps, advance=False)
                found[-1] += taps.evidence().values()
                tensors = {
                    name: tensor * 1.5 if source.architecture.tensors[name].role == role else tensor
                    for name, tensor in tensors.items()
                }
                if not short:
                    walk.readers.forget()
            first = walk.block == 0
            if "q" in source.architecture.roles_of(walk.block):
                module = runner.model.get_submodule(source.architecture.module_of("q", walk.block))
                hook = module.register_forward_hook(lambda *_, seen=calls: seen.append(1))
                walk.run(tensors)
                hook.remove()
                spared = family in ("llama", "opt", "mixtral") and not first
                assert not (short and spared and calls)
                calls.clear()
            else:
                walk.run(tensors)
            found[-1].append(walk.activations.values.clone())
    assert all(map(torch.equal, *found))


def test_a_block_runs_again_whole_where_its_readers_inputs_are_too_many(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secateur.engine.readers._LARGEST", 0)
    source = Checkpoint(Folder(checkpoint("llama", torch.float32)))
    runner = BlockRunner(source.architecture, torch.float32, torch.device("cpu"), source.rest())
    walk, tensors = Walk(source, runner, models.token_ids(), tmp_path, "walk"), source.read(0)
    walk.run(tensors, Taps(runner, 0, {"down.gram"}), advance=False)
    calls: list[int] = []
    runner.blocks[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    walk.run(tensors)
    assert len(calls) == len(walk.activations.batches)


class Shifted(Method):
    """Adds a constant to what every branch writes, and remembers what its second stage saw."""

    name = "shifted"
    title = "Shifted"
    data = "text"
    order = "sequential"
    grams: ClassVar[dict[int, Tensor]] = {}

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return frozenset({"out.gram"}), frozenset({"down.gram"})

    def sizes(self, budget: Budget) -> Sizes:
        blocks = tuple(replace(block, out_bias=True, down_bias=True) for block in budget.sizes.blocks)
        return replace(budget.sizes, blocks=blocks)

    def decide(self, study: Study) -> Plan:
        return Plan(study.budget.sizes, self.sizes(study.budget))

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:  # noqa: ARG002
        role = ("out", "down")[stage]
        if stage:
            Shifted.grams[int(view.place or 0)] = evidence["down.gram"]
        assert not view.tensors[f"blocks.{view.place}.{role}.bias"].any()
        return Mend(edits={f"blocks.{view.place}.{role}.bias": _shift(view.place or 0, role)})


def _shift(place: int, role: str) -> Tensor:
    seed = 2 * place + (role == "down")
    return 0.3 * torch.randn(48, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_added_biases_are_part_of_the_signal_behind_them(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sequential mend sees is what the stock model computes with a constant added behind each branch."""
    monkeypatch.setitem(registry._OURS, "shifted", f"{__name__}:Shifted")  # type: ignore[index]
    folder = checkpoint("llama", DOUBLE)
    asked = {"method": "shifted", "ratio": 0.1, "data": str(notes), "samples": 4, "length": 16, "layout": "per-layer"}
    run = Run(prepare(make_request({"model": str(folder), **asked})), tmp_path / "run", Silent())
    plan = run.plan()
    assert run.windows is not None
    model, seen = models.load(folder, dtype=DOUBLE), {}
    for place, layer in enumerate(model.model.layers):
        for module, role in ((layer.self_attn.o_proj, "out"), (layer.mlp.down_proj, "down")):
            shift = _shift(place, role)
            module.register_forward_hook(lambda _, __, output, shift=shift: output + shift)
        reader = layer.mlp.down_proj
        reader.register_forward_pre_hook(lambda _, x, place=place: seen.update({place: x[0].flatten(0, 1)}))
    expected = masking.logits(model, run.windows.ids)
    for place, inputs in seen.items():
        assert torch.allclose(Shifted.grams[place], inputs.t() @ inputs, rtol=1e-6)
    run.write(plan)
    made = secateur.load(run.result, dtype=DOUBLE)
    assert torch.allclose(masking.logits(made, run.windows.ids), expected, rtol=1e-6)


def _trials(source: Checkpoint, ids: Tensor, folder: Path) -> CalibrationTrials:
    return CalibrationTrials(source, Windows(ids, ""), DOUBLE, torch.device("cpu"), folder, Journal(folder, {}))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_trials_are_those_of_the_stock_model(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Losses, with edits and from a settled base, and gradients, against whole forward and backward passes."""
    folder = checkpoint(family, DOUBLE)
    source, ids = Checkpoint(Folder(folder)), models.token_ids()
    ids = ids.repeat(9, 1)[:9].roll(1, 0) if len(ids) < 9 else ids
    trials = _trials(source, ids, tmp_path)
    model = models.load(folder, dtype=DOUBLE, experts_implementation="eager")

    def loss() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten())

    value = loss()
    expected_loss = value.item()
    assert trials.loss() == pytest.approx(expected_loss, rel=1e-6)
    silent = {f"blocks.{b}.out.weight": torch.zeros_like(source.read(b)[f"blocks.{b}.out.weight"]) for b in (0, 1)}
    one, both = {k: v for k, v in silent.items() if "blocks.1" in k}, silent
    direct = [trials.loss(one), trials.loss(both)]
    assert trials.settle(one) == pytest.approx(direct[0], rel=1e-9)
    assert trials.loss(both) == pytest.approx(direct[1], rel=1e-9)
    assert trials.settle() == pytest.approx(expected_loss, rel=1e-6)
    assert trials.loss(one) == pytest.approx(direct[0], rel=1e-9)
    where, heard = models.ALL[family].where, []
    for block in model.get_submodule(where.blocks):
        for name in (where.attention_out, where.ffn_out):
            block.get_submodule(name).register_forward_hook(lambda _, __, out: heard.append(out))
    signals = torch.autograd.grad(loss(), heard)
    tokens, fishers = ids[:, 1:].numel(), [(g.flatten(0, -2).t() @ g.flatten(0, -2)).detach() for g in signals]
    for gradients in trials.gradients(wanted=("signals",)):
        if gradients.place is not None:
            for found, wanted in zip(gradients.signals.values(), fishers[2 * gradients.place :], strict=False):
                assert torch.allclose(found, wanted * tokens, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) * tokens)
    heard.clear()
    value.backward()
    parameters = dict(model.named_parameters())
    for gradients in trials.gradients(wanted=("mean", "squares")):
        for packed in source.architecture.packed_of(gradients.place):
            if gradients.place is None and "norm" not in packed.name and "ln_f" not in packed.name:
                continue  # a tied head shares its gradient with the embedding
            found, wanted = packed.pack(gradients.mean), parameters[packed.name].grad
            assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-6 * float(wanted.abs().max()))
            assert set(gradients.squares) == set(gradients.mean)
