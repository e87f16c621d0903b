"""Killed anywhere and run again, a recovery writes the bytes of a run that was never disturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import grid
import secateur
from conftest import Checkpoints
from recovery import OPTIONS, STEPS, Killed, run
from secateur.api import recovering
from secateur.engine.journal import work_folder
from secateur.errors import RequestError
from secateur.training.loop import Trainer
from secateur.training.snapshots import Snapshots

REQUESTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "distil": {"method": "full", "options": {"hidden": 0.5}},
}


def _request(name: str, checkpoint: Checkpoints, cut: Checkpoints, notes: Path) -> dict[str, Any]:
    more = dict(REQUESTS[name])
    options = {**OPTIONS, **more.pop("options", {})}
    teacher = {"teacher": checkpoint("sharded")} if name == "distil" else {}
    return {"model": cut("sharded"), "data": notes, **STEPS, **more, **teacher, "options": options}


def _killed_before_writing(request: dict[str, Any], output: Path) -> None:
    """A run that trained to its end and wrote nothing."""
    with mock.patch.object(recovering, "write_weights", side_effect=Killed), pytest.raises(Killed):
        secateur.recover(output=output, **request)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize(
    ("owner", "point", "calls"),
    [
        (Trainer, "_step", 7),
        (Trainer, "_step", 1),
        (Snapshots, "save", 3),
        (Snapshots, "_write", 4),
        (Snapshots, "restore", 1),
        (recovering, "write_weights", 1),
        (recovering, "check_reloaded", 1),
        (recovering, "write_report", 1),
        (recovering, "publish", 1),
    ],
)
def test_killed_and_resumed(
    name: str, owner: Any, point: str, calls: int, checkpoint: Checkpoints, cut: Checkpoints, notes: Path,
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path,
) -> None:  # fmt: skip
    """Twice at the same place, then to the end: the bytes of a run that was never disturbed."""
    request = _request(name, checkpoint, cut, notes)
    straight = _straight(name, request, tmp_path_factory)
    function = getattr(owner, point)
    for count in (calls, 1 + calls // 4):
        left = iter(range(1, count))

        def dying(*args: Any, left: Any = left, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return function(*args, **kwargs)

        with mock.patch.object(owner, point, dying), pytest.raises(Killed):
            secateur.recover(output=tmp_path / "out", **request)
        assert not (tmp_path / "out").exists()
    secateur.recover(output=tmp_path / "out", **request)
    assert grid.hashes(tmp_path / "out", *grid.TIMED) == straight
    assert not work_folder(tmp_path / "out").exists()


_STRAIGHT: dict[str, dict[str, str]] = {}


def _straight(name: str, request: dict[str, Any], factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of an undisturbed run."""
    if name not in _STRAIGHT:
        out = factory.mktemp("straight") / "out"
        secateur.recover(output=out, **request)
        _STRAIGHT[name] = grid.hashes(out, *grid.TIMED)
    return _STRAIGHT[name]


_SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from secateur.training.loop import Trainer
step = Trainer._step

def dying(self, number, rate):
    if number == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, rate)

Trainer._step = dying
from secateur.cli import main
main(sys.argv[2:])
"""


def test_sigkill(
    checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A process that dies by SIGKILL: no output, and the same command finishes the work."""
    straight = _straight("lora", _request("lora", checkpoint, cut, notes), tmp_path_factory)
    out = tmp_path / "out"
    words = ["recover", str(cut("sharded")), "-o", str(out), "--data", str(notes), "--steps", "12", "--length", "16"]
    words += [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={value}")]
    died = subprocess.run([sys.executable, "-c", _SCRIPT, "9", *words], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not out.exists()
    assert (work_folder(out) / "state-8.safetensors").is_file()
    assert run(words) == 0
    assert grid.hashes(out, *grid.TIMED) == straight


def test_another_request_is_refused(checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path: Path) -> None:
    request = _request("lora", checkpoint, cut, notes)
    _killed_before_writing(request, tmp_path / "out")
    before = grid.hashes(work_folder(tmp_path / "out"))
    for change in ({"seed": 1}, {"steps": 13}, {"method": "full"}, {"teacher": checkpoint("sharded")}):
        with pytest.raises(RequestError) as caught:
            secateur.recover(output=tmp_path / "out", **{**request, **change})
        assert caught.value.code == "other-request"
    with pytest.raises(RequestError, match="another request"):
        secateur.prune(cut("sharded"), method="random", ratio=0.1, output=tmp_path / "out")
    assert grid.hashes(work_folder(tmp_path / "out")) == before


def test_a_damaged_checkpoint_is_not_believed(
    checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    request = _request("lora", checkpoint, cut, notes)
    _killed_before_writing(request, tmp_path / "out")
    state = work_folder(tmp_path / "out") / "state-12.safetensors"
    state.write_bytes(state.read_bytes()[:-8] + bytes(8))
    secateur.recover(output=tmp_path / "out", **request)
    assert grid.hashes(tmp_path / "out", *grid.TIMED) == _straight("lora", request, tmp_path_factory)


def test_a_journal_without_its_first_point_is_not_believed(
    checkpoint: Checkpoints, cut: Checkpoints, notes: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    request = _request("lora", checkpoint, cut, notes)
    _killed_before_writing(request, tmp_path / "out")
    journal = work_folder(tmp_path / "out") / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if '"point"' in line)
    journal.write_text("".join(lines[:first] + lines[first + 1 :]))
    secateur.recover(output=tmp_path / "out", **request)
    assert grid.hashes(tmp_path / "out", *grid.TIMED) == _straight("lora", request, tmp_path_factory)
