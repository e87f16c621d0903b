"""What may befall a command, and what must come of it: the same bytes in the end, or a refusal; nothing half-written.

A fault is a function that runs real commands in processes of their own, harms them, and says what came of it. The
short ones are tests; all of them run in ``benchmarks/bench_faults.py``.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disturbed import NAMES, SHORT, Command, Garden, half_written, untouched
from processes import Child, at, gone, held, remount, small_disk, until, workers_of
from secateur.engine.journal import work_folder


def killed(garden: Garden, name: str) -> str:
    """SIGKILL in the middle."""
    command, folder = garden.command(name), garden.place()
    straight = garden.straight(name)
    with untouched(command.source):
        child = Child(command.on(folder / "out"), folder, at(*command.phase, held(folder)))
        until("the middle", (folder / "reached").exists, child)
        child.signal(signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
        assert not half_written(command, folder / "out", straight)
        garden.finish(command, folder)
    return "the same command gave the same bytes"


def ended_politely(garden: Garden, name: str, number: int) -> str:
    """SIGINT or SIGTERM in the middle."""
    command, folder = garden.command(name), garden.place()
    straight = garden.straight(name)
    child = Child(command.on(folder / "out"), folder, at(*command.phase, held(folder)))
    until("the middle", (folder / "reached").exists, child)
    child.signal(number)
    ended = child.wait()
    assert (ended.code, ended.error) == (130, "interrupted"), ended
    assert not half_written(command, folder / "out", straight)
    assert work_folder(folder / "out").exists() == command.resumes
    garden.finish(command, folder)
    return "exit 130 with a message; the same command gave the same bytes"


def full_file(garden: Garden, name: str) -> str:
    """No file may grow beyond half of the largest one written (RLIMIT_FSIZE)."""
    command, folder = garden.command(name), garden.place()
    straight = garden.straight(name)
    largest = max(path.stat().st_size for path in garden.root.glob("place-*/out/**/*.safetensors"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, resource.RLIM_INFINITY))

    with untouched(command.source):
        ended = Child(command.on(folder / "out"), folder, limited).wait()
        errors = ("no-space", "failed-cells") if name == "compare" else ("no-space",)  # cells fail, each for itself
        assert (ended.code, ended.error in errors) == (1, True), ended
        assert "File too large" in ended.said, ended
        assert not half_written(command, folder / "out", straight)
        garden.finish(command, folder)
    return f"exit 1, {ended.error}; the same command gave the same bytes"


def full_disk(garden: Garden, name: str, share: float) -> str:
    """A disk (tmpfs) that has room for a share of what the command needs."""
    command, folder = garden.command(name), garden.place()
    straight = garden.straight(name)
    with small_disk(folder, 256 * 2**20) as disk:
        needed = _most_used(command, disk, folder)
        size = max(16384, int(share * needed) // 4096 * 4096)
        remount(disk, f"size={size}")
        ended = Child(command.on(disk / "out"), folder).wait()
        if ended.code == 0:  # it needs less than it took where there was room
            garden.check(command, disk / "out")
            return "there was room enough"
        assert ended.code == 1, ended
        assert ended.error in ("no-space", "failed-cells", "worker-died"), ended
        assert not half_written(command, disk / "out", straight)
        remount(disk, f"size={256 * 2**20}")
        garden.finish(command, disk)
    return "exit 1, no-space; with room, the same command gave the same bytes"


def _most_used(command: Command, disk: Path, folder: Path) -> int:
    """Bytes that a file system held at most while the command ran; everything is deleted again."""
    child, most = Child(command.on(disk / "out"), folder), 0
    while child.alive:
        state = os.statvfs(disk)
        most = max(most, (state.f_blocks - state.f_bfree) * state.f_bsize)
        time.sleep(0.002)
    assert child.wait().code == 0
    shutil.rmtree(disk / "out") if (disk / "out").is_dir() else (disk / "out").unlink()
    return most


def read_only(garden: Garden, name: str) -> str:
    """A place where nothing can be written, whoever asks."""
    command, folder = garden.command(name), garden.place()
    for out in (Path("/sys/out"), Path("/proc/out"), Path("/dev/null/out")):
        ended = Child(command.on(out), folder).wait()
        assert (ended.code, ended.error) == (2, "unwritable"), ended
    return "exit 2, unwritable"


def made_read_only(garden: Garden, name: str) -> str:
    """A file system that becomes read-only while the command runs (as one does after an error of its disk)."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    with small_disk(folder, 256 * 2**20) as disk:
        child = Child(command.on(disk / "out"), folder, at(*command.phase, held(folder)))
        until("the middle", (folder / "reached").exists, child)
        child.signal(signal.SIGKILL)
        child.wait()
        remount(disk, "ro")
        ended = Child(command.on(disk / "out"), folder).wait()
        assert (ended.code, ended.error) == (2, "unwritable"), ended
        remount(disk, "rw")
        garden.finish(command, disk)
    return "exit 2, unwritable; writable again, the same command gave the same bytes"


def _rewritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


CHANGES: Mapping[str, Callable[[Path], object]] = {
    "rewritten": _rewritten,
    "cut short": _cut_short,
    "replaced": _replaced,
    "deleted": Path.unlink,
}


def _copied(command: Command, folder: Path) -> tuple[Command, Path]:
    """The command on a copy of its source, and a weight file of that."""
    source = folder / "source"
    shutil.copytree(command.source, source)
    words = tuple(str(source) if word == str(command.source) else word for word in command.words)
    file = sorted(source.glob("*.safetensors"))[-1]
    return Command(command.name, words, command.phase, source, command.resumes), file


def source_changed_during(garden: Garden, name: str, how: str) -> str:
    """Somebody writes to the source while the command reads it."""
    folder = garden.place()
    command, file = _copied(garden.command(name), folder)
    ended = Child(command.on(folder / "out"), folder, at(*command.phase, lambda: CHANGES[how](file))).wait()
    assert ended.code == 2, ended
    assert ended.error in ("source-changed", "missing-file", "bad-safetensors", "no-model"), ended
    if name != "compare":
        assert not (folder / "out").exists()
    return f"exit 2, {ended.error}"


def source_changed_between(garden: Garden, name: str, how: str) -> str:
    """Somebody writes to the source between two runs."""
    folder = garden.place()
    command, file = _copied(garden.command(name), folder)
    stopped = at(*command.phase, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(command.on(folder / "out"), folder, stopped).wait().code == -signal.SIGKILL
    before, state = file.read_bytes(), file.stat()
    CHANGES[how](file)
    ended = Child(command.on(folder / "out"), folder).wait()
    if not command.resumes and how in ("rewritten", "replaced"):  # nothing is kept of the first, so this is a new one
        assert ended.code == 0, ended
        return "begins again on the new source"
    assert ended.code == 2, ended
    if command.resumes:
        file.write_bytes(before)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        again = Child(command.on(folder / "out"), folder).wait()
        assert again.code == 0, again
        return f"exit 2, {ended.error}; put back, the same command finished"
    return f"exit 2, {ended.error}"


def data_cut_short_during(garden: Garden, name: str) -> str:
    """The calibration text is cut short while the command runs."""
    command, folder = garden.command(name), garden.place()
    notes = folder / "notes.txt"
    shutil.copyfile(garden.notes, notes)
    words = [str(notes) if word == str(garden.notes) else word for word in command.on(folder / "out")]
    if name == "compare":
        words += ["--data", str(notes), *SHORT]
    else:
        garden.straight(name)
    ended = Child(words, folder, at(*command.phase, lambda: _cut_short(notes))).wait()
    if name == "compare":
        assert (ended.code, ended.error) == (2, "source-changed"), ended
        return "exit 2, source-changed: cells of different texts are not compared"
    assert ended.code == 0, ended
    garden.check(command, folder / "out", elsewhere=True)
    return "the bytes of an undisturbed run: it was read before"


def data_cut_short_between(garden: Garden, name: str) -> str:
    """The calibration text is cut short between two runs."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    notes = folder / "notes.txt"
    shutil.copyfile(garden.notes, notes)
    words = [str(notes) if word == str(garden.notes) else word for word in command.on(folder / "out")]
    stopped = at(*command.phase, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert Child(words, folder, stopped).wait().code == -signal.SIGKILL
    _cut_short(notes)
    ended = Child(words, folder).wait()
    assert (ended.code, ended.error) == (2, "other-request"), ended
    shutil.copyfile(garden.notes, notes)
    assert Child(words, folder).wait().code == 0
    garden.check(command, folder / "out", elsewhere=True)
    return "exit 2, other-request; put back, the same command gave the same bytes"


def two_at_once(garden: Garden, name: str) -> str:
    """A second process on the same output while the first works; then the first is killed."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    first = Child(command.on(folder / "out"), folder, at(*command.phase, held(folder)))
    until("the middle", (folder / "reached").exists, first)
    ended = Child(command.on(folder / "out"), folder).wait()
    assert (ended.code, ended.error) == (2, "locked"), ended
    first.signal(signal.SIGKILL)
    first.wait()
    garden.finish(command, folder)
    return "exit 2, locked; the lock of the dead was taken over, with the same bytes"


def stampede(garden: Garden, name: str, many: int = 6) -> str:
    """Several processes begin on the same output at once."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    children = [Child(command.on(folder / "out"), folder) for _ in range(many)]
    ended = [child.wait() for child in children]
    codes = sorted(each.code for each in ended)
    assert codes.count(0) >= 1, ended
    assert set(codes) <= {0, 2}, ended
    assert {each.error for each in ended if each.code == 2} <= {"locked", "output-exists"}, ended
    if name != "compare":  # which only finds everything done
        assert codes.count(0) == 1, ended
    garden.check(command, folder / "out")
    assert not list(folder.glob("out.previous*"))
    return f"{codes.count(0)} of {many} wrote, {codes.count(2)} were refused (exit 2)"


def clock_jumped(garden: Garden, name: str) -> str:
    """Files from the future and from before 1970, and a clock that goes back a year in the middle."""
    folder = garden.place()
    command, file = _copied(garden.command(name), folder)
    garden.straight(name)
    os.utime(file, (-86400, -86400))
    os.utime(command.source / "config.json", (4e9, 4e9))

    def jump() -> None:
        real, real_ns = time.time, time.time_ns
        time.time, time.time_ns = lambda: real() - 3.2e7, lambda: real_ns() - 32 * 10**15

    def jump_and_die() -> None:
        jump()
        os.kill(os.getpid(), signal.SIGKILL)

    child = Child(command.on(folder / "out"), folder, at(*command.phase, jump_and_die))
    assert child.wait().code == -signal.SIGKILL
    work = work_folder(folder / "out")
    for number, path in enumerate(sorted(path for path in work.rglob("*") if path.is_file())):
        os.utime(path, (4e9, 4e9) if number % 2 else (0, 0))
    ended = Child(command.on(folder / "out"), folder, jump).wait()
    assert ended.code == 0, ended
    garden.check(command, folder / "out", elsewhere=True)
    return "the bytes of an undisturbed run"


def worker_killed(garden: Garden, name: str = "compare") -> str:
    """The process of a cell is killed, then the one from which cells are forked."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    child = Child(command.on(folder / "out"), folder)
    journal = folder / "out" / "results.jsonl"
    until("cells", lambda: journal.is_file() and workers_of(child.pid)[1:], child)
    os.kill(workers_of(child.pid)[-1], signal.SIGKILL)
    until("a lost cell", lambda: b"SIGKILL" in journal.read_bytes(), child)
    until("the next", lambda: workers_of(child.pid), child)
    os.kill(workers_of(child.pid)[0], signal.SIGKILL)
    ended = child.wait()
    assert (ended.code, ended.error) == (1, "failed-cells"), ended
    assert gone(workers_of(child.pid))
    garden.finish(command, folder)
    return "exit 1, failed-cells; the same command made those again, with the same figures"


def owner_killed(garden: Garden, name: str = "compare") -> str:
    """A comparison is killed: its cells end with it."""
    command, folder = garden.command(name), garden.place()
    garden.straight(name)
    child = Child(command.on(folder / "out"), folder)
    until("a cell", lambda: workers_of(child.pid)[1:], child)
    workers = workers_of(child.pid)
    child.signal(signal.SIGKILL)
    child.wait()
    assert gone(workers), "a cell outlived its comparison"
    garden.finish(command, folder)
    return "the cells ended with it; the same command gave the same figures"


@dataclass(frozen=True)
class Fault:
    """One thing that may befall one command; ``short`` ones are tests."""

    what: str
    command: str
    make: Callable[[Garden], str]
    short: bool = False

    def __str__(self) -> str:
        return f"{self.what}, {self.command}"


def faults() -> list[Fault]:
    """All of them."""
    found: list[Fault] = []

    def add(what: str, make: Callable[..., str], names: tuple[str, ...], short: tuple[str, ...], *more: Any) -> None:
        found.extend(
            Fault(what, name, lambda garden, name=name: make(garden, name, *more), name in short) for name in names
        )

    writing = ("prune", "recover", "pack", "pack sparse")
    add("SIGKILL in the middle", killed, NAMES, ("prune", "recover", "pack sparse"))
    add("SIGINT", ended_politely, NAMES, ("prune",), signal.SIGINT)
    add("SIGTERM", ended_politely, NAMES, ("prune", "pack sparse"), signal.SIGTERM)
    add("file size limited (RLIMIT_FSIZE)", full_file, NAMES, writing)
    for share in (0.05, 0.3, 0.6, 0.9):
        add(f"disk full at {share:.0%} (tmpfs)", full_disk, NAMES, ("prune",) if share == 0.6 else (), share)
    add("output where nothing can be written", read_only, NAMES, ("prune", "pack sparse"))
    add("disk turned read-only", made_read_only, NAMES, ("prune",))
    for how in CHANGES:
        short = ("prune", "recover", "pack") if how == "cut short" else ("pack",) if how == "rewritten" else ()
        add(f"source {how} during the run", source_changed_during, NAMES, short, how)
        short = ("prune",) if how == "rewritten" else ()
        add(f"source {how} between two runs", source_changed_between, NAMES, short, how)
    add("calibration text cut short during the run", data_cut_short_during, ("prune", "recover", "compare"), ("prune",))
    add("calibration text cut short between two runs", data_cut_short_between, ("prune", "recover"), ("prune",))
    add("two processes on one output", two_at_once, NAMES, ("prune", "pack sparse"))
    add("six processes begin on one output at once", stampede, NAMES, ("pack sparse",))
    add("clock and times of files jump", clock_jumped, NAMES, ("prune",))
    add("workers killed", worker_killed, ("compare",), ())
    add("owner of the workers killed", owner_killed, ("compare",), ())
    return found
