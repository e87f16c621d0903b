"""Every family x space x layout is exact or refused with the reason written down by hand; forms on disk; tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import grid
import limits
import models
import secateur
from conftest import Checkpoints
from encoders import ENCODERS
from secateur.errors import RequestError
from secateur.families import Architecture, family_names
from secateur.families.limits import LAYOUTS, verdict
from secateur.families.stock import quiet_transformers
from zoo import ALL, COMMON, FAMILIES

LAYER_NORM = ("gpt2", "opt", "phi", "gpt_neox", "falcon", "bloom", "stablelm", "starcoder2", "cohere")


def config_of(name: str) -> dict[str, object]:
    """The content of the ``config.json`` of a model of the zoo."""
    tiny = ALL[name]
    with quiet_transformers():
        found: dict[str, object] = AutoConfig.for_model(tiny.model_type or name, **{**COMMON, **tiny.config}).to_dict()
    return found


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_cut(name: str) -> None:
    """The verdict on every cell, its reason word by word; ``make grid`` cuts those that are exact."""
    architecture, family = Architecture(config_of(name)), ALL[name].model_type or name
    for kind in grid.KINDS:
        for layout in LAYOUTS:
            reasons = "; ".join(limits.reasons(name, kind, layout))
            state, why = verdict(architecture, kind, layout)  # type: ignore[arg-type]
            assert (state, why if reasons else "") == (_state(family, kind, reasons), reasons), (kind, layout)


def _state(family: str, kind: str, reasons: str) -> str:
    if reasons:
        return "refused"
    return "exact with 1 extra dimension" if kind == "residual" and family in LAYER_NORM else "exact"


def test_every_family_is_in_the_zoo() -> None:
    assert set(family_names()) == {*FAMILIES, *ENCODERS} == set(secateur.families())


REFUSED = (
    ("olmo2", "kv", "per-layer"),
    ("gemma2", "residual", "native"),
    ("phi3-longrope", "kv", "native"),
    ("bloom", "ffn", "native"),
    ("falcon", "kv", "per-layer"),
    ("deepseek_v3", "heads", "per-layer"),
    ("stablelm-norms", "residual", "per-layer"),
)


@pytest.mark.parametrize(("name", "kind", "layout"), REFUSED)
def test_refusals_leave_nothing(name: str, kind: str, layout: str, tmp_path: Path) -> None:
    cell = grid.Cell(name, "magnitude", {"spaces": kind}, layout)
    assert grid.run_cell(cell, tmp_path).startswith("refused: ")


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_and_preview(name: str, checkpoint: Checkpoints) -> None:
    """Counts are those of the stock model; a preview names what prune would refuse."""
    seen = secateur.inspect(checkpoint(name))
    assert seen["params"] == sum(p.numel() for p in models.stock(name).parameters())
    for kind in ("ffn", "residual"):
        found = secateur.preview(checkpoint(name), method="magnitude", ratio=0.15, options={"spaces": kind})
        assert bool(found["problems"]) == bool(limits.reasons(name, kind, "native")), kind


# -- forms on disk -----------------------------------------------------------------------------------------------------


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the base model's prefix."""
    return {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}


def old_neox(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the masks and tables that older versions stored."""
    found = dict(tensors)
    for i in range(3):
        place = f"gpt_neox.layers.{i}.attention"
        found[f"{place}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        found[f"{place}.masked_bias"] = torch.tensor(-1e9)
        found[f"{place}.rotary_emb.inv_freq"] = torch.ones(1)
    return found


def plain_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head under the module's name."""
    return {key.replace("embed_out", "lm_head"): tensor for key, tensor in tensors.items()}


def repeated_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head that the file repeats."""
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"]}


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked in the file as they are in the module."""
    found = dict(tensors)
    for block in range(3):
        place = f"model.layers.{block}.mlp.experts"
        gate, up, down = (
            [found.pop(f"{place}.{e}.{part}_proj.weight") for e in range(4)] for part in ("gate", "up", "down")
        )
        found[f"{place}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        found[f"{place}.down_proj"] = torch.stack(down)
    return found


def further_tokens(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a block beyond the last, which predicts further tokens and which the stock class leaves alone."""
    beyond = {key.replace("layers.2.", "layers.3."): tensor for key, tensor in tensors.items() if "layers.2." in key}
    return {**tensors, **beyond}


FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "bloom-bare": ("bloom", bare, "blocks"),
    "gpt_neox-old": ("gpt_neox", old_neox, "ffn"),
    "gpt_neox-head": ("gpt_neox", plain_head, "ffn"),
    "falcon-repeated": ("falcon", repeated_head, "ffn"),
    "qwen2_moe-fused": ("qwen2_moe", fused, "ffn"),
    "qwen3_moe-fused": ("qwen3_moe", fused, "residual"),
    "deepseek_v3-further": ("deepseek_v3", further_tokens, "residual"),
}


@pytest.mark.parametrize("form", FORMS)
def test_hub_forms_cut_alike(form: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """However a model lies on disk, a copy is one and the cut is that of the plain form."""
    name, edit, kind = FORMS[form]
    source = models.save(tmp_path / "source", name, edit=edit)
    secateur.prune(source, ratio=0, output=tmp_path / "copy")
    assert grid.hashes(tmp_path / "copy") == grid.hashes(source)
    asked = {"method": "magnitude", "ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}}
    secateur.prune(source, output=tmp_path / "a", **asked)
    secateur.prune(checkpoint(name), output=tmp_path / "b", **asked)
    with quiet_transformers():
        one, other = (secateur.load(tmp_path / folder).state_dict() for folder in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_buffers_of_the_router_travel(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """What corrects the choice of experts is no parameter, and goes with its block."""
    secateur.prune(
        checkpoint("deepseek_v3"), method="random", ratio=0.2, options={"spaces": "blocks"}, output=tmp_path / "out"
    )
    record = secateur.inspect(tmp_path / "out")
    assert [name.split(".")[-1] for name in record["passthrough"]] == ["e_score_correction_bias"] * len(
        record["passthrough"]
    )
    dense, cut = (models.load(folder).state_dict() for folder in (checkpoint("deepseek_v3"), tmp_path / "out"))
    values = [tensor for key, tensor in dense.items() if key.endswith("e_score_correction_bias")]
    found = [tensor for key, tensor in cut.items() if key.endswith("e_score_correction_bias")]
    assert found
    assert all(any(torch.equal(tensor, value) for value in values) for tensor in found)


def test_keys_by_another_name_follow(tmp_path: Path) -> None:
    """What a configuration calls otherwise is not left behind at its old value."""
    folder = models.save(tmp_path / "model", "bloom")
    config = models.config(folder)
    config["num_hidden_layers"] = config.pop("n_layer")
    (folder / "config.json").write_text(json.dumps(config))
    secateur.prune(folder, method="random", ratio=0.2, options={"spaces": "blocks"}, output=tmp_path / "out")
    assert models.load(tmp_path / "out").config.n_layer == 2
    assert "num_hidden_layers" not in models.config(tmp_path / "out")


def test_a_norm_that_no_role_describes_must_be_there(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_layernorm.norms.2.weight"

    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    folder = models.save(tmp_path / "model", "stablelm-norms", edit=without)
    with pytest.raises(RequestError, match=name):
        secateur.inspect(folder)


def test_files_of_four_bits_are_refused(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "gpt_oss")
    config = {**models.config(folder), "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="mxfp4"):
        secateur.inspect(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scale_of_embeddings_is_the_stock_one(dtype: torch.dtype) -> None:
    model = models.stock("gemma", dtype)
    scale = model.model.embed_tokens.embed_scale.to(dtype)
    assert Architecture(config_of("gemma")).embedding_gain(dtype) == float(scale)
