"""The part of the grid that runs in CI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.methods.registry import checkpoint_methods


@pytest.mark.parametrize("cell", grid.ci_cells(), ids=str)
def test_cell(cell: grid.Cell, tmp_path: Path) -> None:
    grid.run_cell(cell, tmp_path)


def test_every_method_has_a_row() -> None:
    assert set(checkpoint_methods()) <= set(grid.METHODS)


@pytest.mark.parametrize("name", [*models.ALL, *models.DISK])
def test_ratio_zero_is_a_copy(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(name), ratio=0, output=tmp_path / "out")
    assert grid.hashes(tmp_path / "out") == grid.hashes(checkpoint(name))
    assert result.achieved["params"] == result.achieved["params_before"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", grid.SPACES)
def test_narrow_types_keep_their_type_and_the_function(
    kind: str, dtype: torch.dtype, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """The oracle in float32 on the same rounded weights; a rescaled stream is rounded once more."""
    import masking

    model = checkpoint("llama-tied", dtype)
    options = {"method": "magnitude", "ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}}
    result = secateur.prune(model, output=tmp_path / "out", **options)
    grid.check_counts(result, tmp_path / "out")
    assert models.load(tmp_path / "out").dtype == dtype
    plan, _ = grid.plan_of(model, tmp_path / "planned", **options)
    dense, cut = models.load(model, dtype=torch.float32), models.load(tmp_path / "out", dtype=torch.float32)
    expected = masking.logits(masking.mask(dense, models.ALL["llama-tied"].where, plan), models.token_ids())
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    bound = 1e-5 if kind != "residual" else 1e-5 + 8 * rounding
    assert masking.difference(expected, masking.logits(cut, models.token_ids())) < bound


@pytest.mark.parametrize("kind", [*grid.SPACES, "rotation"])
@pytest.mark.parametrize("name", list(models.DISK))
def test_disk_forms_cut_alike(name: str, kind: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """However a model lies on disk, the cut is that of the plain form, under the names of the source."""
    plain = models.DISK[name]["name"]
    if kind in ("kv", "residual", "rotation") and plain == "gpt2":
        pytest.skip("not native")
    options = {"method": "magnitude", "ratio": grid.RATIOS.get(kind, 0.15), "options": {"spaces": kind}}
    if kind == "rotation":
        options = {"method": "slicegpt", "ratio": 0.15, "data": notes, "samples": 8, "length": 32}
    result = secateur.prune(checkpoint(name), output=tmp_path / "a", **options)
    grid.check_counts(result, tmp_path / "a")
    secateur.prune(checkpoint(plain), output=tmp_path / "b", **options)
    one, other = models.load(tmp_path / "a").state_dict(), models.load(tmp_path / "b").state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    if kind not in ("blocks", "rotation"):
        from secateur.checkpoints.folder import Folder

        assert Folder(tmp_path / "a").headers.keys() == Folder(checkpoint(name)).headers.keys()


@pytest.mark.parametrize("method", ["magnitude", "slicegpt"])
def test_pruned_again(method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """A pruned output can be pruned and evaluated again."""
    data = {"data": notes, "samples": 8, "length": 32} if method == "slicegpt" else {}
    secateur.prune(checkpoint("llama-tied"), method=method, ratio=0.1, output=tmp_path / "a", **data)
    result = secateur.prune(tmp_path / "a", method=method, ratio=0.2, output=tmp_path / "b", **data)
    grid.check_counts(result, tmp_path / "b")


def test_seeds_differ(checkpoint: Checkpoints, tmp_path: Path) -> None:
    plans = [
        grid.plan_of(checkpoint(), tmp_path / str(seed), method="random", ratio=0.15, seed=seed)[1]
        for seed in (0, 1, 0)
    ]
    assert plans[0] == plans[2] != plans[1]


def test_companions_travel(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Other files travel along, the card is kept under another name, weights of other formats are left and listed."""
    import json
    import shutil

    model = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), model)
    (model / "README.md").write_text("the source's card")
    (model / "extra").mkdir()
    (model / "extra" / "notes.txt").write_text("notes")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "other.safetensors").write_bytes(b"not ours")
    out = tmp_path / "out"
    secateur.prune(model, method="random", ratio=0.15, output=out)
    assert (out / "README.source.md").read_text() == "the source's card"
    assert (out / "extra" / "notes.txt").read_text() == "notes"
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "other.safetensors").exists()
    assert "pytorch_model.bin" in json.loads((out / "secateur.json").read_text())["left_behind"]
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_unknown_tensors_pass_through(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Buffers of GPT-2 on disk are kept bit for bit, follow a depth cut, and are no parameters."""
    from safetensors.torch import load_file

    source = load_file(checkpoint("gpt2-bare") / "model.safetensors")
    for kind in ("ffn", "blocks"):
        secateur.prune(
            checkpoint("gpt2-bare"), method="random", ratio=0.2, output=tmp_path / kind, options={"spaces": kind}
        )
        found = load_file(tmp_path / kind / "model.safetensors")
        buffers = [key for key in found if key.endswith(".attn.bias")]
        assert len(buffers) == (3 if kind == "ffn" else 2)
        assert all(torch.equal(found[key], source[key]) for key in buffers)


def test_a_policy_is_used_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """What was learned lies apart from the weights and serves another ratio, and the same one with the same result."""
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    secateur.prune(checkpoint(), method="prunenet", ratio=0.15, output=first)
    assert [p.name for p in first.glob("*.safetensors")] == ["model.safetensors"]
    learned = {"policy": str(first / "learned" / "prunenet-policy.safetensors")}
    secateur.prune(checkpoint(), method="prunenet", ratio=0.15, options=learned, output=same)
    result = secateur.prune(checkpoint(), method="prunenet", ratio=0.25, options=learned, output=other)
    grid.check_counts(result, other)
    assert (same / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
