"""Recipes: what a run prints, its ``--recipe`` repeats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import grid
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.engine.request import make_request, recipe_of
from secateur.errors import RequestError


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 0, captured.err
    return captured.out, captured.err


@pytest.mark.parametrize(
    "words",
    [
        ["--ratio", "0.15"],
        ["--method", "magnitude", "--target", "bytes=85%", "--set", "spaces=kv", "--seed", "3", "--tolerance", "0.2"],
        [
            "--method",
            "slicegpt",
            "--set",
            "sparsity=0.2",
            "--data",
            "no: {it} #1.txt",
            "--samples",
            "4",
            "--length",
            "16",
        ],
        ["--method", "prunenet", "--ratio", "0.2", "--set", "episodes=2", "--set", "select=sample", "--quantum", "4"],
    ],
    ids=["default method", "target", "data", "options"],
)
def test_round_trip(
    words: list[str],
    checkpoint: Checkpoints,
    notes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipe in the output gives the same bytes, itself included."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint(), "model")
    shutil.copy(notes, "no: {it} #1.txt")
    _, told = run(["prune", "model", "-o", "one", *words], capsys)
    recipe = Path("one/recipe.yaml").read_text()
    assert told.endswith(f"# recipe of this run\n{recipe}")
    assert recipe in Path("one", grid.REPORT).read_text()
    shown, _ = run(["prune", "--recipe", "one/recipe.yaml", "-o", "two", "--json"], capsys)
    assert json.loads(shown)["output"] == "two"  # one object
    assert grid.hashes(Path("one"), *grid.TIMED) == grid.hashes(Path("two"), *grid.TIMED)
    content = yaml.safe_load(recipe)
    assert content["model"] == "model"
    assert "method" in content
    assert not {"output", "force", "layout", "device", "dtype"} & set(content)  # places, and defaults


def test_options_given_beside_a_recipe_win(checkpoint: Checkpoints, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint('gpt2')}\nmethod: random\nratio: 0.15\n")
    result = secateur.prune(checkpoint(), recipe=recipe, seed=4, output=tmp_path / "out")
    assert yaml.safe_load(result.recipe) == {
        "model": str(checkpoint()), "method": "random", "ratio": 0.15, "seed": 4
    }  # fmt: skip


def test_a_copy_has_a_recipe_too(checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(), method="random", ratio=0, output=tmp_path / "out")
    assert yaml.safe_load(result.recipe)["ratio"] == 0
    assert grid.hashes(tmp_path / "out") == grid.hashes(checkpoint())


def test_preview_takes_the_model_of_the_recipe(checkpoint: Checkpoints, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint()}\nmethod: random\nratio: 0.15\n")
    assert secateur.preview(recipe=recipe) == secateur.preview(checkpoint(), method="random", ratio=0.15)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ration: 0.3", "did you mean ratio"),
        ("ratio: 0.3\nset: {space: kv}", "did you mean spaces"),
        ("ratio: 0.3\nset: {spaces: {kind: kv}}", "spaces="),
        ("ratio: 0.3\nset: kv", "options='kv'"),
        ("- ratio", "no mapping"),
        ("ratio: [", "not valid YAML"),
    ],
)
def test_wrong_recipes_are_refused(content: str, words: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(RequestError, match=words) as caught:
        secateur.prune(checkpoint(), method="magnitude", recipe=recipe, output=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_no_model_anywhere(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no model is named"):
        secateur.prune(method="random", ratio=0.1, output=tmp_path / "out")


def test_recipe_holds_what_is_not_a_default() -> None:
    values: dict[str, Any] = {"model": "m", "ratio": 0.3, "samples": 128, "seed": 0, "output": "o", "force": True}
    request = make_request(values)
    assert yaml.safe_load(recipe_of(request, "random", {})) == {"model": "m", "method": "random", "ratio": 0.3}
    assert yaml.safe_load(recipe_of(request, "random", {"spaces": "kv"}, named=False)) == {
        "method": "random", "ratio": 0.3, "set": {"spaces": "kv"}
    }  # fmt: skip
