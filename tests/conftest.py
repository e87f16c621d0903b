"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import models
import secateur

settings.register_profile("secateur", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("secateur")
torch.set_num_threads(1)

Checkpoints = Callable[..., Path]
_DRAWING = ("test_reports", "test_demo")


@pytest.fixture(autouse=True)
def _drawings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes as long as pruning a tiny model: only the tests that look at drawings draw."""
    if request.module.__name__ not in _DRAWING:
        monkeypatch.setattr("secateur.reports.html.can_draw", lambda: False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny checkpoints, made once: ``checkpoint("gpt2-bare")``, ``checkpoint("opt", torch.float64)``."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("models") / name
            arguments: dict[str, Any] = models.DISK.get(name, {"name": name})
            made[name, dtype] = models.save(folder, dtype=dtype, **arguments)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def cut(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Pruned tiny models."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("cut") / name
            wanted: dict[str, Any] = {"ratio": 0.15}
            if name == "bloom":  # its FFN is always 4 times as wide as the stream
                wanted = {"ratio": 0.2, "options": {"spaces": "blocks"}}
            secateur.prune(checkpoint(name, dtype), method="magnitude", output=made[name, dtype], **wanted)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text."""
    path = tmp_path_factory.mktemp("texts") / "notes.txt"
    path.write_text(models.text(400))
    return path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out text."""
    path = tmp_path_factory.mktemp("texts") / "held-out.txt"
    path.write_text(models.text(60, seed=1))
    return path


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of trained models and texts; tests that need it are skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("SECATEUR_ASSETS", beside))
    if not (folder / "lm").is_dir():
        pytest.skip(f"no trained models: {folder} is absent (SECATEUR_ASSETS names another folder)")
    return folder
