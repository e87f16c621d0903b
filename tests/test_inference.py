"""Architectures without a family file: what is inferred is right or refused, and traps in a stock class are caught."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

import models
import secateur
import unknown
import zoo
from secateur.errors import RequestError
from secateur.families import load_family
from secateur.inference import family_text, infer
from secateur.inference.anatomy import Anatomy
from secateur.inference.opening import FAMILY_FILE, read_family
from secateur.inference.verdict import _infer

HELD_OUT = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "mixtral")
_FIELDS = ("blocks", "norm", "norm_offset", "scaled_embedding", "parallel", "stem", "sizes", "defaults", "disk")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _infer.cache_clear()
    yield
    _infer.cache_clear()


def raw(name: str, **changes: Any) -> dict[str, Any]:
    """The content of ``config.json`` of a tiny model of the zoo, or of an unknown type."""
    tiny = zoo.ALL.get(name) or unknown.UNKNOWN[name]
    config = AutoConfig.for_model(tiny.model_type or name, **{**zoo.COMMON, **tiny.config, **changes})
    found: dict[str, Any] = config.to_dict()
    return found


# -- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HELD_OUT)
def test_known_families_are_inferred_as_they_are_written(name: str) -> None:
    """Hidden behind its name, every early family comes out as its file has it."""
    written, found = load_family(name), infer(raw(name)).family
    for field in _FIELDS:
        assert getattr(found, field) == getattr(written, field), field
    assert {k: (e.roles, e.experts, e.turns, e.kind) for k, e in found.block.items()} == {
        k: (e.roles, e.experts, e.turns, e.kind) for k, e in written.block.items()
    }
    assert found.transposed == written.transposed


@pytest.mark.parametrize("name", ["arcee", "gptj", "granitemoe"])
def test_unknown_types_are_pruned_right(name: str) -> None:
    """Pruned and compared with an oracle that knows nothing of families; all of them: ``python tests/unknown.py``."""
    states = {kind: state for kind, (state, _) in unknown.row(name).items()}
    assert states["ffn"] == states["blocks"] == "right"
    assert "wrong" not in states.values()


def test_fused_rows_in_turns_are_found_by_trying() -> None:
    found = infer(raw("gpt_neox")).family
    assert found.block["attention.query_key_value"].turns == "kv"
    assert infer(raw("glm")).family.block["mlp.gate_up_proj"].turns is None


def test_the_same_twice() -> None:
    first = infer(raw("arcee"))
    _infer.cache_clear()
    assert infer(raw("arcee")) == first


def test_family_text_reads_back(tmp_path: Path) -> None:
    for name in ("arcee", "gptj", "granitemoe"):
        family = infer(raw(name)).family
        path = tmp_path / f"{name}.yaml"
        path.write_text(family_text(family))
        assert read_family(path) == family


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", ("rms", 0.0)), ("gemma", ("rms", 1.0)), ("opt", ("layer", 0.0))]
)
def test_norms_are_told_apart_by_what_they_do(name: str, expected: tuple[str, float]) -> None:
    anatomy = Anatomy({**raw(name), "vocab_size": 101, "use_cache": False}, load_family(name).blocks)
    assert {anatomy.gain(norm) for norm in anatomy.norms()} == {expected}


# -- refused ---------------------------------------------------------------------------------------------------------


def test_refused_by_name() -> None:
    cases = {
        "made_up": ({"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "its own code"),
        "vit": ({"model_type": "vit"}, "no causal language model"),
        "pegasus": ({"model_type": "pegasus"}, "encoder"),
        "dbrx": (raw("dbrx"), "holds others"),
        "mamba": (raw("mamba"), "attention heads"),
    }
    for config, reason in cases.values():
        with pytest.raises(RequestError, match=reason) as caught:
            infer(config)
        assert caught.value.code == "unknown-architecture"


Patch = pytest.MonkeyPatch


def _scaled_by_heads(patch: Patch) -> None:
    made = modeling_llama.LlamaAttention.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.scaling = 1 / config.num_attention_heads

    patch.setattr(modeling_llama.LlamaAttention, "__init__", init)


def _heads_with_places(patch: Patch) -> None:
    plain = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(self, hidden_states, *args, **kwargs)
        rows = self.o_proj.weight.shape[1]
        slopes = torch.linspace(1, 2, rows, dtype=out.dtype)
        return out + torch.nn.functional.linear(slopes, self.o_proj.weight), weights

    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)


def _scaled_by_width(patch: Patch) -> None:
    plain = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, x) * x.shape[-1] / 64)


def _norm_over_neurons(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        result: Tensor = self.down_proj(inner * inner.square().mean(-1, keepdim=True).add(1e-6).rsqrt())
        return result

    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def _neurons_with_places(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        result: Tensor = self.down_proj(inner * torch.linspace(1, 2, inner.shape[-1], dtype=x.dtype))
        return result

    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def _other_norm(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)
        return result

    patch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def _numbered_blocks(patch: Patch) -> None:
    made = modeling_llama.LlamaAttention.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.scaling = self.scaling / (1 + layer_idx)

    patch.setattr(modeling_llama.LlamaAttention, "__init__", init)


def _every_fourth_block(patch: Patch) -> None:
    plain = modeling_llama.LlamaMLP.forward
    made = modeling_llama.LlamaDecoderLayer.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.mlp.layer_idx = layer_idx

    def forward(self: Any, x: Tensor) -> Tensor:
        result: Tensor = plain(self, x) * (2 if self.layer_idx % 4 == 3 else 1)
        return result

    patch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)
    patch.setattr(modeling_llama.LlamaMLP, "forward", forward)


@pytest.mark.parametrize(
    ("trap", "caught"),
    [
        (_scaled_by_heads, {"kv"}),
        (_heads_with_places, {"kv"}),
        (_scaled_by_width, {"residual"}),
        (_norm_over_neurons, {"ffn"}),
        (_neurons_with_places, {"ffn"}),
        (_other_norm, {"residual"}),
        (_numbered_blocks, {"blocks"}),
        (_every_fourth_block, {"blocks"}),
    ],
)
def test_traps_are_refused_and_the_rest_stays(monkeypatch: Patch, trap: Any, caught: set[str]) -> None:
    trap(monkeypatch)
    found = infer(raw("llama", num_hidden_layers=8))
    assert set(found.refused) == caught
    assert {rule.size for rule in found.family.fixed} == caught
    assert set(found.verified) == {"ffn", "kv", "residual", "blocks"} - caught


def test_blocks_that_do_not_chain_are_refused(monkeypatch: Patch) -> None:
    plain = modeling_llama.LlamaModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.layers[0]
        seen: list[Tensor] = []
        handles = [
            first.register_forward_hook(lambda _, __, output: seen.append(output)),
            self.layers[2].register_forward_pre_hook(lambda _, inputs: (inputs[0] + seen[0],)),
        ]
        try:
            return plain(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(RequestError, match=r"do not read one from the other|one by one"):
        infer(raw("llama"))


def test_attention_to_later_tokens_is_refused(monkeypatch: Patch) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    made = modeling_llama.LlamaAttention.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.is_causal = False

    monkeypatch.setattr(modeling_llama.LlamaAttention, "__init__", init)
    with pytest.raises(RequestError, match="see those after"):
        infer(raw("llama"))


# -- doors -----------------------------------------------------------------------------------------------------------


class _Notes:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int) -> None: ...

    def step(self, done: int) -> None: ...

    def note(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def arcee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type without a family file."""
    folder = tmp_path_factory.mktemp("models") / "arcee"
    return models.save(folder, zoo.Tiny(unknown.UNKNOWN["arcee"].config, model_type="arcee"))


def test_every_door_opens_an_unknown_type(arcee: Path, tmp_path: Path, held_out: Path) -> None:
    notes = _Notes()
    found = secateur.preview(arcee, method="magnitude", ratio=0.1, progress=notes)
    assert not found["problems"]
    result = secateur.prune(arcee, method="magnitude", ratio=0.1, output=tmp_path / "out", progress=notes)
    assert result.achieved["params"] == found["achieved"]["params"]
    figures = secateur.evaluate(tmp_path / "out", text=held_out, context=32, against=arcee, progress=notes)
    assert figures["params"] < figures["against"]["params"]
    assert sum("no family file: inferred and verified" in line for line in notes.lines) == 4


def test_inspect_writes_the_family_file_and_reads_it(arcee: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in arcee.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    facts = secateur.inspect(copy, write_family=copy / FAMILY_FILE)
    assert facts["family"] == "inferred"
    assert facts["verified"] == ["ffn", "kv", "residual", "blocks"]
    assert yaml.safe_load((copy / FAMILY_FILE).read_text())["block"]["self_attn.q_proj"] == "q"
    assert secateur.inspect(copy)["family"] == "beside the model"
    with pytest.raises(RequestError, match="exists already"):
        secateur.inspect(copy, write_family=copy / FAMILY_FILE)


def test_a_wrong_family_file_is_not_believed(arcee: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in arcee.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    family = yaml.safe_load(family_text(infer(json.loads((arcee / "config.json").read_text())).family))
    family["norm"], family["norm_offset"] = "rms", 1.0
    (copy / FAMILY_FILE).write_text(yaml.safe_dump(family))
    facts = secateur.inspect(copy)
    assert set(facts["refused"]) == {"residual"}
    family["block"]["mlp.up_proj"] = "down"
    (copy / FAMILY_FILE).write_text(yaml.safe_dump(family))
    with pytest.raises(RequestError, match="it is a second"):
        secateur.inspect(copy)
    family["block"]["mlp.up_proj"], family["blocks"] = "up", "model.floors"
    (copy / FAMILY_FILE).write_text(yaml.safe_dump(family))
    with pytest.raises(RequestError, match=r"the model cannot be built by it \(AttributeError.*floors"):
        secateur.inspect(copy)
