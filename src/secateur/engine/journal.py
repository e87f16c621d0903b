"""The journal beside the output: what a run has finished, so that the same command resumes after any interruption."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from secateur.engine.files import write_whole
from secateur.errors import refuse
from secateur.scores.ridge import take_raised

LOCK: Final = "lock"
JOURNAL: Final = "journal.jsonl"
_CHECK: Final = "crc32"
_DAMPING: Final = "damping"
_ATTEMPTS: Final = 100


def work_folder(output: Path) -> Path:
    """``.OUT.secateur`` beside the output."""
    return output.with_name(f".{output.name}.secateur")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; a second process on the same output is refused. It ends with the process that holds it.

    Raises:
        RequestError: another process holds it, or nothing can be written there.
    """
    absent = [parent for parent in folder.absolute().parents if not parent.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, absent)
        for attempt in count():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = (folder / LOCK).open("w")
            except OSError as error:
                if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS:
                    continue  # whoever held it has just finished and cleared up
                found = f"nothing can be written there ({error.strerror})"
                refuse("unwritable", f"working in {str(folder)!r}", found, "name another output")
            stack.enter_context(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = "another process is working on this output"
                refuse("locked", f"writing beside {str(folder)!r}", found, "wait for it")
            if _is_at(handle.fileno(), folder / LOCK):
                break
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Delete folders in which nothing came to lie, the innermost first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name; a lock on one that was deleted keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Journal:
    """Lines of JSON, one per finished step, the first naming the request.

    Every line ends with a checksum of itself; from the first on that is not as it was written, nothing is believed.

    Args:
        folder: the work folder; made when absent.
        fingerprint: model, data, request and version; a journal of another one is refused.
        name: of the file.
        hint: what to do about a journal of another request.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], name: str = JOURNAL, hint: str = "") -> None:
        self.fingerprint = fingerprint
        self.path = folder / name
        self._records: list[dict[str, Any]] = []
        self.resumed = False
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        for line in lines[:-1]:  # what follows the last newline was cut off while being written
            record = _read(line)
            if record is None:
                break
            self._records.append(record)
        if len(lines) > 1 and not self._records:
            found = f"the first line of {name} is not as it was written, or of an older version"
            refuse("bad-journal", f"resuming in {str(folder)!r}", found, hint or f"delete {folder.name}")
        if self._records and self._records[0] != {"request": fingerprint}:
            refuse(
                "other-request",
                f"resuming in {str(folder)!r}",
                f"it holds the run of another request ({_difference(self._records[0], fingerprint)})",
                hint or f"repeat that request, or delete {folder.name}",
            )
        self.resumed = len(self._records) > 1
        # rewritten whole, so that a torn last line is gone before the next is added
        write_whole(self.path, "".join(map(_line, self._records or [{"request": fingerprint}])))

    def add(self, step: str, **content: Any) -> None:
        """Record a finished step durably, and by how much its damping had to be raised, if it had."""
        raised = take_raised()
        told = {_DAMPING: {"matrices": len(raised), "most": max(raised)}} if raised else {}
        record = {"step": step, **content, **told}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(record))
            handle.flush()
            os.fsync(handle.fileno())
        self._records.append(record)

    def done(self, step: str) -> list[dict[str, Any]]:
        """Records of a step, oldest first."""
        return [record for record in self._records if record.get("step") == step]

    def newer(self, step: str, than: str) -> bool:
        """Whether a step is done, and was not followed by another one."""
        last = next((r["step"] for r in reversed(self._records) if r.get("step") in (step, than)), None)
        return last == step


def raised_damping(folder: Path) -> dict[str, str]:
    """What the journals in a folder and below say of damping, for the report; empty where none was raised."""
    last: dict[tuple[Path, str, Any], dict[str, Any]] = {}
    for path in sorted(folder.rglob(JOURNAL)):
        for line in path.read_bytes().splitlines():
            record = _read(line)
            if record is not None and "step" in record:
                last[path, record["step"], record.get("block", record.get("place"))] = record
    told = {key: record[_DAMPING] for key, record in last.items() if _DAMPING in record}
    if not told:
        return {}
    blocks = sorted({place for _, _, place in told if isinstance(place, int)})
    where = f", in block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}" if blocks else ""
    count, most = sum(each["matrices"] for each in told.values()), max(each["most"] for each in told.values())
    return {"damping_raised": f"in {count} normal equations, up to {most:,.0f} times{where}"}


def _line(record: dict[str, Any]) -> str:
    return json.dumps({**record, _CHECK: crc32(json.dumps(record).encode())}) + "\n"


def _read(line: bytes) -> dict[str, Any] | None:
    """The record that ``_line`` wrote; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    check = record.pop(_CHECK, None)
    return record if check == crc32(json.dumps(record).encode()) else None


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old = found.get("request", {})
    keys = [key for key in wanted if old.get(key) != wanted[key]]
    return ", ".join(f"{key}: {old.get(key)!r} there, {wanted[key]!r} here" for key in keys[:3]) or "unknown"
