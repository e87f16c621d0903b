"""Every bad input is refused with a message that names the thing, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from conftest import Checkpoints
from secateur.cli import main

Damage = Callable[[Path], object]
"""Changes a copy of a good llama folder."""


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    captured = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def edit_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(file: str) -> Damage:
    def damage(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = float("inf")


_NAN = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Bad:
    """One bad input.

    ``{model}``, ``{tmp}``, ``{notes}`` and ``{out}`` in the words and names are replaced by paths.
    """

    names: tuple[str, ...]
    words: tuple[str, ...] = ("--method", "magnitude", "--ratio", "0.15")
    damage: Damage | None = None
    model: str = "{model}"


_DATA = ("--method", "slicegpt", "--ratio", "0.15", "--length", "16", "--samples", "4", "--data")
_TEXT = ("--method", "magnitude", "--ratio", "0.15", "--text")

BAD: dict[str, Bad] = {
    "missing folder": Bad(("{tmp}/absent", "no such folder"), model="{tmp}/absent"),
    "a file": Bad(("{notes}", "it is a file"), model="{notes}"),
    "no config": Bad(("{model}", "config.json"), damage=remove("config.json")),
    "no weights": Bad(("{model}", "no safetensors"), damage=remove("model.safetensors")),
    "no model type": Bad(("config.json", "model_type"), damage=edit_config(model_type=None)),
    "unknown architecture": Bad(("lama", "did you mean llama"), damage=edit_config(model_type="lama")),
    "quantised": Bad(("quantised", "gptq"), damage=edit_config(quantization_config={"quant_method": "gptq"})),
    "integer weights": Bad(
        ("model.norm.weight", "I8"),
        damage=edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})),
    ),
    "multimodal": Bad(
        ("llava", "multimodal", "vision_config"),
        damage=edit_config(model_type="llava", vision_config={}, text_config={}),
    ),
    "classifier": Bad(
        ("LlamaForSequenceClassification",), damage=edit_config(architectures=["LlamaForSequenceClassification"])
    ),
    "broken config": Bad(("config.json", "not valid JSON"), damage=write("config.json", b'{"model_type": "llama"')),
    "config is a list": Bad(("config.json", "list"), damage=write("config.json", b"[1, 2]")),
    "config of bytes": Bad(("config.json",), damage=write("config.json", b"\xff\xfe\x00")),
    "nonsense size": Bad(("hidden",), damage=edit_config(hidden_size="wide")),
    "other sizes": Bad(("mlp.", "[64, 48]"), damage=edit_config(intermediate_size=65)),
    "too many blocks": Bad(("model.layers.3.",), damage=edit_config(num_hidden_layers=4)),
    "zero heads": Bad(("config",), damage=edit_config(num_attention_heads=0)),
    "truncated": Bad(("model.safetensors", "truncated"), damage=truncate),
    "garbled": Bad(("model.safetensors", "damaged"), damage=garble),
    "empty weights": Bad(("model.safetensors",), damage=write("model.safetensors", b"")),
    "missing tensor": Bad(("model.norm.weight",), damage=edit_tensors(lambda t: t.pop("model.norm.weight"))),
    "nan": Bad((_NAN, "1 of its"), damage=edit_tensors(nan)),
    "nan, random": Bad((_NAN,), ("--method", "random", "--ratio", "0.15"), edit_tensors(nan)),
    "nan, slicegpt": Bad((_NAN,), (*_DATA, "{notes}"), edit_tensors(nan)),
    "infinite": Bad(("lm_head.weight",), damage=edit_tensors(infinite)),
    "pickle only": Bad(("pytorch_model.bin", "save_pretrained"), damage=pickle_only),
    "index leaves": Bad(("../model.safetensors", "leaves the folder"), damage=index("../model.safetensors")),
    "index absolute": Bad(("/etc/passwd", "leaves the folder"), damage=index("/etc/passwd")),
    "index names no file": Bad(("other.safetensors",), damage=index("other.safetensors")),
    "index is empty": Bad(("weight_map",), damage=write("model.safetensors.index.json", b"{}")),
    **{
        f"ratio {r}": Bad((f"ratio {r}", "0"), ("--method", "magnitude", f"--ratio={r}"))
        for r in ("-0.1", "1", "1.5", "nan")
    },
    "ratio abc": Bad(("ratio 'abc'", "not a number"), ("--method", "magnitude", "--ratio", "abc")),
    "ratio in per cent": Bad(("did you mean 0.3",), ("--method", "magnitude", "--ratio", "30")),
    "no ratio": Bad(("--ratio",), ("--method", "magnitude")),
    "bad target": Bad(("'parms=70%'", "did you mean params"), ("--method", "magnitude", "--target", "parms=70%")),
    "unknown method": Bad(("'magnitud'", "did you mean magnitude"), ("--method", "magnitud", "--ratio", "0.1")),
    "unknown option": Bad(
        ("'space'", "did you mean spaces"), ("--method", "magnitude", "--ratio", "0.1", "--set", "space=kv")
    ),
    "bad value": Bad(("spaces='legs'", "ffn"), ("--method", "magnitude", "--ratio", "0.1", "--set", "spaces=legs")),
    "no key": Bad(("'spaces'", "key=value"), ("--method", "magnitude", "--ratio", "0.1", "--set", "spaces")),
    "sparsity range": Bad(("sparsity='2'",), ("--method", "magnitude", "--set", "sparsity=2")),
    "out of reach": Bad(("%", "ffn"), ("--method", "magnitude", "--ratio", "0.9")),
    "out of tolerance": Bad(
        ("tolerance",), ("--method", "magnitude", "--ratio", "0.1", "--set", "spaces=kv", "--tolerance", "0.001")
    ),
    "layout": Bad(("per-layer",), ("--method", "magnitude", "--ratio", "0.1", "--set", "allocation=global")),
    "unknown layout": Bad(("layout", "sideways"), ("--method", "magnitude", "--ratio", "0.1", "--layout", "sideways")),
    "device": Bad(("device 'tpu9'",), ("--method", "magnitude", "--ratio", "0.1", "--device", "tpu9")),
    "dtype": Bad(("dtype='int3'",), ("--method", "magnitude", "--ratio", "0.1", "--dtype", "int3")),
    "samples": Bad(("samples=0",), ("--method", "magnitude", "--ratio", "0.1", "--samples", "0")),
    "no data": Bad(("slicegpt", "--data"), ("--method", "slicegpt", "--ratio", "0.15")),
    "absent data": Bad(("{tmp}/absent.txt",), (*_DATA, "{tmp}/absent.txt")),
    "empty data": Bad(("{tmp}/empty.txt", "empty"), (*_DATA, "{tmp}/empty.txt")),
    "binary data": Bad(("{tmp}/binary.txt", "binary"), (*_DATA, "{tmp}/binary.txt")),
    "latin data": Bad(("{tmp}/latin.txt", "UTF-8"), (*_DATA, "{tmp}/latin.txt")),
    "short data": Bad(("{tmp}/short.txt", "shorter than one window of 16"), (*_DATA, "{tmp}/short.txt")),
    "empty folder": Bad(("{tmp}/nothing", ".jsonl"), (*_DATA, "{tmp}/nothing")),
    "bad jsonl": Bad(("line 2", "bad.jsonl"), (*_DATA, "{tmp}/bad.jsonl")),
    "no field": Bad(("'text'", "body", "--text-field"), (*_DATA, "{tmp}/field.jsonl")),
    "bad parquet": Bad(("bad.parquet",), (*_DATA, "{tmp}/bad.parquet")),
    "float ids": Bad(("float.npy", "float"), (*_DATA, "{tmp}/float.npy")),
    "large ids": Bad(("large.npy", "299"), (*_DATA, "{tmp}/large.npy")),
    "long window": Bad(("length 100", "64"), (*_DATA, "{notes}", "--length", "100")),
    "no tokenizer for data": Bad(("tokenizer", "{model}"), (*_DATA, "{notes}"), remove("tokenizer.json")),
    "no tokenizer for text": Bad(("tokenizer", "{model}"), (*_TEXT, "{notes}"), remove("tokenizer.json")),
    "absent text": Bad(("{tmp}/absent.txt",), (*_TEXT, "{tmp}/absent.txt")),
    "empty text": Bad(("{tmp}/empty.txt", "empty"), (*_TEXT, "{tmp}/empty.txt")),
    "binary text": Bad(("{tmp}/binary.txt", "binary"), (*_TEXT, "{tmp}/binary.txt")),
    "short text": Bad(("{tmp}/short.txt", "shorter than one window of 64"), (*_TEXT, "{tmp}/short.txt")),
    "absent recipe": Bad(("{tmp}/absent.yaml",), ("--recipe", "{tmp}/absent.yaml")),
    "bad recipe": Bad(("'ration'", "did you mean ratio"), ("--recipe", "{tmp}/recipe.yaml")),
    "usage": Bad(("--nonsense",), ("--nonsense",)),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of bad texts."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def" * 100)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("fox")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR?" * 10)
    np.save(tmp_path / "float.npy", np.zeros(100))
    np.save(tmp_path / "large.npy", np.full(100, models.VOCABULARY))
    (tmp_path / "recipe.yaml").write_text("method: magnitude\nration: 0.3\n")
    return tmp_path


@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, as_json: bool, checkpoint: Checkpoints, notes: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BAD[name]
    model = place / "model"
    shutil.copytree(checkpoint("llama"), model)
    if bad.damage is not None:
        bad.damage(model)
    before = sorted(place.iterdir())
    paths = {"model": model, "tmp": place, "notes": notes, "out": place / "out"}
    words = [word.format(**paths) for word in ("prune", bad.model, "-o", "{out}", *bad.words)]
    code, out, err = run(words + ["--json"] * as_json, capsys)
    assert code == 2, err
    message = err
    if as_json:
        error = json.loads(out)["error"]  # exactly one object
        assert set(error) == {"code", "asked", "found", "hint"}
        assert error["code"]
        message = " ".join(error.values())
    else:
        assert out == ""
    for thing in bad.names:
        assert thing.format(**paths) in message
    assert "Traceback" not in err
    assert sorted(place.iterdir()) == before, "a refusal leaves something behind"


def test_output_exists(checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    words = ["prune", str(checkpoint()), "-o", str(out), "--method", "random", "--ratio", "0.15", "--json"]
    code, shown, _ = run(words, capsys)
    assert code == 2
    assert json.loads(shown)["error"]["code"] == "output-exists"
    assert "--force" in json.loads(shown)["error"]["hint"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("ratio", ["0", "0.15"])
def test_output_is_the_model(
    ratio: str, checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint(), tmp_path / "model")
    words = ["prune", str(tmp_path / "model"), "-o", str(tmp_path / "model"), "--method", "random", "--ratio", ratio]
    code, _, err = run([*words, "--force"], capsys)
    assert code == 2
    assert "own folder" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_no_output_named(checkpoint: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["prune", str(checkpoint()), "--method", "random", "--ratio", "0.15"], capsys)
    assert code == 2
    assert "-o" in err


def test_failure_of_ours_is_exit_1(
    checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("secateur.engine.run.verify_output", fail)
    words = ["prune", str(checkpoint()), "-o", str(tmp_path / "out"), "--method", "random", "--ratio", "0.15", "--json"]
    code, out, _ = run(words, capsys)
    assert code == 1
    assert json.loads(out)["error"]["code"] == "internal"
    assert "on fire" in json.loads(out)["error"]["found"]
    assert not (tmp_path / "out").exists()


def test_interrupt_is_exit_130(
    checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.engine.run.verify_output", interrupt)
    words = ["prune", str(checkpoint()), "-o", str(tmp_path / "out"), "--method", "random", "--ratio", "0.15", "--json"]
    code, out, _ = run(words, capsys)
    assert code == 130
    assert "resumes" in json.loads(out)["error"]["found"]


@pytest.mark.parametrize("command", ["evaluate", "inspect", "preview"])
def test_other_commands_refuse_alike(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [command, str(tmp_path / "absent"), "--json"] + (["--ratio", "0.1"] if command == "preview" else [])
    code, out, _ = run(words, capsys)
    assert code == 2
    assert json.loads(out)["error"]["code"] == "no-model"


def test_json_of_every_command(
    checkpoint: Checkpoints, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object on standard output, with the documented keys."""
    out = tmp_path / "out"
    model = str(checkpoint("llama-tied"))
    words = ["prune", model, "-o", str(out), "--method", "random", "--ratio", "0.15", "--text", str(held_out), "--json"]
    code, shown, _ = run(words, capsys)
    result = json.loads(shown)
    assert code == 0
    assert set(result) == {
        "method", "requested", "achieved", "perplexity", "seconds", "peak_rss_bytes", "output", "layout",
        "loads_in", "seed",
    }  # fmt: skip
    measures = ("params", "bytes", "flops_per_token", "kv_bytes_per_token")
    assert set(result["achieved"]) == {*measures, *(f"{key}_before" for key in measures)}
    assert set(result["perplexity"]) == {"before", "after", "context", "tokens"}
    code, shown, _ = run(["evaluate", str(out), "--against", model, "--text", str(held_out), "--json"], capsys)
    figures = json.loads(shown)
    keys = {
        "perplexity", "context", "tokens", "params", "bytes", "flops_per_token", "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }  # fmt: skip
    assert code == 0
    assert set(figures) == keys | {"against", "ratio"}
    assert set(figures["against"]) == set(figures["ratio"]) == keys
    assert figures["perplexity"] == pytest.approx(result["perplexity"]["after"])
    assert figures["against"]["perplexity"] == pytest.approx(result["perplexity"]["before"])
    assert figures["ratio"]["params"] == pytest.approx(
        result["achieved"]["params"] / result["achieved"]["params_before"]
    )
    for command in (
        ["methods"],
        ["methods", "slicegpt"],
        ["families"],
        ["inspect", model],
        ["preview", model, "--ratio", "0.1"],
    ):
        code, shown, _ = run([*command, "--json"], capsys)
        assert code == 0
        assert isinstance(json.loads(shown), dict)
        code, shown, _ = run(command, capsys)
        assert code == 0
        assert shown
