"""Free rotations of a sliced stream: the triangular gauge, the bits-back code, and the archive around it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.cuts.gauge import FreeRotations, estimate_savings, lower_gauge
from secateur.errors import RequestError
from secateur.families import Architecture
from secateur.families.packing import packed_triangle, unpacked_triangle
from secateur.families.resizing import resized
from secateur.inference import open_checkpoint

pytest.importorskip("constriction")

from secateur.archives import bitsback
from secateur.archives.container import Archive
from secateur.archives.rotations import (
    FINENESS,
    codes_of,
    correct,
    pop_corrections,
    pop_rotation,
    push_corrections,
    push_rotation,
    restore,
)
from secateur.archives.stack import Stack

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}
FAMILIES = ("llama", "llama-tied", "gpt2", "opt", "mixtral", "phi", "falcon", "granite")


@pytest.fixture(scope="session")
def sliced(checkpoint: Checkpoints, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny models with a rotation at every norm; ``sliced("llama/native")``: one for all."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            family, _, layout = name.partition("/")
            folder = made[name, dtype] = tmp_path_factory.mktemp("sliced") / "model"
            method = "slicegpt" if layout else "bits_back"
            asked = {"method": method, "ratio": 0.15, "data": notes, "samples": 8, "length": 32}
            secateur.prune(checkpoint(family, dtype), output=folder, layout=layout or "per-layer", **asked)
        return made[name, dtype]

    return get


def tensors_of(folder: Path) -> tuple[FreeRotations, dict[str, Tensor]]:
    opened = open_checkpoint(folder)
    found: dict[str, Tensor] = {}
    for place in opened.architecture.places:
        found.update(opened.read(place))
    return FreeRotations(opened.architecture), found


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made: Tensor = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    return made


def logits(folder: Path) -> Tensor:
    return masking.logits(models.load(folder, dtype=torch.float32), models.token_ids())


def filled(size: int) -> Stack:
    stack = Stack()
    stack.push_bytes(np.random.default_rng(0).integers(0, 256, size).astype(np.uint8))
    return stack


# -- the triangular gauge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_lower_gauge(rank: int) -> None:
    """Any change of basis becomes lower triangular, of any rank; a triangle stays what it is."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(8, rank, dtype=torch.float64, generator=generator) for _ in range(2))
    change = left @ right.t()
    gauge = lower_gauge(change)
    made = change @ gauge
    assert torch.allclose(gauge.t() @ gauge, torch.eye(8, dtype=torch.float64), atol=1e-12)
    assert made.triu(1).abs().max() < 1e-12
    assert made.diagonal().min() > -1e-12
    if rank == 8:
        assert torch.allclose(lower_gauge(made), torch.eye(8, dtype=torch.float64), atol=1e-12)
    packed = packed_triangle(made)
    assert packed.shape == (36,)
    assert torch.equal(unpacked_triangle(packed, 8), made.tril())


@pytest.mark.parametrize("name", [*FAMILIES, "llama/native"])
def test_free_rotations_change_nothing(name: str, sliced: Checkpoints, tmp_path: Path) -> None:
    """The function, for a random rotation at every interface; and once more the triangles come out the same."""
    if name == "llama":
        assert len(tensors_of(sliced(name))[0].names) == 7
    folder = tmp_path / "turned"
    free, tensors = tensors_of(sliced(name))
    assert free.problem(tensors) == ""
    turned = tensors | free.triangular(tensors, orthogonal(free.width, 0))
    opened = open_checkpoint(sliced(name))
    state = load_file(sliced(name) / "model.safetensors")
    for place in opened.architecture.places:
        state.update({packed.name: packed.pack(turned) for packed in opened.packed[place]})
    folder.mkdir()
    for file in sliced(name).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    assert masking.difference(logits(sliced(name)), logits(folder)) < 1e-5
    again = turned | free.triangular(turned, torch.eye(free.width, dtype=torch.float64))
    for key in free.followers:
        scale = turned[key].abs().max()
        assert (again[key].abs() - turned[key].abs()).abs().max() < 1e-4 * scale, key


def test_savings_are_counted(sliced: Checkpoints) -> None:
    """The formula, the file, the record and ``inspect`` agree."""
    folder = sliced("llama")
    free, tensors = tensors_of(folder)
    width = free.width
    savings = estimate_savings(open_checkpoint(folder).architecture)
    assert savings["shortcuts"] == len(free.shortcuts) == 6
    assert savings["saved"] == 6 * width * (width - 1) // 2
    assert savings["stored"] == sum(tensors[name].numel() for name in free.shortcuts)
    assert secateur.inspect(folder)["shortcuts"] == savings
    notes = json.loads((folder / "secateur.json").read_text())["notes"]
    assert notes == {f"{key}_shortcut_numbers": savings[key] for key in ("square", "stored", "saved")}


@pytest.mark.parametrize(("width", "share"), [(3072, 0.0534), (2864, 0.0501)])
def test_savings_of_a_large_model(width: int, share: float) -> None:
    """Llama-2-7B sliced by 25 and 30 %: the bound of what rotations are worth, from its configuration alone."""
    raw = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    dense = Architecture({**raw, "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False})
    sizes = replace(dense.sizes, residual=width, shortcuts=True)
    sliced = resized(dense, sizes, layout="per-layer")
    stored = sum(math.prod(shape) for shape in sliced.shapes.values())
    saved = estimate_savings(dense, sizes)["saved"]
    assert saved == 64 * width * (width - 1) // 2
    assert saved / (stored + saved) == pytest.approx(share, abs=1e-4)


# -- the code ----------------------------------------------------------------------------------------------------------


def test_the_stack_gives_back_what_it_took() -> None:
    stack = Stack()
    data = np.arange(1001, dtype=np.uint32).astype(np.uint8)
    events = np.arange(500) % 97 == 0
    stack.push_bytes(data)
    before = stack.bits
    stack.push_events(events)
    stack.push_uniform(np.arange(3, dtype=np.int32), 3)
    again = Stack(stack.words)
    assert (again.pop_uniform(3, 3) == np.arange(3)).all()
    assert (again.pop_events(500) == events).all()
    assert again.bits == before
    assert (again.pop_bytes(1001) == data).all()


@pytest.mark.parametrize("size", [2, 3, 16, 40])
def test_rotations_are_numbers(size: int) -> None:
    """Taken off and put back, the stack is as before; the rotation is orthogonal, and fewer bits are left."""
    stack = filled(40_000)
    before, words = stack.bits, stack.words
    codes = np.full(size, 8, np.uint8)
    codes[1] = 0
    drawn = pop_rotation(stack, codes)
    assert np.abs(drawn.rotation @ drawn.rotation.T - np.eye(size)).max() < 1e-12
    assert drawn.angles == sum(size - 1 - i for i in range(size - 1))
    assert before - stack.bits > 3 * drawn.angles
    push_rotation(stack, drawn.codes, drawn.numbers)
    assert (stack.words == words).all()


def test_rotations_are_like_random_ones() -> None:
    """Entries of a drawn rotation have the moments of uniformly distributed ones."""
    size = 64
    rotation = pop_rotation(filled(40_000), np.full(size, 10, np.uint8)).rotation
    entries = rotation.flatten() * size**0.5
    assert abs(entries.mean()) < 0.05
    assert abs((entries**4).mean() - 3) < 0.3


def test_large_gaps_give_all_angles_back() -> None:
    """A planted spectrum: every number is recovered without a correction."""
    size, stack = 24, filled(40_000)
    drawn = pop_rotation(stack, np.full(size, 12, np.uint8))
    spectrum = torch.from_numpy(2.0 ** -np.arange(size))
    rotation = torch.from_numpy(drawn.rotation)
    anchor = torch.diag(spectrum.sqrt()) @ rotation
    found = bitsback._directions(anchor.t() @ anchor).t().numpy()
    made = correct(drawn, found)
    assert drawn.angles == size * (size - 1) // 2
    assert not made.failed
    assert made.wrong.mean() < 0.01  # those near an edge are sent whatever was found
    numbers = restore(drawn.codes, found, made)
    assert all((numbers[row] == drawn.numbers[row]).all() for row in drawn.numbers)


@pytest.mark.parametrize("noise", [1e-9, 1e-3, 3e-2])
def test_corrections_make_numbers_exact(noise: float) -> None:
    size, stack = 24, filled(40_000)
    generator = np.random.default_rng(1)
    drawn = pop_rotation(stack, np.full(size, 12, np.uint8))
    before = stack.bits
    found = (drawn.rotation + noise * generator.standard_normal((size, size)) / size**0.5) * generator.choice([-1, 1])
    made = correct(drawn, found)
    if made.failed:
        assert noise > 1e-2
        return
    push_corrections(stack, drawn, made)
    codes, again = pop_corrections(stack, size)
    assert stack.bits == before
    numbers = restore(codes, found, again)
    assert all((numbers[row] == drawn.numbers[row]).all() for row in drawn.numbers)


def test_rows_that_cannot_be_told_apart_are_left_out() -> None:
    codes = codes_of(np.array([10.0, 0.1, 1e-3, 1e-6]))
    assert codes[0] == codes[1] == 0
    assert list(codes) == sorted(codes)
    assert FINENESS[codes[2]] in (32, 48)
    size = 8
    sizes = np.array([5, 0, 5, 5, 0, 5, 0, 5], np.uint8)
    drawn = pop_rotation(filled(4_000), sizes)
    assert drawn.angles == 7 + 6 + 5 + 4 + 3
    assert np.abs(drawn.rotation @ drawn.rotation.T - np.eye(size)).max() < 1e-12


def test_without_enough_bits_nothing_is_taken() -> None:
    drawn = pop_rotation(filled(60), np.full(40, 8, np.uint8))
    assert not drawn.codes.any()
    assert np.array_equal(drawn.rotation, np.eye(40))


def test_other_linear_algebra_reads_the_same(
    sliced: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eigenvectors of other signs that differ in the last digits are still read as the same bits."""
    archive, first, second = tmp_path / "m.bitsback", tmp_path / "first", tmp_path / "second"
    secateur.pack(sliced("llama"), archive, form="square", check=False)
    secateur.unpack(archive, first)
    exact, generator = bitsback._directions, torch.Generator().manual_seed(0)

    def other(gram: Tensor) -> Tensor:
        noise = torch.randn(gram.shape, dtype=torch.float64, generator=generator)
        scale = 1e-14 * gram.abs().max()
        signs = torch.randn(gram.shape[0], dtype=torch.float64, generator=generator).sign()
        return exact(gram + scale * (noise + noise.t())) * signs

    monkeypatch.setattr(bitsback, "_directions", other)
    secateur.unpack(archive, second)
    assert grid.hashes(first) == grid.hashes(second)


# -- the archive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["triangular", "square"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, form: str, sliced: Checkpoints, tmp_path: Path) -> None:
    """What comes out computes the same, and the bytes are those that the accounts say."""
    source, before = sliced(family), grid.hashes(sliced(family))
    archive, folder = tmp_path / "m.bitsback", tmp_path / "out"
    result = secateur.pack(source, archive, form=form)
    assert result["check"]["logits_difference"] < 1e-4
    check_accounts(result, archive)
    assert grid.hashes(source) == before
    secateur.unpack(archive, folder)
    assert {p.name for p in tmp_path.iterdir()} == {"m.bitsback", "out"}
    assert masking.difference(logits(source), logits(folder)) < 1e-5
    other = [name for name, digest in grid.hashes(folder).items() if before.get(name) != digest]
    assert sorted(other) == ["model.safetensors", "secateur.json"]
    grid.check_record(folder, json.loads((source / "secateur.json").read_text())["plan_sha256"])
    secateur.pack(source, tmp_path / "again", form=form, check=False)
    assert (tmp_path / "again").read_bytes() == archive.read_bytes()


def check_accounts(result: dict[str, Any], archive: Path) -> None:
    """To the byte, as far as the coder's own state (under 16 bytes)."""
    bits, form = result["bits"], result["form"]
    assert result["bytes"] == archive.stat().st_size
    assert result["bytes"] == result["header_bytes"] + result["files_bytes"] + result["tensor_bytes"]
    assert bits["net"] == bits["returned"] - bits["corrections"] - bits["signs"] - bits["table"]
    assert bits["net"] == sum(each["net"] for each in result["interfaces"]) > 0
    raw = result[f"{form}_bytes"]
    assert abs(raw - bits["net"] / 8 - result["tensor_bytes"]) < 16
    assert result["saving"]["of_square"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama/native"])
def test_types(name: str, dtype: torch.dtype, sliced: Checkpoints, tmp_path: Path) -> None:
    """What is encoded is what is decoded, bit for bit, whatever the type; fewer digits return fewer bits."""
    archive = tmp_path / "m.bitsback"
    result = secateur.pack(sliced(name, dtype), archive, check=False)
    check_accounts(result, archive)
    secateur.unpack(archive, tmp_path / "out")
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}[dtype]
    assert result["bits"]["returned"] / result["angles"]["coded"] < digits
    bound = ROUNDING.get(dtype, 1e-5)
    assert masking.difference(logits(sliced(name, dtype)), logits(tmp_path / "out")) < bound
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_what_was_encoded_is_decoded(sliced: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor by tensor: those that ``write`` put on the stack are those in the folder."""
    seen: dict[str, Tensor] = {}
    exact = bitsback.write

    def spy(*arguments: Any) -> Any:
        made = exact(*arguments)
        seen.update(made[1])
        return made

    monkeypatch.setattr("secateur.api.packing.write", spy)
    secateur.pack(sliced("llama", torch.bfloat16), tmp_path / "m", check=False)
    secateur.unpack(tmp_path / "m", tmp_path / "out")
    _, found = tensors_of(tmp_path / "out")
    assert seen.keys() == found.keys()
    assert all(torch.equal(seen[name], found[name]) for name in found)


def test_loads_without_secateur(sliced: Checkpoints, tmp_path: Path) -> None:
    archive, folder, ids = tmp_path / "m.bitsback", tmp_path / "out", models.token_ids(1, 8)
    secateur.pack(sliced("llama"), archive, form="square", check=False)
    secateur.unpack(archive, folder)
    wanted = secateur.load(sliced("llama")).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)
    script = f"""
import sys; sys.modules["secateur"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(model.generate(torch.tensor({ids.tolist()}), max_new_tokens=6, do_sample=False, pad_token_id=1).tolist())
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == wanted.tolist()


def test_disk_forms(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Shards, names without a prefix and buffers on disk come back as they were."""
    for name in ("sharded", "gpt2-bare"):
        asked = {"method": "bits_back", "ratio": 0.15, "data": notes, "samples": 8, "length": 32}
        secateur.prune(checkpoint(name), output=tmp_path / name, layout="per-layer", **asked)
        secateur.pack(tmp_path / name, tmp_path / f"{name}.bitsback")
        secateur.unpack(tmp_path / f"{name}.bitsback", tmp_path / f"{name}-out")
        files = [{p.name for p in (tmp_path / folder).iterdir()} for folder in (name, f"{name}-out")]
        assert files[0] == files[1]
        for file in (tmp_path / name).glob("*.safetensors"):
            one, other = load_file(file), load_file(tmp_path / f"{name}-out" / file.name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one if key.endswith(".attn.bias"))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_damaged_archives_are_refused(sliced: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.bitsback"
    secateur.pack(sliced("llama"), good, check=False)
    data = good.read_bytes()
    broken = {
        "empty": b"",
        "other": b"GGUF" + data[4:],
        "cut": data[:-7],
        "short": data[:20],
        "header": data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "words": data[:-4000] + bytes([data[-4000] ^ 1]) + data[-3999:],
        "hash": data[:-1] + bytes([data[-1] ^ 1]),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            main(["unpack", str(tmp_path / name), "-o", str(tmp_path / "out")])
        assert stopped.value.code == 2, name
        assert "archive" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no such file"):
        secateur.unpack(tmp_path / "none", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"good.bitsback", *broken}


def test_names_that_leave_the_folder_are_refused(sliced: Checkpoints, tmp_path: Path) -> None:
    good = tmp_path / "good.bitsback"
    secateur.pack(sliced("llama"), good, check=False)
    archive = Archive.load(good)
    for name in ("../outside", "/outside", "a/../../outside"):
        header = archive.header.model_copy(update={"files": [(name, 1)]})
        Archive(header, archive.words).save(tmp_path / "bad")
        with pytest.raises(RequestError, match="leaves the folder"):
            secateur.unpack(tmp_path / "bad", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"good.bitsback", "bad"}


def test_refusals(
    checkpoint: Checkpoints, sliced: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind, and every message says what to do."""
    out = tmp_path / "m"
    with pytest.raises(RequestError, match="does not commute"):
        secateur.pack(checkpoint("llama"), out)
    with pytest.raises(RequestError, match="a norm stands between"):
        secateur.pack(checkpoint("gemma2"), out)
    with pytest.raises(RequestError, match="no shortcut"):
        secateur.pack(sliced("llama/native"), out, form="square")
    with pytest.raises(RequestError, match="triangular"):
        secateur.pack(sliced("llama"), out, form="triangle")
    with pytest.raises(RequestError, match="--layout per-layer"):
        secateur.prune(checkpoint("llama"), method="bits_back", ratio=0.1, data="x", output=out)
    monkeypatch.setattr("secateur.meters.perplexity.available_bytes", lambda: 1000)
    with pytest.raises(RequestError, match="more memory"):
        secateur.pack(sliced("llama"), out)
    monkeypatch.setattr("secateur.archives.stack.importlib.util.find_spec", lambda _: None)
    archive = checkpoint("llama") / "config.json"  # a file: a folder would be one of packed weights
    for call in (lambda: secateur.pack(sliced("llama"), out), lambda: secateur.unpack(archive, out)):
        with pytest.raises(RequestError, match=r"secateur\[entropy\]"):
            call()
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        secateur.pack(sliced("llama"), out)
    assert out.read_text() == "mine"


def test_command_line(sliced: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, folder = str(tmp_path / "m.bitsback"), str(tmp_path / "out")
    source = str(sliced("llama"))
    for words in (["pack", source, "-o", archive], ["unpack", archive, "-o", folder], ["inspect", folder]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "bytes returned by" in shown
    assert "6 triangles of width" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["pack", source, "-o", archive, "--form", "square", "--force", "--json"])
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["form"] == "square"
    assert (tmp_path / "m.bitsback.previous").is_file()


# -- trained models ----------------------------------------------------------------------------------------------------


@pytest.mark.assets
def test_trained_models(assets: Path, tmp_path: Path) -> None:
    """The published code saves, triangles save more, and one rotation on top of them a little."""
    text = assets / "text" / "tinystories-sample" / "train.txt"
    asked = {"method": "bits_back", "ratio": 0.2, "data": text, "samples": 16, "length": 256, "layout": "per-layer"}
    secateur.prune(assets / "lm" / "stories260k-llama", output=tmp_path / "small", **asked)
    found = {form: secateur.pack(tmp_path / "small", tmp_path / form, form=form) for form in bitsback.FORMS}
    saving = {form: result["saving"]["of_square"] for form, result in found.items()}
    triangles = 1 - found["square"]["triangular_bytes"] / found["square"]["square_bytes"]
    assert 0.02 < saving["square"] < triangles < saving["triangular"] < 0.06
    assert found["triangular"]["saving"]["of_triangular"] > 0
    assert all(result["angles"]["coded"] > 0.95 * result["angles"]["free"] for result in found.values())
