"""Results run elsewhere: GGUF in llama.cpp and ONNX in onnxruntime compute what transformers computes.

What the family files call ``verified`` is verified here, cell by cell, where the runtime is installed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.errors import InternalError, RequestError, SecateurError
from secateur.families import Architecture, family_names, load_family
from secateur.families.limits import refusals
from secateur.families.loading import RUNTIMES, cut_kinds, loads_in
from secateur.runtimes import gguf_file

ENDING = {"llama.cpp": ".gguf", "onnxruntime": ".onnx"}


def needs(*names: str) -> None:
    """Skip where a package is absent."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def can_run(runtime: str) -> None:
    needs(*{"llama.cpp": ("gguf", "llama_cpp"), "onnxruntime": ("onnx", "onnxscript", "onnxruntime")}[runtime])


def cut(model: Path, kinds: str, folder: Path) -> Path:
    """``model`` without some units of each of the ``kinds``, written as KIND+KIND."""
    for kind in kinds.split("+"):
        output = folder / f"without-{kind}"
        options = {"method": "magnitude", "ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}}
        secateur.prune(model, output=output, **options)
        model = output
    return model


# -- the claims ------------------------------------------------------------------------------------------------------


def claims() -> list[tuple[str, str, str]]:
    """(family, runtime, kinds) of every ``verified`` in the family files: each kind alone, and all at once.

    ONNX graphs are traced, whatever the sizes are: there, all kinds at once stand for each.
    """
    found = []
    for family in family_names():
        architecture = Architecture.example(family)
        for runtime, entry in load_family(family).loads_in.items():
            stated = dict.fromkeys(grid.SPACES, entry) if isinstance(entry, str) else entry
            native = [kind for kind in stated if not refusals(architecture, kind)]
            kinds = [kind for kind in native if stated[kind].startswith("verified")]
            alone = [] if runtime == "onnxruntime" else kinds
            found += [(family, runtime, each) for each in [*alone, *(["+".join(kinds)] if kinds else [])]]
    return found


@pytest.mark.parametrize(("family", "runtime", "kinds"), claims())
def test_what_is_called_verified_is(
    family: str, runtime: str, kinds: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    can_run(runtime)
    model = cut(checkpoint(family), kinds, tmp_path)
    result = secateur.export(model, tmp_path / f"model{ENDING[runtime]}")
    check = result["check"]
    assert check["generated_tokens"] >= 2
    assert check["logits_difference"] < (1e-5 if family != "gpt2" or runtime != "llama.cpp" else 1e-3)
    assert result["loads_in"] == {runtime: f"verified({check['version']})"}


@pytest.mark.parametrize("family", [n for n in family_names() if load_family(n).loads_in.get("llama.cpp") == "no"])
def test_what_is_said_not_to_load_is_refused(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    needs("gguf")
    with pytest.raises(RequestError, match="no form"):
        secateur.export(checkpoint(family), tmp_path / "model.gguf", check=False)
    assert not list(tmp_path.iterdir())


def test_the_record_shows_the_claims(checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(), method="random", ratio=0.15, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    stated = load_family("llama").loads_in
    assert record["loads_in"] == result.loads_in
    assert set(result.loads_in) == {"transformers", *RUNTIMES}
    assert all(result.loads_in[runtime] == stated[runtime] for runtime in RUNTIMES)
    preview = secateur.preview(checkpoint(), method="random", ratio=0.15)
    assert {**result.loads_in, "transformers": ""} == {**preview["loads_in"], "transformers": ""}


def test_the_worst_of_what_was_cut_is_stated() -> None:
    family = load_family("llama").model_copy(update={"loads_in": {"vllm": {"ffn": "expected", "kv": "no"}}})
    dense = Architecture({**models.ALL["llama"].config, "model_type": "llama", "hidden_size": 64}).sizes
    thin = dense.resized("ffn", 32)
    assert cut_kinds(dense, thin) == {"ffn"}
    assert loads_in(family, dense, thin)["vllm"] == "expected"
    assert loads_in(family, dense, thin.resized("kv", 2))["vllm"] == "no"
    assert loads_in(family, dense, dense.resized("blocks", 2))["vllm"] == "unknown"
    # cut before: the stream is narrower than the attention, whatever goes now
    narrow = dense.resized("residual", 48)
    assert cut_kinds(narrow, narrow.resized("ffn", 32)) == {"ffn", "residual"}


# -- llama.cpp -------------------------------------------------------------------------------------------------------


SHAPES = {
    "llama-wide": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-biased": ("llama-mha", {}),
    "llama-scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2-stretched": ("qwen2-full", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2-square": ("qwen2-full", {"hidden_size": 64}),
    "qwen2-untied": ("qwen2-full", {"hidden_size": 64, "tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2-inner": ("gpt2-inner", {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_dense_shapes_run_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """Tied and not, grouped or not, with biases, attention wider than the stream or not, scaled rotary tables."""
    can_run("llama.cpp")
    base, changes = SHAPES[name]
    model = models.save(tmp_path / "model", base, **changes)
    result = secateur.export(model, tmp_path / "model.gguf")
    assert result["check"]["generated_tokens"] == 16
    assert result["check"]["texts_tokenised"] == 5
    assert result["architecture"] == ("llama" if name == "qwen2-stretched" else name.partition("-")[0])


@pytest.mark.parametrize("family", ["llama", "qwen2-full"])
def test_a_sliced_stream_runs_in_llama_cpp(family: str, notes: Path, tmp_path: Path) -> None:
    """Attention wider than the stream, after a rotation: head size and form must say so."""
    can_run("llama.cpp")
    from gguf import GGUFReader

    model = models.save(tmp_path / "model", family, hidden_size=64)
    data = {"data": notes, "samples": 8, "length": 32}
    secateur.prune(model, method="slicegpt", ratio=0.15, output=tmp_path / "out", **data)
    assert models.config(tmp_path / "out")["hidden_size"] < 64
    result = secateur.export(tmp_path / "out", tmp_path / "model.gguf")
    assert result["architecture"] == "llama"  # the form of qwen2 wants a square attention
    assert result["check"]["generated_tokens"] == 16
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.attention.key_length"].contents() == fields["llama.attention.value_length"].contents() == 8
    assert fields["llama.attention.head_count"].contents() == 8


def test_a_file_that_llama_cpp_refuses_is_not_published(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qwen2's own form with an attention wider than the stream: why the general one is taken."""
    can_run("llama.cpp")
    monkeypatch.setitem(gguf_file.FORMS, "qwen2", gguf_file.Form("qwen2"))
    with pytest.raises(InternalError, match="wrong shape"):
        secateur.export(checkpoint("qwen2-full"), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_published(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    can_run("llama.cpp")
    monkeypatch.setitem(gguf_file.FORMS, "llama", gguf_file.Form("llama"))  # rotary pairs as transformers has them
    with pytest.raises(InternalError, match="logits differ"):
        secateur.export(checkpoint(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_in_llama_cpp(dtype: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    can_run("llama.cpp")
    wide = secateur.export(checkpoint("mixtral"), tmp_path / "wide.gguf")
    narrow = secateur.export(checkpoint("mixtral"), tmp_path / "narrow.gguf", dtype=dtype)
    assert wide["dtype"] == "float32"
    assert narrow["dtype"] == dtype
    assert narrow["bytes"] < 0.65 * wide["bytes"]


@pytest.mark.assets
@pytest.mark.parametrize("name", ["stories260k-llama", "llama-docs-8m", "mixtral-docs-9m"])
def test_trained_models_run_in_llama_cpp(name: str, assets: Path, tmp_path: Path) -> None:
    """Their tokenizers too: byte-level BPE, and BPE by scores with byte fallback."""
    can_run("llama.cpp")
    model = assets / "lm" / name
    secateur.prune(model, method="magnitude", ratio=0.2, output=tmp_path / "out", options={"spaces": "residual"})
    result = secateur.export(tmp_path / "out", tmp_path / "model.gguf", dtype="float32")
    assert result["check"]["texts_tokenised"] == 5
    assert result["check"]["generated_tokens"] == 16


# -- GGUF without its runtime ----------------------------------------------------------------------------------------


def test_gguf_holds_the_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Read back with the format's own library: every element once, rotary pairs side by side."""
    needs("gguf")
    from gguf import GGUFReader

    result = secateur.export(checkpoint(), tmp_path / "model.gguf", check=False)
    assert result["check"] is None
    assert result["loads_in"] == {"llama.cpp": "expected"}
    reader = GGUFReader(tmp_path / "model.gguf")
    held = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    state = models.load(checkpoint()).state_dict()
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in state.values())
    assert torch.equal(held["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"])
    query, found = state["model.layers.0.self_attn.q_proj.weight"], held["blk.0.attn_q.weight"]
    for head in range(8):
        for pair in range(4):
            assert torch.equal(found[8 * head + 2 * pair], query[8 * head + pair])
            assert torch.equal(found[8 * head + 2 * pair + 1], query[8 * head + 4 + pair])
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == models.VOCABULARY
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_a_sliding_window_bounds_the_context(checkpoint: Checkpoints, tmp_path: Path) -> None:
    needs("gguf")
    for family, context in (("mistral", 8), ("qwen2", 8), ("qwen2-full", models.CONTEXT)):
        result = secateur.export(checkpoint(family), tmp_path / f"{family}.gguf", check=False)
        assert result["context"] == context


@pytest.mark.parametrize(
    ("base", "changes", "found"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    base: str, changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    needs("gguf")
    model = models.save(tmp_path / "model", base, **changes)
    with pytest.raises(RequestError, match=found):
        secateur.export(model, tmp_path / "model.gguf", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(tmp_path: Path) -> None:
    needs("gguf")
    model = models.save(tmp_path / "model")
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}]}
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="Punctuation") as refused:
        secateur.export(model, tmp_path / "model.gguf", check=False)
    assert "--no-tokenizer" in refused.value.hint
    secateur.export(model, tmp_path / "model.gguf", check=False, tokenizer=False)


def test_token_ids_alone_run_in_llama_cpp(tmp_path: Path) -> None:
    can_run("llama.cpp")
    model = models.save(tmp_path / "model", with_tokenizer=False)
    with pytest.raises(RequestError):
        secateur.export(model, tmp_path / "model.gguf")
    result = secateur.export(model, tmp_path / "model.gguf", tokenizer=False)
    assert result["check"]["texts_tokenised"] == 0


# -- ONNX ------------------------------------------------------------------------------------------------------------


def test_the_per_layer_layout_runs_in_onnxruntime_only(checkpoint: Checkpoints, tmp_path: Path) -> None:
    can_run("onnxruntime")
    needs("gguf")
    options = {"method": "magnitude", "layout": "per-layer", "ratio": 0.15}
    result = secateur.prune(checkpoint(), output=tmp_path / "out", **options)
    stated = {"vllm": "no", "llama.cpp": "no", "onnxruntime": "expected"}
    assert {runtime: result.loads_in[runtime] for runtime in stated} == stated
    assert secateur.export(tmp_path / "out", tmp_path / "model.onnx")["check"]["generated_tokens"] == 16
    with pytest.raises(RequestError, match="per-layer"):
        secateur.export(tmp_path / "out", tmp_path / "model.gguf", check=False)


def test_weights_beside_a_large_graph(checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    can_run("onnxruntime")
    from secateur.runtimes import onnx

    monkeypatch.setattr(onnx, "ONE_FILE", 1000)
    result = secateur.export(checkpoint("gpt2"), tmp_path / "model.onnx")
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert result["bytes"] == sum(files.values())
    ran = onnx.run_onnx(tmp_path / "model.onnx", [1, 2, 3], 2)
    with torch.no_grad():
        expected = models.load(checkpoint("gpt2"))(torch.tensor([[1, 2, 3]])).logits[0].numpy()
    assert np.abs(ran.logits - expected).max() < 1e-4


def test_an_onnx_graph_that_computes_something_else_is_not_published(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    can_run("onnxruntime")
    from secateur.runtimes import check, onnx

    monkeypatch.setattr(onnx, "write_onnx", lambda *_: None)
    monkeypatch.setattr(
        onnx, "run_onnx", lambda _, prompt, steps: check.Ran("none", np.zeros((len(prompt), 300)), [0] * steps)
    )
    with pytest.raises(InternalError, match="logits differ"):
        secateur.export(checkpoint(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_greedy_tokens_count_as_far_as_they_are_clear() -> None:
    from secateur.runtimes.check import Ran, Reference, compare

    logits = np.eye(4, dtype=np.float32)
    clear = Reference([0, 1, 2, 3], logits, [1, 2, 3], [0.5, 0.5, 0.5])
    assert compare("x", clear, Ran("1", logits, [1, 2, 3]), 1e-4).generated_tokens == 3
    with pytest.raises(InternalError, match="greedy token 2"):
        compare("x", clear, Ran("1", logits, [1, 0, 3]), 1e-4)
    tied = Reference([0, 1, 2, 3], logits, [1, 2, 3], [0.5, 1e-5, 0.5])
    assert compare("x", tied, Ran("1", logits, [1, 0, 3]), 1e-4).generated_tokens == 1
    with pytest.raises(InternalError, match="shape"):
        compare("x", clear, Ran("1", logits[:2], [1, 2, 3]), 1e-4)
    with pytest.raises(InternalError, match="differ by nan"):
        compare("x", clear, Ran("1", logits * np.nan, [1, 2, 3]), 1e-4)


# -- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["model.bin"], "bad-format"),
        (["there.gguf"], "output-exists"),
        (["model.gguf", "--dtype", "int8"], "bad-dtype"),
        (["model.onnx", "--dtype", "float16"], "bad-dtype"),
    ],
)
def test_bad_requests_are_refused(
    words: list[str], code: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    needs("gguf", "onnx", "onnxscript", "onnxruntime")
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(checkpoint()), "--no-check", "--json", "-o", *words])
    assert stopped.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert [p.name for p in tmp_path.iterdir()] == ["there.gguf"]
    assert Path("there.gguf").read_text() == "mine"


@pytest.mark.parametrize(("name", "extra"), [("model.gguf", "gguf"), ("model.onnx", "onnx")])
def test_a_missing_extra_is_named(
    name: str, extra: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    absent = ("gguf", "llama_cpp", "onnx", "onnxruntime", "onnxscript")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module in absent else found(module, *a))
    with pytest.raises(SecateurError) as refused:
        secateur.export(checkpoint(), tmp_path / name)
    assert f"secateur[{extra}]" in refused.value.hint
    assert not list(tmp_path.iterdir())


def test_the_command(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("gguf")
    monkeypatch.chdir(tmp_path)
    words = ["export", str(checkpoint("llama-tied")), "--no-check", "-o", "model.gguf"]
    for more in (["--json"], ["--force"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *more])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert "expected" in shown
        if "--json" in more:
            keys = {"output", "bytes", "dtype", "architecture", "context", "tensors", "seconds", "check", "loads_in"}
            assert set(json.loads(shown)) == keys
    assert (tmp_path / "model.gguf.previous" / "model.gguf").is_file()
