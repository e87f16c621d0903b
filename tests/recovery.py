"""A short recovery of a tiny model, for the tests of ``recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.api import RecoverResult
from secateur.cli import main

STEPS: dict[str, Any] = {"steps": 12, "length": 16}
OPTIONS: dict[str, Any] = {"batch": 4, "every": 4, "validation": 4, "rank": 4, "learning_rate": 1e-2}


class Killed(BaseException):
    """What stands for SIGKILL inside the process."""


def recover(
    model: Any, out: Path | None, notes: Path, options: dict[str, Any] | None = None, **more: Any
) -> RecoverResult:
    """A short recovery."""
    return secateur.recover(model, output=out, data=notes, options={**OPTIONS, **(options or {})}, **{**STEPS, **more})


def run(words: list[str]) -> int:
    """Exit code of a command line."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code
