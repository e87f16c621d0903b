"""Deltas of adapters: the product of the factors is pruned as any other delta, or the factors themselves are."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
import secateur
from conftest import Checkpoints
from secateur.errors import RequestError
from secateur.families.stock import quiet_transformers

RANK, ALPHA = 3, 6.0


@contextmanager
def quiet() -> Iterator[None]:
    """peft asks for names that transformers has given up."""
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        yield


def adapter(base: Path, folder: Path, modules: tuple[str, ...], fan_in: bool = False) -> Path:
    """A peft folder with random factors for some modules."""
    peft = pytest.importorskip("peft")
    model = models.load(base)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(modules), fan_in_fan_out=fan_in, task_type="CAUSAL_LM"
    )
    with quiet():
        adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with quiet():
        adapted.save_pretrained(folder)
        adapted.merge_and_unload().save_pretrained(folder.with_name("merged"))
    shutil.copy(base / "tokenizer.json", folder.with_name("merged"))
    return folder


CASES: list[tuple[str, tuple[str, ...], bool]] = [
    ("llama", ("q_proj", "v_proj", "down_proj"), False),
    ("gpt2", ("c_attn", "c_fc"), True),
]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("name", "modules", "fan_in"), CASES)
@pytest.mark.parametrize("method", ["dare", "magnitude", "wanda", "darex_q"])
def test_an_adapter_is_its_dense_delta(
    name: str, modules: tuple[str, ...], fan_in: bool, method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """The file of an adapter gives the model that the file of the merged fine-tune gives."""
    base = checkpoint(name)
    folder = adapter(base, tmp_path / "adapter", modules, fan_in)
    options: dict[str, Any] = {"values": "float32"} | ({"q": "analytic", "eta": 0.3} if method == "darex_q" else {})
    more = {"method": method, "ratio": 0.8, "options": options, "data": notes, "length": 16, "samples": 4}
    made = {}
    for kind, tuned in (("adapter", folder), ("dense", tmp_path / "merged")):
        result = secateur.delta_pack(base, tuned, tmp_path / f"{kind}.delta", **more)
        secateur.delta_apply(base, tmp_path / f"{kind}.delta", tmp_path / f"{kind}-out")
        made[kind] = tensors(tmp_path / f"{kind}-out"), result
    (ours, told), (dense, other) = made["adapter"], made["dense"]
    assert told["kept"] == other["kept"]
    source = tensors(base)
    for key, tensor in ours.items():
        far = (tensor - dense[key]).abs() > 1e-4 * (1 + dense[key].abs())
        assert int(far.sum()) <= 2  # a score on the edge may fall to the other side
    changed = {key for key, tensor in ours.items() if not torch.equal(tensor, source[key])}
    assert {key.split(".")[-2] for key in changed} == set(modules)


@pytest.mark.parametrize(("name", "modules", "fan_in"), CASES)
def test_nothing_dropped_is_the_merged_model(
    name: str, modules: tuple[str, ...], fan_in: bool, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint(name)
    folder = adapter(base, tmp_path / "adapter", modules, fan_in)
    for kind in ("product", "factors"):
        options = {"values": "float32", "lora": kind}
        secateur.delta_pack(base, folder, tmp_path / kind, method="magnitude", ratio=0, options=options)
        secateur.delta_apply(base, tmp_path / kind, tmp_path / f"{kind}-out")
        with torch.no_grad():
            expected = models.load(tmp_path / "merged")(models.token_ids()).logits
            found = models.load(tmp_path / f"{kind}-out")(models.token_ids()).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dare", "darex_q", "magnitude", "wanda", "structural"])
def test_factors_lose_entries(method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    folder = adapter(checkpoint(), tmp_path / "adapter", ("q_proj", "up_proj"))
    result = secateur.delta_pack(
        checkpoint(), folder, tmp_path / "d", method=method, ratio=0.5, data=notes, length=16, samples=8,
        options={"lora": "factors", **({"q": "analytic", "windows": 2} if method == "darex_q" else {})},
    )  # fmt: skip
    factors = load_file(folder / "adapter_model.safetensors")
    assert result["entries"] == sum(tensor.numel() for tensor in factors.values())
    assert result["bytes"] < result["tuned_bytes"]
    assert result["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    secateur.delta_apply(checkpoint(), tmp_path / "d", tmp_path / "out")
    source, made = tensors(checkpoint()), tensors(tmp_path / "out")
    delta = made["model.layers.0.self_attn.q_proj.weight"] - source["model.layers.0.self_attn.q_proj.weight"]
    assert 0 < int(torch.linalg.matrix_rank(delta.double(), rtol=1e-4)) <= RANK


def test_patterns_and_rslora(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The weight of an adapter as peft computes it."""
    folder = adapter(checkpoint(), tmp_path / "adapter", ("q_proj",))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    peft = pytest.importorskip("peft")
    with quiet():
        merged = peft.PeftModel.from_pretrained(models.load(checkpoint()), folder).merge_and_unload().state_dict()
    options = {"values": "float32"}
    secateur.delta_pack(checkpoint(), folder, tmp_path / "d", method="magnitude", ratio=0, options=options)
    secateur.delta_apply(checkpoint(), tmp_path / "d", tmp_path / "out")
    for key, tensor in tensors(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["dora", "saved", "foreign", "absent", "shape"])
def test_other_adapters_are_refused(what: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = adapter(checkpoint(), tmp_path / "adapter", ("q_proj",))
    file, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(file)
    first = next(key for key in factors if "lora_A" in key)
    if what == "dora":
        config["use_dora"] = True
    elif what == "saved":
        config["modules_to_save"] = ["lm_head"]
    elif what == "foreign":
        factors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = factors[first]
    elif what == "shape":
        factors[first] = factors[first][:, :-1].contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: tensor.clone() for key, tensor in factors.items()}, file)
    if what == "absent":
        file.unlink()
    with pytest.raises(RequestError) as raised:
        secateur.delta_pack(checkpoint(), folder, tmp_path / "d")
    assert raised.value.code == "bad-adapter"
