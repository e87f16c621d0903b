"""The embedded model and the demonstration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.data.pydocs import documents, split_of
from secateur.demo import METHODS, RATIOS, embedded_model


def test_documents_never_change_sides() -> None:
    names = [f"module{number}.py" for number in range(400)]
    sides = [split_of(name) for name in names]
    assert {"train", "valid", "test"} == set(sides)
    assert [split_of(name) for name in names] == sides
    assert not set(documents("valid")) & set(documents("test"))


def test_embedded_model_is_small_enough_to_carry() -> None:
    total = sum(path.stat().st_size for path in embedded_model().rglob("*") if path.is_file())
    assert total <= 20 * 2**20


def test_demo_prunes_with_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "-o", str(tmp_path / "demo"), "--json"])
    assert stopped.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert {(row["method"], row["ratio"]) for row in result["rows"]} == {(m, r) for m in METHODS for r in RATIOS}
    assert Path(result["report"]).is_file()
    by = {(row["method"], row["ratio"]): row["perplexity"] for row in result["rows"]}
    for ratio in RATIOS:
        assert by["slicegpt", ratio] < by["random", ratio]
        assert by["prunenet", ratio] < by["random", ratio]
    for row in result["rows"]:
        gap = abs(1 - row["params"] / result["dense"]["params"] - row["ratio"])
        assert gap < 0.02
