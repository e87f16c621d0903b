"""The Python door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.errors import RequestError
from secateur.methods.registry import method_class, method_names


def test_a_module_is_not_changed(tmp_path: Path) -> None:
    model = models.stock("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    result = secateur.prune(model, method="magnitude", ratio=0.15)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.model is not None
    assert result.model is not model
    assert result.output is None
    assert sum(p.numel() for p in result.model.parameters()) == result.achieved["params"]
    assert not list(tmp_path.iterdir())


def test_a_module_in_place(notes: Path, tmp_path: Path) -> None:
    model = models.stock("llama-tied").train()
    result = secateur.prune(
        model, method="slicegpt", ratio=0.15, data=notes, samples=4, length=16,
        tokenizer=models.tokenizer(), inplace=True, output=tmp_path / "out",
    )  # fmt: skip
    assert result.model is model
    assert model.training
    assert model.config.hidden_size < 48
    loaded = models.load(tmp_path / "out")
    ids = models.token_ids()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, loaded(ids).logits)


def test_a_module_keeps_its_type() -> None:
    result = secateur.prune(models.stock("llama", torch.bfloat16), method="random", ratio=0.15)
    assert result.model is not None
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_load_needs_no_code_of_ours(checkpoint: Checkpoints, tmp_path: Path) -> None:
    secateur.prune(checkpoint(), method="random", ratio=0.15, output=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in models.config(tmp_path / "out")
    one, other = secateur.load(tmp_path / "out"), models.load(tmp_path / "out")
    assert type(one) is type(other)
    assert type(one).__module__.startswith("transformers.")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "gpt2", "sharded", "tied-repeated"])
@pytest.mark.parametrize("kind", grid.SPACES)
def test_preview_foresees_prune(name: str, kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The same sizes without reading a weight; what prune refuses is a problem there."""
    request = {"method": "magnitude", "ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}}
    seen = secateur.preview(checkpoint(name), **request)
    if name == "gpt2" and kind in ("kv", "residual"):
        assert [p["code"] for p in seen["problems"]] == ["not-native"]
        return
    result = secateur.prune(checkpoint(name), output=tmp_path / "out", **request)
    assert seen["problems"] == []
    for key in ("params", "params_before", "flops_per_token", "kv_bytes_per_token", "bytes_before"):
        assert seen["achieved"][key] == result.achieved[key]
    assert seen["achieved"]["bytes"] == pytest.approx(result.achieved["bytes"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "untied"),
    [({"tie": "untie"}, True), ({"tie": "keep"}, False), ({"basis": "subset"}, False), ({}, True)],
)
def test_preview_states_the_surcharge_of_untying(
    options: dict[str, str], untied: bool, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama-tied")
    request = {"method": "slicegpt", "ratio": 0.2, "options": options}
    seen = secateur.preview(model, **request)
    assert seen["untied"] == (48 * models.VOCABULARY if untied else 0)
    assert seen["kept_tied"] == (0 if untied else 48 * models.VOCABULARY)
    result = secateur.prune(model, data=notes, samples=4, length=16, output=tmp_path / "out", **request)
    assert seen["achieved"]["params"] == result.achieved["params"]
    assert models.config(tmp_path / "out")["tie_word_embeddings"] is not untied


def test_preview_lists_every_problem_at_once(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 65'))
    (tmp_path / "out").mkdir()
    seen = secateur.preview(
        folder, method="magnitud", ratio=0.1, output=str(tmp_path / "out"), text=str(tmp_path / "absent.txt"),
        data=str(tmp_path / "absent.jsonl"),
    )  # fmt: skip
    codes = [problem["code"] for problem in seen["problems"]]
    assert {"unknown-method", "output-exists", "no-text", "no-data", "shape"} <= set(codes)
    assert codes.count("shape") == 9


@pytest.mark.parametrize(
    ("method", "options", "layout", "foreseen"),
    [
        ("magnitude", {}, "per-layer", True),
        ("magnitude", {"allocation": "global"}, "per-layer", False),
        ("flap", {}, "native", True),
        ("flap", {}, "per-layer", False),
        ("dynamic_slicing", {}, "per-layer", False),
        ("joint", {}, "native", False),
    ],
)
def test_preview_says_what_only_the_run_decides(
    method: str,
    options: dict[str, str],
    layout: str,
    foreseen: bool,
    checkpoint: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    with pytest.raises(SystemExit) as caught:
        main(["preview", str(checkpoint()), "--method", method, "--ratio", "0.2", "--layout", layout, *words])
    assert caught.value.code == 0
    assert ("known only at the run" in " ".join(capsys.readouterr().out.split())) is not foreseen


def test_preview_proceeds_without_data(checkpoint: Checkpoints) -> None:
    seen = secateur.preview(checkpoint(), method="slicegpt", ratio=0.15)
    assert seen["problems"] == []
    assert seen["needs_data"]


@pytest.mark.parametrize(
    ("target", "measure"),
    [("params=85%", "params"), ("bytes=85%", "bytes"), ("flops=0.8x", "flops_per_token")],
)
def test_targets(target: str, measure: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(), method="magnitude", target=[target], output=tmp_path / "out", quantum=1)
    wanted = 0.8 if measure == "flops_per_token" else 0.85
    assert result.achieved[measure] / result.achieved[f"{measure}_before"] == pytest.approx(wanted, abs=0.006)


def test_kv_target(checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(
        checkpoint(), method="magnitude", target=["kv_bytes=50%"], options={"spaces": "kv"}, output=tmp_path / "out"
    )
    assert models.config(tmp_path / "out")["num_key_value_heads"] == 2
    assert models.config(tmp_path / "out")["num_attention_heads"] == 4
    assert result.achieved["kv_bytes_per_token"] * 2 == result.achieved["kv_bytes_per_token_before"]


def test_the_paper_s_own_knob(checkpoint: Checkpoints, tmp_path: Path) -> None:
    secateur.prune(checkpoint(), method="magnitude", options={"sparsity": 0.25}, output=tmp_path / "out")
    assert models.config(tmp_path / "out")["intermediate_size"] == 48


def test_recipe_and_call_are_one_request(checkpoint: Checkpoints, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: magnitude\nratio: 0.15\nseed: 3\noptions: {spaces: kv}\n")
    one = secateur.prune(checkpoint(), recipe=recipe, output=tmp_path / "a", ratio=0.2)
    other = secateur.prune(
        checkpoint(), method="magnitude", ratio=0.2, seed=3, options={"spaces": "kv"}, output=tmp_path / "b"
    )
    assert one.achieved == other.achieved
    assert grid.hashes(tmp_path / "a", *grid.TIMED) == grid.hashes(tmp_path / "b", *grid.TIMED)


def test_unknown_keyword_is_refused(checkpoint: Checkpoints) -> None:
    with pytest.raises(RequestError, match="did you mean ratio"):
        secateur.prune(checkpoint(), ration=0.3, output="never")


def test_methods_describe_their_options() -> None:
    found = secateur.methods()
    assert set(found) == set(method_names())
    for name, facts in found.items():
        assert facts["title"]
        assert facts["data"] in ("none", "text", "labels")
        assert set(facts["options"]) == set(method_class(name).model_fields)


def test_inspect_counts(checkpoint: Checkpoints) -> None:
    found = secateur.inspect(checkpoint("mixtral"))
    assert found["params"] == sum(p.numel() for p in models.load(checkpoint("mixtral")).parameters())
    assert found["spaces"]["ffn"]["count"] == 12
    assert found["spaces"]["kv"]["units"] == 4


def test_report_and_card(checkpoint: Checkpoints, held_out: Path, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(), method="magnitude", ratio=0.15, text=held_out, output=tmp_path / "out")
    report, card = ((tmp_path / "out" / name).read_text() for name in (grid.REPORT, "README.md"))
    assert f"{result.achieved['params']:,}" in report
    assert f"{result.achieved['params']:,}" in card
    assert result.perplexity is not None
    assert f"{result.perplexity['after']:.3f}" in report
