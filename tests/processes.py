"""Commands in processes of their own, forked from one that has imported everything, held or harmed on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.cli import main
from secateur.cli.console import ConsoleProgress

WAIT = 240.0
"""Seconds after which a command that should have ended or begun something is given up."""


class NotHereError(Exception):
    """The fault cannot be made on this machine; says why."""


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code (negative: the signal), its JSON object, what it said."""

    code: int
    result: dict[str, Any]
    said: str

    @property
    def error(self) -> str:
        """Code of the failure that it told of."""
        return str(self.result.get("error", {}).get("code", ""))


class Child:
    """A command in a process of its own, forked from this one, which has imported everything.

    Args:
        words: of the command line.
        folder: for what it says.
        before: called in the process first, to prepare its fault.
    """

    _count = 0

    def __init__(self, words: list[str], folder: Path, before: Callable[[], object] = lambda: None) -> None:
        Child._count += 1
        self._files = [folder / f"said-{Child._count}.{kind}" for kind in ("out", "err")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads, which have nothing to do with it
            self.pid = os.fork()
        if self.pid == 0:
            self._run(words, before)
        self._status: int | None = None

    def _run(self, words: list[str], before: Callable[[], object]) -> None:
        code: Any = 99
        try:
            for number, file in enumerate(self._files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            before()
            main([*words, "--json"])
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def alive(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.alive:
            os.kill(self.pid, number)

    def wait(self, seconds: float = WAIT) -> Ended:
        """How it ended.

        Raises:
            AssertionError: it did not, in that time.
        """
        limit = time.monotonic() + seconds
        while self.alive:
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end within {seconds:g} s")
            time.sleep(0.005)
        assert self._status is not None
        out, said = (file.read_text() if file.is_file() else "" for file in self._files)
        code = os.waitstatus_to_exitcode(self._status)
        return Ended(code, json.loads(out) if out.strip() else {}, said)


def until(what: str, true: Callable[[], object], child: Child) -> None:
    """Wait for something that a running command does."""
    limit = time.monotonic() + WAIT
    while not true():
        assert child.alive, f"it ended before {what}: {child.wait()}"
        assert time.monotonic() < limit, f"it never came to: {what}"
        time.sleep(0.005)


def at(phase: str, done: int, action: Callable[[], object]) -> Callable[[], None]:
    """For ``before``: do something once, when ``done`` steps of a phase are finished."""

    def prepare() -> None:
        start, step = ConsoleProgress.start, ConsoleProgress.step
        state = {"what": "", "over": False}

        def starting(self: ConsoleProgress, what: str, total: int) -> None:
            state["what"] = what
            start(self, what, total)

        def stepping(self: ConsoleProgress, now: int) -> None:
            step(self, now)
            if state["what"] == phase and now >= done and not state["over"]:
                state["over"] = True
                action()

        ConsoleProgress.start, ConsoleProgress.step = starting, stepping  # type: ignore[method-assign]

    return prepare


def held(folder: Path) -> Callable[[], None]:
    """An action: tell with a file that it was reached, and wait for another."""

    def action() -> None:
        (folder / "reached").touch()
        while not (folder / "go on").exists():
            time.sleep(0.005)

    return action


def workers_of(pid: int) -> list[int]:
    """Processes below one: the one from which cells are forked, and the cell."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH):
                raise
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    limit = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own, in memory.

    Raises:
        NotHereError: nothing can be mounted.
    """
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        raise NotHereError("file systems can be mounted by the superuser only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True, capture_output=True)
