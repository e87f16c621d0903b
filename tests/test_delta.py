"""Delta pruning: exact counts, DARE and DAREx-q, the sparse file and its refusals, adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import grid
import models
import secateur
from conftest import Checkpoints
from recovery import run
from secateur.archives.delta_file import DeltaFile
from secateur.checkpoints import Checkpoint
from secateur.deltas.options import METHODS
from secateur.deltas.selection import kept_count
from secateur.deltas.sources import pruned_names
from secateur.errors import RequestError

FAMILIES = ("llama", "gpt2-bare", "mixtral", "mixtral-fused", "tied-repeated", "sharded", "opt", "qwen2")


def fine_tune(base: Path, folder: Path, scale: float = 0.01, seed: int = 5, edit: Any = None) -> Path:
    """The base with random changes in everything that floats, written under its names."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            if name.endswith("attn.bias") and tensors[name].ndim == 4:  # causal masks
                continue
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = (tensors[name].float() + scale * noise).to(tensors[name].dtype)
        if "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors and "tied" in base.name:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors if edit is None else edit(tensors), path, {"format": "pt"})
    return folder


def matrices(folder: Path) -> dict[str, Tensor]:
    """Canonical matrices that are pruned."""
    checkpoint = Checkpoint.open(folder)
    found: dict[str, Tensor] = {}
    for place in checkpoint.architecture.places:
        tensors = checkpoint.read(place)
        found.update({name: tensors[name] for name in pruned_names(checkpoint.architecture, place)})
    return found


def everything(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name on disk."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_delta_of_nothing_dropped_is_the_fine_tune(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """With ratio 0 and float32 values the folder comes back, tensor by tensor, in every form on disk."""
    tuned = fine_tune(checkpoint(name), tmp_path / "tuned")
    before = grid.hashes(checkpoint(name)), grid.hashes(tuned)
    options = {"values": "float32"}
    secateur.delta_pack(checkpoint(name), tuned, tmp_path / "d", method="dare", ratio=0, options=options)
    secateur.delta_apply(checkpoint(name), tmp_path / "d", tmp_path / "out")
    assert (grid.hashes(checkpoint(name)), grid.hashes(tuned)) == before
    expected, found = everything(tuned), everything(tmp_path / "out")
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
    names = {p.relative_to(tuned).as_posix() for p in tuned.rglob("*") if p.is_file()}
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert made == names | {"secateur.json"}
    models.load(tmp_path / "out")


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", ["llama", "gpt2-bare", "mixtral"])
def test_what_the_file_gives(method: str, name: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """The promised entries differ from the base by the delta over q, rounded once; all else is the fine-tune."""
    base, tuned = checkpoint(name), fine_tune(checkpoint(name), tmp_path / "tuned")
    options: dict[str, Any] = {"values": "float32"} | ({"q": 0.5} if method != "dare" else {})
    result = secateur.delta_pack(
        base, tuned, tmp_path / "d", method=method, ratio=0.75, options=options, data=notes, length=16, samples=4
    )
    secateur.delta_apply(base, tmp_path / "d", tmp_path / "out")
    old, new, made = (matrices(folder) for folder in (base, tuned, tmp_path / "out"))
    kept = 0
    for key, tensor in old.items():
        delta = new[key] - tensor
        changed = made[key] != tensor
        size = tensor.numel()
        if method != "structural":
            assert abs(int(changed.sum()) - kept_count(size, 0.75)) <= size // 500  # but for deltas lost in rounding
        q = 0.5 if method != "dare" else kept_count(size, 0.75) / size
        expected = torch.where(changed, tensor + (delta.double() / q).float(), tensor)
        assert torch.equal(made[key], expected)
        kept += int(changed.sum())
    assert result["entries"] == sum(tensor.numel() for tensor in old.values())
    if method != "structural":
        assert result["kept"] == sum(kept_count(t.numel(), 0.75) for t in old.values())
        assert kept <= result["kept"]
    others = set(everything(tuned)) - {
        packed.name
        for place, group in Checkpoint.open(tuned).packed.items()
        for packed in group
        if set(packed.canonical) & set(old)
    }
    written, source = everything(tmp_path / "out"), everything(tuned)
    assert others
    assert all(torch.equal(written[key], source[key]) for key in others)
    size = (tmp_path / "d").stat().st_size
    parts = ("header_bytes", "values_bytes", "index_bytes", "whole_bytes", "files_bytes")
    assert result["bytes"] == size == sum(result[key] for key in parts)
    if method in ("dare", "darex_q"):
        assert result["index_bytes"] == 0
        assert result["values_bytes"] < result["bound_bytes"]


def test_q_of_the_share_is_dare(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    base, tuned = checkpoint(), fine_tune(checkpoint(), tmp_path / "tuned")
    secateur.delta_pack(base, tuned, tmp_path / "dare", method="dare", ratio=0.75, seed=3)
    secateur.delta_pack(base, tuned, tmp_path / "darex", method="darex_q", ratio=0.75, seed=3, options={"q": 0.25})
    for file in ("dare", "darex"):
        secateur.delta_apply(base, tmp_path / file, tmp_path / f"{file}-out")
    found = [everything(tmp_path / f"{file}-out") for file in ("dare", "darex")]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    other = secateur.delta_pack(base, tuned, tmp_path / "other", method="dare", ratio=0.75, seed=4)
    assert (tmp_path / "other").read_bytes() != (tmp_path / "dare").read_bytes()
    again = secateur.delta_pack(base, tuned, tmp_path / "again", method="dare", ratio=0.75, seed=4)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "again").read_bytes()
    assert other["bytes"] == again["bytes"]
    del notes


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("darex_q", {"q": "search", "windows": 2, "seeds": 2}),
        ("darex_q", {"q": "search", "windows": 2, "objective": "loss"}),
        ("darex_q", {"q": "analytic", "windows": 2}),
        ("darex_q", {"q": "analytic", "eta": 0.45}),
        ("darex_q", {"q": "learned", "windows": 2}),
        ("wanda", {"q": "search", "windows": 2}),
        ("structural", {"score": "wanda", "axis": "rows"}),
        ("structural", {"score": "random"}),
    ],
)
def test_q_from_text(
    method: str, options: dict[str, Any], checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    base, tuned = checkpoint(), fine_tune(checkpoint(), tmp_path / "tuned", scale=0.2)
    result = secateur.delta_pack(
        base, tuned, tmp_path / "d", method=method, ratio=0.9, options=options, data=notes, length=32, samples=8
    )
    secateur.delta_apply(base, tmp_path / "d", tmp_path / "out")
    models.load(tmp_path / "out")
    low, high = result["q"]["smallest"], result["q"]["largest"]
    if method == "darex_q":
        assert 0.1 - 0.01 <= low <= high <= 1
    if options.get("q") == "search":
        tried = dict(result["search"]["curve"])
        assert low == high == min(tried, key=tried.__getitem__)
    if options.get("q") == "learned":
        assert low < high
        assert len(result["search"]["curve"]) >= 2


def test_a_searched_q_changes_the_output_less(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """On large deltas, dividing by 1 - p is far from best: logits come closer to the fine-tune's."""
    base, tuned = checkpoint(), fine_tune(checkpoint(), tmp_path / "tuned", scale=0.02)
    ids, distances = models.token_ids(), []
    with torch.no_grad():
        wanted = models.load(tuned)(ids).logits
    for method, options in (("dare", {}), ("darex_q", {"q": "search", "windows": 8})):
        secateur.delta_pack(
            base, tuned, tmp_path / method, method=method, ratio=0.98, options=options, data=notes, length=32, samples=8
        )
        secateur.delta_apply(base, tmp_path / method, tmp_path / f"{method}-out")
        with torch.no_grad():
            distances.append(float((models.load(tmp_path / f"{method}-out")(ids).logits - wanted).square().mean()))
    assert distances[1] < 0.8 * distances[0]


def test_rows_that_did_not_change_are_not_stored(checkpoint: Checkpoints, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        source = load_file(checkpoint() / "model.safetensors")
        found = {**source, "model.layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]}
        found["model.embed_tokens.weight"] = source["model.embed_tokens.weight"].clone()
        found["model.embed_tokens.weight"][3] = 1.0
        return found

    tuned = fine_tune(checkpoint(), tmp_path / "tuned", edit=edit)
    result = secateur.delta_pack(checkpoint(), tuned, tmp_path / "d", method="magnitude", ratio=0.5)
    assert result["tensors"]["pruned"] == result["tensors"]["whole"] == 1
    width = models.config(tuned)["hidden_size"]
    assert result["whole_bytes"] <= 4 * width + 8
    secateur.delta_apply(checkpoint(), tmp_path / "d", tmp_path / "out")
    found = everything(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.equal(found, everything(tuned)["model.embed_tokens.weight"])


def test_nothing_added_is_nothing_stored(checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.delta_pack(checkpoint(), checkpoint(), tmp_path / "d")
    assert result["values_bytes"] == result["whole_bytes"] == result["files_bytes"] == result["entries"] == 0
    secateur.delta_apply(checkpoint(), tmp_path / "d", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (checkpoint() / "model.safetensors").read_bytes()


def test_more_vocabulary(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Rows of new tokens travel along."""
    tuned = tmp_path / "tuned"
    models.save(tuned, vocab_size=models.config(checkpoint())["vocab_size"] + 16)
    secateur.delta_pack(checkpoint(), tuned, tmp_path / "d", ratio=0.5, options={"values": "float32"})
    secateur.delta_apply(checkpoint(), tmp_path / "d", tmp_path / "out")
    made, source = everything(tmp_path / "out"), everything(tuned)
    assert torch.equal(made["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    models.load(tmp_path / "out")


def test_a_head_that_came_apart(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A head that the file stores beside a tied embedding, and that differs from it, is a tensor of its own."""
    base = checkpoint("tied-repeated")
    tuned = fine_tune(base, tmp_path / "tuned", edit=lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 0.1})
    source = everything(tuned)
    secateur.delta_pack(base, tuned, tmp_path / "d", ratio=0.5)
    assert DeltaFile(tmp_path / "d").header.untied
    secateur.delta_apply(base, tmp_path / "d", tmp_path / "out")
    made = everything(tmp_path / "out")
    assert all(torch.equal(made[key], source[key]) for key in ("lm_head.weight", "model.embed_tokens.weight"))


def test_bfloat16_models_are_rounded_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama", torch.bfloat16)
    tuned = fine_tune(base, tmp_path / "tuned", scale=0.05)
    secateur.delta_pack(base, tuned, tmp_path / "d", method="magnitude", ratio=0.5, options={"values": "float32"})
    secateur.delta_apply(base, tmp_path / "d", tmp_path / "out")
    old, new, made = (matrices(folder) for folder in (base, tuned, tmp_path / "out"))
    for key, tensor in made.items():
        assert tensor.dtype == torch.bfloat16
        either = (tensor == old[key]) | (tensor == new[key])
        assert bool(either.all())


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_overflows_is_not_written(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A kept entry is divided by the share that is kept, and then float16 cannot hold it."""

    def loud(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e4)
        return tensors

    base = checkpoint("llama", torch.float16)
    tuned = fine_tune(base, tmp_path / "tuned", edit=loud)
    secateur.delta_pack(base, tuned, tmp_path / "d", method="dare", ratio=0.9)
    with pytest.raises(RequestError, match="up_proj") as caught:
        secateur.delta_apply(base, tmp_path / "d", tmp_path / "out")
    assert caught.value.code == "not-finite"
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    tuned = fine_tune(checkpoint(), tmp_path / "tuned")
    secateur.delta_pack(checkpoint(), tuned, tmp_path / "d")
    secateur.delta_apply(checkpoint("sharded"), tmp_path / "d", tmp_path / "sharded-out")  # the same tensors
    for other in (tuned, checkpoint("llama", torch.bfloat16)):
        with pytest.raises(RequestError, match="on this base"):
            secateur.delta_apply(other, tmp_path / "d", tmp_path / "out")
    with pytest.raises(RequestError):
        secateur.delta_apply(checkpoint("gpt2-bare"), tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("where", [0, 30, 400, -1, -2000])
def test_damaged_files_are_refused(where: int, checkpoint: Checkpoints, tmp_path: Path) -> None:
    tuned = fine_tune(checkpoint(), tmp_path / "tuned")
    secateur.delta_pack(checkpoint(), tuned, tmp_path / "d")
    data = bytearray((tmp_path / "d").read_bytes())
    data[where] ^= 1
    (tmp_path / "bad").write_bytes(data)
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty").write_bytes(b"")
    for file in ("bad", "short", "empty", "tuned/model.safetensors", "absent"):
        with pytest.raises(RequestError):
            secateur.delta_apply(checkpoint(), tmp_path / file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("evil", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt"])
def test_names_that_leave_the_folder_are_refused(evil: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    import hashlib

    tuned = fine_tune(checkpoint(), tmp_path / "tuned")
    (tuned / "note.txt").write_text("new")
    secateur.delta_pack(checkpoint(), tuned, tmp_path / "d")
    data = (tmp_path / "d").read_bytes()
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    metadata = content["__metadata__"]
    metadata["secateur_delta"] = metadata["secateur_delta"].replace("note.txt", evil)
    content[f"companion:{evil}"] = content.pop("companion:note.txt")
    metadata["sha256"] = "0" * 64
    head = json.dumps(content).encode()
    head += b" " * (-len(head) % 8)
    start = len(head).to_bytes(8, "little")
    digest = hashlib.sha256(start + head + data[8 + length :]).hexdigest()
    forged = start + head.replace(b"0" * 64, digest.encode(), 1) + data[8 + length :]
    (tmp_path / "forged").write_bytes(forged)
    with pytest.raises(RequestError, match="leaves the folder"):
        secateur.delta_apply(checkpoint(), tmp_path / "forged", tmp_path / "deep" / "out")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"method": "dares"}, "unknown-method"),
        ({"method": "wanda"}, "no-data"),
        ({"method": "darex_q"}, "no-data"),
        ({"method": "dare", "options": {"q": 1.0}}, "unknown-option"),
        ({"method": "magnitude", "options": {"values": "int8"}}, "bad-option"),
        ({"method": "darex_q", "options": {"q": 0}}, "bad-option"),
        ({"ratio": 1.0}, "bad-option"),
        ({"ratio": "much"}, "bad-option"),
        ({"options": {"lora": "factors"}}, "bad-option"),
    ],
)
def test_bad_requests(more: dict[str, Any], code: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    tuned = fine_tune(checkpoint(), tmp_path / "tuned")
    with pytest.raises(RequestError) as raised:
        secateur.delta_pack(checkpoint(), tuned, tmp_path / "d", **more)
    assert raised.value.code == code
    assert not (tmp_path / "d").exists()


def test_another_architecture_is_refused(checkpoint: Checkpoints, cut: Checkpoints, tmp_path: Path) -> None:
    for other in (checkpoint("gpt2-bare"), cut()):
        with pytest.raises(RequestError) as raised:
            secateur.delta_pack(checkpoint(), other, tmp_path / "d")
        assert raised.value.code == "other-architecture"


# -- the command line --------------------------------------------------------------------------------------------------


def test_commands(checkpoint: Checkpoints, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = str(checkpoint()), str(fine_tune(checkpoint(), tmp_path / "tuned"))
    file, out = str(tmp_path / "fine.delta"), str(tmp_path / "out")
    words = ["delta", "pack", base, tuned, "-o", file, "--ratio", "0.9", "--data", str(notes), "--length", "32"]
    assert run([*words, "--set", "windows=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "darex_q"
    assert told["dropped"] == pytest.approx(0.9, abs=1e-3)
    assert run([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "output-exists"
    assert run(["delta", "pack", base, tuned, "-o", file, "--method", "dare", "--force"]) == 0
    assert "entries kept" in capsys.readouterr().out
    assert (tmp_path / "fine.delta.previous").is_file()
    assert run(["delta", "apply", base, file, "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == len(everything(tmp_path / "out"))
    assert run(["delta", "apply", tuned, file, "-o", str(tmp_path / "no"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "other-base"
    assert run(["delta", "apply", base, file, "-o", out]) == 2
    assert DeltaFile(Path(file)).header.method == "dare"
