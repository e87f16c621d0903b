"""Killed anywhere and run again, a prune writes the bytes of a run that was never disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.api import pruning
from secateur.checkpoints.writer import TensorWriter
from secateur.cli import main
from secateur.engine import run as run_module
from secateur.engine import sweeps
from secateur.engine import walk as walk_module
from secateur.engine.journal import Journal, locked, work_folder
from secateur.engine.mending import MendSweep
from secateur.engine.run import Run
from secateur.engine.sweeps import SummarySweep
from secateur.engine.walk import Walk
from secateur.errors import RequestError
from secateur.plans import Edits, Plan

_PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a run is too slow to search for a smaller example


Straight = dict[str, tuple[dict[str, str], int]]
"""Hashes of the files of undisturbed runs and ticks of the clock, by request."""


class Killed(BaseException):
    """What stands for SIGKILL inside the process: nothing of ours catches it."""


_POINTS: list[tuple[Any, str]] = [
    (TensorWriter, "write"),
    (TensorWriter, "_prepare"),
    (Journal, "add"),
    (Plan, "save"),
    (Plan, "load"),
    (SummarySweep, "_keep"),
    (Walk, "run"),
    (MendSweep, "_finish"),
    (Edits, "write"),
    (Run, "_copy_companions"),
    (run_module, "verify_output"),
    (sweeps, "save_file"),
    (pruning, "write_card"),
    (pruning, "write_report"),
    (Path, "write_text"),
    (Path, "replace"),
    (Path, "rename"),
    (shutil, "rmtree"),
]


@dataclass
class Clock:
    """Counts the moments before and after every call that leaves something on disk; kills at one of them."""

    kill_at: int | None = None
    now: int = 0

    def tick(self) -> None:
        self.now += 1
        if self.now == self.kill_at:
            raise Killed


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Let every point tick; writing a tensor also ticks with half of its bytes written."""

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def ticking(*args: Any, **kwargs: Any) -> Any:
            clock.tick()
            result = function(*args, **kwargs)
            clock.tick()
            return result

        return ticking

    pwrite = os.pwrite

    def torn(descriptor: int, data: bytes, offset: int) -> int:
        pwrite(descriptor, data[: len(data) // 2], offset)
        clock.tick()
        return pwrite(descriptor, data, offset)

    with ExitStack() as stack:
        for owner, name in _POINTS:
            stack.enter_context(mock.patch.object(owner, name, around(getattr(owner, name))))
        stack.enter_context(mock.patch.object(os, "pwrite", torn))
        yield


def requests(notes: Path) -> dict[str, dict[str, Any]]:
    """One data-free and one calibrated request."""
    return {
        "magnitude": {"method": "magnitude", "ratio": 0.15},
        "slicegpt": {"method": "slicegpt", "ratio": 0.15, "data": notes, "samples": 8, "length": 16},
        "rotations": {
            "method": "slicegpt",
            "ratio": 0.15,
            "data": notes,
            "samples": 8,
            "length": 16,
            "layout": "per-layer",
        },
        "fasp": {"method": "fasp", "ratio": 0.15, "data": notes, "samples": 8, "length": 16},
        "joint": {
            "method": "joint",
            "ratio": 0.15,
            "data": notes,
            "samples": 8,
            "length": 16,
            "layout": "per-layer",
        },
        "blocks": {"method": "random", "ratio": 0.2, "options": {"spaces": "blocks"}},
    }


@pytest.fixture(scope="module")
def straight(checkpoint: Checkpoints, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """Bytes of undisturbed runs, and how often the clock ticks in one."""
    found = {}
    for name, request in requests(notes).items():
        clock = Clock()
        out = tmp_path_factory.mktemp("straight") / "out"
        with clocked(clock):
            secateur.prune(checkpoint("sharded"), output=out, **request)
        found[name] = (grid.hashes(out, *grid.TIMED), clock.now)
    return found


@pytest.mark.parametrize("copies", [False, True], ids=["", "copies"])
@pytest.mark.parametrize("name", ["magnitude", "slicegpt", "fasp", "joint", "blocks"])
@settings(max_examples=6, phases=_PHASES)
@given(data=st.data())
def test_killed_at_random_points(
    name: str,
    copies: bool,
    checkpoint: Checkpoints,
    notes: Path,
    straight: Straight,
    data: st.DataObject,
) -> None:
    """One or two kills, one after the other, then a run to the end; with copies of the signal behind every block."""
    if copies and name not in ("slicegpt", "fasp", "joint"):
        pytest.skip("it has no signal")
    request = requests(notes)[name]
    wanted, ticks = straight[name]
    kills = data.draw(st.lists(st.integers(1, ticks), min_size=1, max_size=2), label="kills")
    often = mock.patch.object(walk_module, "_SAVE_EVERY", -1.0 if copies else 1e9)
    with tempfile.TemporaryDirectory() as temporary, often:
        out = Path(temporary) / "out"
        for kill in kills:
            if out.exists():
                break
            with clocked(Clock(kill)), suppress(Killed):
                secateur.prune(checkpoint("sharded"), output=out, **request)
        if out.exists():  # published: complete, whatever of the work folder is left
            assert grid.hashes(out, *grid.TIMED) == wanted
        secateur.prune(checkpoint("sharded"), output=out, force=True, **request)
        assert grid.hashes(out, *grid.TIMED) == wanted
        assert not work_folder(out).exists()


@pytest.mark.parametrize("point", ["verify_output", "_copy_companions"])
@settings(max_examples=8, phases=_PHASES)
@given(data=st.data())
def test_torn_journal(
    point: str,
    checkpoint: Checkpoints,
    notes: Path,
    straight: Straight,
    data: st.DataObject,
) -> None:
    """A journal that ends anywhere, in the middle of a line too."""
    request = requests(notes)["slicegpt"]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        _interrupt(checkpoint("sharded"), out, request, point)
        journal = work_folder(out) / "journal.jsonl"
        content = journal.read_bytes()
        journal.write_bytes(content[: data.draw(st.integers(0, len(content)), label="length")])
        secateur.prune(checkpoint("sharded"), output=out, **request)
        assert grid.hashes(out, *grid.TIMED) == straight["slicegpt"][0]


def _interrupt(model: Path, out: Path, request: dict[str, Any], point: str = "verify_output") -> None:
    owner: Any = run_module if point == "verify_output" else Run
    with mock.patch.object(owner, point, side_effect=Killed), pytest.raises(Killed):
        secateur.prune(model, output=out, **request)
    assert not out.exists()


def test_what_was_written_is_not_believed_blindly(
    checkpoint: Checkpoints, notes: Path, straight: Straight, tmp_path: Path
) -> None:
    """Bytes lost between two runs are written again, and checked again."""
    request = requests(notes)["magnitude"]
    out = tmp_path / "out"
    with mock.patch.object(pruning, "write_card", side_effect=Killed), pytest.raises(Killed):
        secateur.prune(checkpoint("sharded"), output=out, **request)
    shard = sorted((work_folder(out) / "out").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-64] + bytes(64))
    verify = mock.Mock(wraps=run_module.verify_output)
    with mock.patch.object(run_module, "verify_output", verify):
        secateur.prune(checkpoint("sharded"), output=out, **request)
    assert grid.hashes(out, *grid.TIMED) == straight["magnitude"][0]
    assert verify.call_count == 1


@pytest.mark.parametrize(
    "change", [{"ratio": 0.2}, {"seed": 1}, {"method": "random"}, {"options": {"of": "first"}}], ids=str
)
def test_another_request_is_refused(
    change: dict[str, Any], checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """The unfinished run stays as it is, and the same command still finishes it."""
    request = requests(notes)["magnitude"]
    _interrupt(checkpoint("sharded"), tmp_path / "out", request)
    before = grid.hashes(work_folder(tmp_path / "out"))
    with pytest.raises(RequestError, match="another request") as caught:
        secateur.prune(checkpoint("sharded"), output=tmp_path / "out", **{**request, **change})
    assert caught.value.code == "other-request"
    assert grid.hashes(work_folder(tmp_path / "out")) == before
    secateur.prune(checkpoint("sharded"), output=tmp_path / "out", **request)


def test_a_changed_model_is_another_request(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("sharded"), tmp_path / "model")
    request = requests(notes)["magnitude"]
    _interrupt(tmp_path / "model", tmp_path / "out", request)
    os.utime(next((tmp_path / "model").glob("*.safetensors")), (1, 1))
    with pytest.raises(RequestError, match="another request"):
        secateur.prune(tmp_path / "model", output=tmp_path / "out", **request)


@pytest.mark.parametrize("ratio", [0, 0.15])
def test_two_processes_on_one_output(ratio: float, checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(work_folder(out)):
        with pytest.raises(RequestError, match="another process") as caught:
            secateur.prune(checkpoint(), method="random", ratio=ratio, output=out)
        assert caught.value.code == "locked"
        assert work_folder(out).is_dir()
        assert not out.exists()
    secateur.prune(checkpoint(), method="random", ratio=ratio, output=out)


def test_force_moves_the_old_output_aside(checkpoint: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for index in range(3):
        secateur.prune(checkpoint(), method="random", ratio=0.15, seed=index, output=out, force=True)
    seeds = {p.name: json.loads((p / "secateur.json").read_text())["requested"]["seed"] for p in tmp_path.iterdir()}
    assert seeds == {"out": 2, "out.previous": 0, "out.previous-2": 1}


_SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from secateur.engine.journal import Journal
add, count = Journal.add, 0

def dying(self, step, **content):
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, step, **content)

Journal.add = dying
from secateur.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", [2, 6, 9])
def test_sigkill(moment: int, checkpoint: Checkpoints, notes: Path, straight: Straight, tmp_path: Path) -> None:
    """A process that dies by SIGKILL: no output, and the same command finishes the work."""
    out = tmp_path / "out"
    words = ["prune", str(checkpoint("sharded")), "-o", str(out), "--method", "slicegpt", "--ratio", "0.15",
             "--data", str(notes), "--samples", "8", "--length", "16"]  # fmt: skip
    died = subprocess.run([sys.executable, "-c", _SCRIPT, str(moment), *words], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not out.exists()
    assert work_folder(out).is_dir()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert grid.hashes(out, *grid.TIMED) == straight["slicegpt"][0]


def test_models_differ_from_their_cut(checkpoint: Checkpoints) -> None:
    """The sharded checkpoint really has several files."""
    assert len(list(checkpoint("sharded").glob("*.safetensors"))) > 2
    assert models.config(checkpoint("sharded"))["model_type"] == "llama"
