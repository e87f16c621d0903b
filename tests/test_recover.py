"""Recovery: what was cut away is trained back, in a folder of the same kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from recovery import OPTIONS, STEPS, Killed, recover, run
from secateur.api import recovering
from secateur.checkpoints import Checkpoint
from secateur.errors import RequestError
from secateur.training.loop import Trainer
from secateur.training.objective import pairs_of
from secateur.training.options import make_recovery


@pytest.mark.parametrize(
    ("method", "taught", "options"),
    [
        ("lora", False, {}),
        ("full", False, {"learning_rate": 3e-3}),
        ("lora", True, {"distill": 1.0, "temperature": 2.0}),
        ("full", True, {"hidden": 0.5, "learning_rate": 3e-3}),
    ],
)
def test_loss_falls(
    method: str, taught: bool, options: dict[str, Any], checkpoint: Checkpoints, cut: Checkpoints, notes: Path,
    held_out: Path, tmp_path: Path,
) -> None:  # fmt: skip
    teacher = checkpoint() if taught else None
    result = recover(cut(), tmp_path / "out", notes, options, method=method, teacher=teacher, text=held_out, context=32)
    assert result.perplexity is not None
    curve = json.loads((tmp_path / "out" / "secateur.json").read_text())["recovery"][0]["curve"]
    assert [point["steps"] for point in curve] == [0, 4, 8, 12]
    assert curve[-1]["loss"] < curve[1]["loss"]
    if not taught:  # an untrained teacher knows nothing about the text
        assert result.training["validation"]["after"] < result.training["validation"]["before"]
        assert result.perplexity["after"] < result.perplexity["before"]
    assert (result.perplexity["teacher"] is None) is not taught


@pytest.mark.parametrize("name", sorted(models.ALL))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_family_keeps_its_form(name: str, method: str, cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Names, data types, files and configuration stay; weights change; plain transformers loads it."""
    before = grid.hashes(cut(name))
    result = recover(cut(name), tmp_path / "out", notes, method=method, steps=2)
    assert grid.hashes(cut(name)) == before
    old, new = Checkpoint.open(cut(name)), Checkpoint.open(tmp_path / "out")
    assert old.folder.headers == new.folder.headers
    assert models.config(cut(name)) == models.config(tmp_path / "out")
    assert result.achieved["params"] == result.achieved["params_before"] == old.params
    state, source = (dict(models.load(folder).named_parameters()) for folder in (tmp_path / "out", cut(name)))
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, source[key])}
    assert changed
    if method == "lora":
        assert not any("norm" in key or "embed" in key or key.endswith("bias") for key in changed)
    else:
        blind = {key for key in state if key.endswith("k_proj.bias")}  # softmax is, to this one without rotary
        assert set(state) - changed <= blind | set(old.architecture.unmapped)


@pytest.mark.parametrize("name", ["sharded", "gpt2-bare", "tied-repeated", "mixtral-fused", "mixtral-sharded"])
def test_every_form_on_disk(name: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Also of a model that was never cut; tensors that are no parameters travel along."""
    recover(checkpoint(name), tmp_path / "out", notes, method="full", steps=2)
    old, new = Checkpoint.open(checkpoint(name)), Checkpoint.open(tmp_path / "out")
    assert old.folder.headers == new.folder.headers
    for (key, tensor), (_, other) in zip(
        old.folder.read(h.name for h in old.passthrough), new.folder.read(h.name for h in old.passthrough), strict=True
    ):
        assert torch.equal(tensor, other), key
    models.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_data_type_stays(dtype: torch.dtype, cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Trained in at least float32, written as it was."""
    result = recover(cut("llama", dtype), tmp_path / "out", notes)
    assert {p.dtype for p in models.load(tmp_path / "out", dtype="auto").parameters()} == {dtype}
    assert result.training["validation"]["after"] < result.training["validation"]["before"]


def test_automatic_ranks_from_the_record(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    recover(cut(), tmp_path / "out", notes, {"ranks": "auto"}, steps=2)
    ranks = json.loads((tmp_path / "out" / "secateur.json").read_text())["recovery"][0]["ranks"]
    assert set(ranks.values()) == {4}


def test_only_the_roles_asked_for_are_trained(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    recover(cut(), tmp_path / "out", notes, {"roles": "ffn_norm,down"}, method="full", steps=2)
    state, source = models.load(tmp_path / "out").state_dict(), models.load(cut()).state_dict()
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, source[key])}
    assert {key.split(".")[-2] for key in changed} == {"post_attention_layernorm", "down_proj"}


def test_hidden_states_of_another_width(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """A narrower stream learns through linear maps, a shallower one from the blocks at the same depth."""
    for kind in ("residual", "blocks"):
        small = tmp_path / kind
        secateur.prune(
            checkpoint(), method="magnitude", options={"sparsity": 0.33, "spaces": kind}, output=small, quantum=1
        )
        result = recover(
            small, tmp_path / f"{kind}-out", notes, {"hidden": 1.0, "distill": 0.0}, teacher=checkpoint(), method="full"
        )
        assert result.training["validation"]["after"] < result.training["validation"]["before"]
    assert pairs_of(2, 3) == [(0, 1), (1, 2)]
    assert pairs_of(3, 3) == [(0, 0), (1, 1), (2, 2)]


def test_the_best_point_is_kept(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Weights that got worse on held-back data are not what comes out."""
    wild = {"learning_rate": 0.5, "schedule": "constant", "warmup": 0.0, "clip": 1e3}
    best = recover(cut(), tmp_path / "best", notes, wild, method="full")
    last = recover(cut(), tmp_path / "last", notes, {**wild, "keep": "last"}, method="full")
    assert best.training["kept_step"] < 12 == last.training["kept_step"]
    assert best.training["validation"]["after"] < last.training["validation"]["after"]


def test_minutes_and_epochs(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    timed = recover(cut(), tmp_path / "timed", notes, steps=None, minutes=0.02)
    assert timed.training["steps"] > 0
    assert timed.requested["steps"] is None
    passes = recover(cut(), tmp_path / "passes", notes, steps=None, epochs=0.5, samples=40)
    assert passes.training["windows"] == 36
    assert passes.training["steps"] == round(0.5 * 36 / 4)


def test_record_card_and_report(
    checkpoint: Checkpoints, cut: Checkpoints, notes: Path, held_out: Path, tmp_path: Path
) -> None:
    result = recover(cut(), tmp_path / "out", notes, teacher=checkpoint(), text=held_out)
    old, new = (json.loads((folder / "secateur.json").read_text()) for folder in (cut(), tmp_path / "out"))
    assert {key: new[key] for key in ("method", "before", "after", "plan_sha256")} == {
        key: old[key] for key in ("method", "before", "after", "plan_sha256")
    }
    assert new["tensors"].keys() == old["tensors"].keys()
    assert new["tensors"] != old["tensors"]
    assert result.perplexity is not None
    report = (tmp_path / "out" / grid.REPORT).read_text()
    assert f"{result.perplexity['after']:.3f}" in report
    assert "held-back" in report
    assert "Learning curve" in (tmp_path / "out" / "secateur-report.html").read_text()
    assert "magnitude" in (tmp_path / "out" / "README.md").read_text()
    again = recover(tmp_path / "out", tmp_path / "again", notes, steps=2)
    assert len(json.loads((tmp_path / "again" / "secateur.json").read_text())["recovery"]) == 2
    assert again.achieved == result.achieved


def test_the_recipe_repeats_the_run(checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    options = {"ranks": {"0": 2}, "roles": ("q", "down"), "every": 1}
    first = recover(cut(), tmp_path / "first", notes, options, teacher=checkpoint(), steps=2)
    assert (tmp_path / "first" / "recipe-recover.yaml").read_text() == first.recipe
    second = secateur.recover(recipe=tmp_path / "first" / "recipe-recover.yaml", output=tmp_path / "second")
    assert second.recipe == first.recipe
    assert grid.hashes(tmp_path / "first", *grid.TIMED) == grid.hashes(tmp_path / "second", *grid.TIMED)


def test_a_recovered_model_can_be_pruned(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    recover(cut(), tmp_path / "out", notes, steps=2)
    result = secateur.prune(tmp_path / "out", method="magnitude", ratio=0.1, output=tmp_path / "more")
    assert result.achieved["params"] < result.achieved["params_before"]


def test_a_module_is_not_changed(notes: Path) -> None:
    model = models.stock("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = recover(model, None, notes, tokenizer=models.tokenizer(), teacher=models.stock("llama", seed=1), steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.output is None
    assert result.model is not None
    assert result.model.training
    inplace = recover(model, None, notes, tokenizer=models.tokenizer(), steps=2, inplace=True)
    assert inplace.model is model
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_text_teaches_nothing(cut: Checkpoints, notes: Path, held_out: Path, tmp_path: Path) -> None:
    """The same weights with and without it: it is opened when they are final."""
    recover(cut(), tmp_path / "with", notes, text=held_out)
    recover(cut(), tmp_path / "without", notes)
    apart = (*grid.TIMED, "recipe-recover.yaml")  # it names the text
    assert grid.hashes(tmp_path / "with", *apart) == grid.hashes(tmp_path / "without", *apart)


def test_json(
    checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", str(cut()), "--teacher", str(checkpoint()), "-o", str(tmp_path / "out"), "--data", str(notes),
             "--steps", "2", "--length", "16", "--set", "ranks={0: 4, down: 2}", "--set", "roles=q,down",
             "--json"]  # fmt: skip
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "method", "requested", "achieved", "training", "perplexity", "seconds", "peak_rss_bytes", "output", "loads_in",
        "seed", "recipe",
    }  # fmt: skip
    assert found["perplexity"] is None
    assert found["training"]["steps"] == 2
    assert found["requested"]["options"]["ranks"] == {"0": 4, "down": 2}
    assert run(words) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "output-exists"
    assert run([*words[:-1], "--force"]) == 0
    assert "written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "request_", "options"),
    [
        ("unknown-option", {}, {"rnak": 4}),
        ("unknown-option", {"step": 3}, {}),
        ("bad-option", {"method": "qlora"}, {}),
        ("bad-option", {"epochs": 1}, {}),
        ("bad-option", {}, {"learning_rate": -1}),
        ("bad-option", {}, {"ranks": "{0: x}"}),
        ("bad-option", {}, {"ranks": "{"}),
        ("bad-option", {"method": "full"}, {"ranks": "auto"}),
        ("bad-option", {"dtype": "float16"}, {}),
        ("bad-ranks", {}, {"ranks": {"9": 4}}),
        ("bad-ranks", {}, {"ranks": {"0.dwon": 4}}),
        ("bad-ranks", {}, {"ranks": {"0": 0, "1": 0, "2": 0}}),
        ("unknown-role", {}, {"roles": "q,dwon"}),
        ("bad-role", {}, {"roles": "embedding"}),
        ("no-teacher", {}, {"distill": 0.5}),
        ("no-teacher", {}, {"hidden": 1}),
        ("no-data", {"data": None}, {}),
        ("no-data", {"data": "./absent.txt"}, {}),
        ("no-text", {"text": "./absent.txt"}, {}),
        ("no-output", {"output": None}, {}),
        ("bad-length", {"length": 1000}, {}),
        ("no-model", {"teacher": "./absent"}, {}),
        ("diverged", {"method": "full", "steps": 40}, {"learning_rate": 1e20, "clip": 1e30}),
    ],
)
def test_refused(
    code: str, request_: dict[str, Any], options: dict[str, Any], cut: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    request = {"output": tmp_path / "out", "data": notes, **STEPS, **request_}
    with pytest.raises(RequestError) as caught:
        secateur.recover(cut(), options={**OPTIONS, **options}, **request)
    assert caught.value.code == code, caught.value
    assert not list(tmp_path.iterdir())


def test_unknown_names_suggest_near_ones(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for options, near in (({"lerning_rate": 1}, "learning_rate"), ({"roles": "dwon"}, "down")):
        with pytest.raises(RequestError, match=f"did you mean {near}"):
            recover(cut(), tmp_path / "out", notes, options)


def test_the_output_is_none_of_the_inputs(checkpoint: Checkpoints, cut: Checkpoints, notes: Path) -> None:
    for folder in (cut(), checkpoint()):
        before = grid.hashes(folder)
        with pytest.raises(RequestError) as caught:
            recover(cut(), folder, notes, teacher=checkpoint(), force=True)
        assert caught.value.code == "output-is-input"
        assert grid.hashes(folder) == before


def test_a_teacher_of_another_vocabulary(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    larger = models.save(tmp_path / "larger", vocab_size=models.VOCABULARY + 8)
    other = models.save(tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    for teacher in (larger, other):
        with pytest.raises(RequestError) as caught:
            recover(cut(), tmp_path / "out", notes, teacher=teacher)
        assert caught.value.code == "teacher-vocabulary"


def test_peft_is_named_where_it_is_missing(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with (
        mock.patch.dict(sys.modules, {"peft": None}),
        pytest.raises(RequestError, match=r"pip install 'secateur\[recover\]'"),
    ):
        recover(cut(), tmp_path / "out", notes)
    assert not list(tmp_path.iterdir())


def test_too_little_memory(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    with (
        mock.patch.object(recovering, "available_bytes", return_value=2**10),
        pytest.raises(RequestError, match="GiB at least"),
    ):
        recover(cut(), tmp_path / "out", notes)


def test_a_recipe(cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: full\ndata: {notes}\nsteps: 7\nset: {{batch: 4, ranks: null}}\n")
    request, options = make_recovery({"model": str(cut()), "steps": 3}, recipe)
    assert (request.method, request.steps, options.batch) == ("full", 3, 4)
    assert request.data == str(notes)


def test_what_the_method_learned_travels_along(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    secateur.prune(checkpoint(), method="prunenet", ratio=0.1, output=tmp_path / "cut", options={"episodes": 1})
    recover(tmp_path / "cut", tmp_path / "out", notes, steps=2)
    learned = grid.hashes(tmp_path / "cut" / "learned")
    assert learned
    assert grid.hashes(tmp_path / "out" / "learned") == learned


@pytest.mark.assets
@pytest.mark.parametrize("method", ["lora", "full"])
def test_recovery_of_a_trained_model(method: str, assets: Path, tmp_path: Path) -> None:
    """Most of what a cut of 30 % cost comes back in a hundred short steps, on text that was not trained on."""
    model, texts = assets / "lm" / "stories260k-llama", assets / "text" / "tinystories-sample"
    secateur.prune(model, method="magnitude", ratio=0.3, output=tmp_path / "small")
    result = secateur.recover(
        tmp_path / "small", teacher=model, data=texts / "train.txt", method=method, output=tmp_path / "out", steps=60,
        length=128, text=texts / "test.txt", context=256, options={"every": 30},
    )  # fmt: skip
    assert result.perplexity is not None
    found = result.perplexity
    assert found["after"] < (found["before"] + found["teacher"]) / 2
    assert result.achieved["params"] == result.achieved["params_before"]


def test_a_bad_text_does_not_cost_the_training(cut: Checkpoints, notes: Path, held_out: Path, tmp_path: Path) -> None:
    """It is opened when the weights are final; the corrected command goes on from there."""
    short = tmp_path / "short.txt"
    short.write_text("word")
    with pytest.raises(RequestError, match="shorter than one window"):
        recover(cut(), tmp_path / "out", notes, text=short)
    assert not (tmp_path / "out").exists()
    with mock.patch.object(Trainer, "_step", side_effect=Killed):
        result = recover(cut(), tmp_path / "out", notes, text=held_out)
    assert result.training["steps"] == 12


@pytest.mark.parametrize("method", ["lora", "full"])
def test_layers_that_differ(method: str, checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path) -> None:
    """The per-layer layout, changes of basis included: what lies beside the weights stays."""
    small, out = tmp_path / "small", tmp_path / "out"
    secateur.prune(
        checkpoint(), method="slicegpt", ratio=0.15, layout="per-layer", data=notes, samples=8, length=16, output=small
    )
    result = recover(small, out, notes, method=method, teacher=checkpoint(), text=held_out, context=32)
    assert result.training["validation"]["after"] < result.training["validation"]["before"]
    old, new = (json.loads((folder / "secateur.json").read_text()) for folder in (small, out))
    assert old["resize"] == new["resize"]
    assert models.config(small) == models.config(out)
    assert (out / "modeling_secateur.py").is_file()
    state, source = (secateur.load(folder).state_dict() for folder in (out, small))
    shortcuts = [key for key in state if key.endswith("shortcut")]
    assert shortcuts
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, source[key])}
    assert changed.intersection(shortcuts) == (set(shortcuts) if method == "full" else set())
