"""What a preview foretells of memory and time, and the benchmark for GPUs, which must at least run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from conftest import Checkpoints
from secateur.engine.foresight import START, Rates

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_time_is_foretold_where_it_follows_from_the_sweeps(checkpoint: Checkpoints, notes: Path) -> None:
    asked = {"ratio": 0.15, "data": str(notes), "samples": 8, "length": 16}
    found = {name: secateur.preview(checkpoint(), method=name, **asked) for name in ("magnitude", "fasp", "modegpt")}
    assert found["magnitude"]["seconds"] > 0
    assert found["fasp"]["seconds"] >= found["magnitude"]["seconds"]
    assert found["modegpt"]["seconds"] is None
    assert found["modegpt"]["peak_bytes"] >= found["fasp"]["peak_bytes"] >= found["magnitude"]["peak_bytes"]


def test_more_of_a_machine_is_less_time(checkpoint: Checkpoints, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for speed in (0.01, 0.1):
        rates = Rates(*[START * speed] * 6)
        monkeypatch.setattr(Rates, "of", staticmethod(lambda *_, rates=rates: rates))
        asked = {"method": "fasp", "ratio": 0.15, "data": str(notes), "samples": 8, "length": 16}
        found.append(secateur.preview(checkpoint(), **asked)["seconds"])
    assert found[0] == pytest.approx(10 * found[1], rel=0.01)


def test_nothing_is_left_where_the_output_will_be(checkpoint: Checkpoints, tmp_path: Path) -> None:
    secateur.preview(checkpoint(), method="magnitude", ratio=0.15, output=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_benchmark_runs_without_one() -> None:
    command = [sys.executable, BENCHMARKS / "bench_gpu.py", "--small", "--methods", "fasp", "wanda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "not recorded" in done.stderr
