"""Damaged and hostile files by the hundred thousand: each is read or refused with a message, and nothing else happens.

What is tried and what is allowed stands in ``tests/hostile.py``; a case is a name and a number, and ``--case
"NAME:NUMBER"`` runs one again.
"""

from __future__ import annotations

import argparse
import logging
import math
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from common import HERE, MIB, Goal, Result, conditions, parser, record, work_folder

sys.path.insert(0, str(HERE.parent / "tests"))

import hostile

CASES = 100_000
LIMIT = 60  # seconds of one case
MEMORY = 512  # MiB that all cases of a target may add


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError after so long."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def peak() -> float:
    """Largest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def tried(name: str, numbers: range, folder: Path, found: list[dict[str, str]]) -> dict[str, Any]:
    """The cases of a target: how many were read and refused, and what it took."""
    box = hostile.Sandbox(folder / name.replace(" ", "-"), hostile.TARGETS[name])
    for number in range(numbers.start, numbers.start + 3):  # what is imported and cached at first
        outcome(box, name, number)
        box.restore()
    before, started, outcomes = peak(), time.perf_counter(), Counter[str]()
    for number in numbers:
        what = outcome(box, name, number)
        if what not in ("read", "refused"):
            found.append({"case": f"{name}:{number}", "what": what})
            what = "failed"
        outcomes[what] += 1
        box.restore()
    seconds = time.perf_counter() - started
    return {**outcomes, "s": round(seconds, 1), "mib_more": round(peak() - before)}


def outcome(box: hostile.Sandbox, name: str, number: int) -> str:
    """``read``, ``refused``, or what went wrong and where."""
    try:
        with within(LIMIT):
            return box.try_one(Random(f"{name}:{number}"))
    except Exception as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "secateur" in f.filename]
        where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        return f"{type(error).__name__}{where}: {' '.join(str(error).split())[:160]}"


def main() -> None:
    """All targets in turn, each with its share of the cases."""
    options = parser(__doc__ or "")
    options.add_argument("--cases", type=int, default=CASES, help="of all targets together")
    options.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    options.add_argument("--case", help="run this one and show what comes out")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")  # of what bad files hold
    logging.disable(logging.CRITICAL)
    with work_folder(arguments.work) as folder:
        if arguments.case:
            show(arguments.case, folder)
            return
        run(arguments, folder)


def show(case: str, folder: Path) -> None:
    """One case again, its traceback included."""
    name, _, number = case.rpartition(":")
    box = hostile.Sandbox(folder / "box", hostile.TARGETS[name])
    print(box.try_one(Random(f"{name}:{int(number)}")))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """All targets; prints as it goes."""
    cases = 200 if arguments.small else arguments.cases
    where, found = conditions(), list[dict[str, str]]()
    whole = sum(target.share for target in hostile.TARGETS.values())
    figures: dict[str, Any] = {}
    for name, target in hostile.TARGETS.items():
        count = max(3, math.ceil(cases * target.share / whole))
        figures[name] = tried(name, range(arguments.first, arguments.first + count), folder, found)
        print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    done = sum(sum(each.get(key, 0) for key in ("read", "refused", "failed")) for each in figures.values())
    more = max(each["mib_more"] for each in figures.values())
    failed = f"{len(found)} of {done:,} failed" if found else f"{done:,}: all of them"
    goals = [
        Goal("bad files that are read, or refused with a message, and touch nothing else", "all", failed, not found),
        Goal("memory that the cases of one kind of file add", f"< {MEMORY} MiB", f"{more} MiB", more < MEMORY),
    ]
    if not arguments.small:
        goals.insert(0, Goal("cases", f">= {CASES:,}", f"{done:,}", done >= CASES))
    notes = [f"a case that takes more than {LIMIT} s has failed; seeds from {arguments.first}"]
    record(
        Result("fuzz", "damaged and hostile files", where, goals, {**figures, "failures": found[:20]}, notes),
        arguments.small,
    )


if __name__ == "__main__":
    main()
