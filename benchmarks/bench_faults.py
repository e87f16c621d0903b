"""Killed at random moments, and harmed in every other way that ``tests/faults.py`` knows: resumed or refused.

The kills are SIGKILL to real processes of the command line, at moments drawn over the time in which the command works
(one in five over its whole life, the start of the interpreter included); then the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import HERE, Goal, Result, conditions, parser, record, secateur, work_folder

sys.path.insert(0, str(HERE.parent / "tests"))

import torch

from disturbed import NAMES, Command, Garden, half_written, listing, untouched
from faults import faults
from processes import NotHereError
from secateur.engine.journal import work_folder as beside

KILLS = 50
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
_OUTPUT_EXISTS = "it exists already"
_RESUMED = re.compile("resuming the run|cells are done already")


@dataclass
class Watch:
    """Looks at an output all the time, from outside, while commands work on it."""

    command: Command
    out: Path
    straight: Any
    looks: int = 0
    wrong: set[str] = field(default_factory=set)

    def __enter__(self) -> Watch:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.looks += 1
            found = half_written(self.command, self.out, self.straight)
            if found:
                self.wrong.add(found)


def begin(command: Command, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    with log.open("wb") as errors:
        return subprocess.Popen(secateur(*command.on(out)), stdout=errors, stderr=errors, env=ENVIRONMENT)


def straight_times(command: Command, garden: Garden) -> tuple[float, float]:
    """Seconds of an undisturbed run, and those of it before the work folder appears."""
    folder = garden.place()
    started = time.perf_counter()
    process, begins = begin(command, folder / "out", folder / "log"), 0.0
    while process.poll() is None:
        if not begins and beside(folder / "out").exists():
            begins = time.perf_counter() - started
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, (folder / "log").read_text()
    assert listing(folder / "out") == garden.straight(command.name), "two undisturbed runs differ"
    return seconds, begins


def kill_once(command: Command, garden: Garden, times: tuple[float, float], chance: random.Random) -> dict[str, Any]:
    """One kill, the state after it, and the same command again."""
    folder = garden.place()
    out, log = folder / "out", folder / "log"
    straight, (whole, begins) = garden.straight(command.name), times
    anywhere = chance.random() < 0.2
    moment = chance.uniform(0, whole) if anywhere else chance.uniform(0, whole - begins)
    found: dict[str, Any] = {"after_s": round(moment, 3), "anywhere": anywhere, "wrong": []}
    with untouched(command.source), Watch(command, out, straight) as watch:
        process = begin(command, out, log)
        while not anywhere and process.poll() is None and not beside(out).exists():
            time.sleep(0.001)
        ends = time.perf_counter() + moment
        while process.poll() is None and time.perf_counter() < ends:
            time.sleep(0.001)
        process.kill()
        found["killed"] = process.wait() == -signal.SIGKILL
        found["left"] = "output" if out.exists() else "work" if beside(out).exists() else "nothing"
        again = begin(command, out, log)
        if again.wait() == 2 and out.exists() and _OUTPUT_EXISTS in log.read_text().replace("\n", " "):
            found["again"] = "it was finished: refused"
        elif again.returncode == 0:
            found["again"] = "resumed" if _RESUMED.search(log.read_text()) else "made"
        else:
            found["wrong"].append(f"exit {again.returncode}: {log.read_text()[-300:]}")
    found["looks"] = watch.looks
    found["wrong"] += sorted(watch.wrong)
    if not out.exists() or listing(out) != straight:
        found["wrong"].append("other bytes than those of an undisturbed run")
    if beside(out).exists() and found.get("again") != "it was finished: refused":
        found["wrong"].append("a work folder was left behind")
    return found


def kills(garden: Garden, count: int, seed: int) -> list[dict[str, Any]]:
    """Kills over all commands in turn."""
    chance, found = random.Random(seed), []
    times: dict[str, tuple[float, float]] = {}
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        command = garden.command(name)
        if name not in times:
            times[name] = straight_times(command, garden)
        one = {"command": name, **kill_once(command, garden, times[name], chance)}
        found.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
    return found


def all_faults(garden: Garden, short: bool) -> dict[str, str]:
    """What came of every fault."""
    found = {}
    for fault in faults():
        if short and not fault.short:
            continue
        try:
            found[str(fault)] = fault.make(garden)
        except NotHereError as reason:
            found[str(fault)] = f"not tried: {reason}"
        except Exception as error:
            found[str(fault)] = f"FAILED: {type(error).__name__}: {str(error)[:400]}"
        print(f"{fault}: {found[str(fault)]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Kills, then every other fault."""
    options = parser(__doc__ or "")
    options.add_argument("--kills", type=int, default=KILLS)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with work_folder(arguments.work) as folder:
        run(arguments, Garden(folder))


def run(arguments: argparse.Namespace, garden: Garden) -> None:
    """Everything; prints as it goes."""
    where = conditions()
    count = len(NAMES) if arguments.small else arguments.kills
    killed = kills(garden, count, arguments.seed)
    outcomes = all_faults(garden, arguments.small)
    wrong = [f"{each['command']} after {each['after_s']} s: {each['wrong']}" for each in killed if each["wrong"]]
    failed = [what for what, outcome in outcomes.items() if outcome.startswith("FAILED")]
    tried = [what for what, outcome in outcomes.items() if not outcome.startswith("not tried")]
    middle = sum(each["killed"] and each["left"] == "work" for each in killed)
    goals = [
        Goal(
            "kills after which the same command gives the bytes of an undisturbed run, the output absent or whole at "
            "every look, the source untouched",
            f"{count} of {count}",
            f"{count - len(wrong)} of {count} ({middle} of them in the middle of the work)",
            not wrong,
        ),
        Goal(
            "other faults that end in the same bytes or in a refusal with a message",
            "all",
            f"{len(tried) - len(failed)} of {len(tried)}",
            not failed,
        ),
    ]
    figures = {
        "kills": {
            name: {
                "left": dict(Counter(each["left"] for each in killed if each["command"] == name)),
                "again": dict(Counter(each.get("again", "failed") for each in killed if each["command"] == name)),
            }
            for name in NAMES
        },
        "looks_at_outputs": sum(each["looks"] for each in killed),
        "faults": outcomes,
        "wrong": wrong,
    }
    notes = [
        "llama of 3 blocks, random weights; prune: fasp with calibration and held-out text; compare: 4 cells, models "
        "kept; recover: LoRA; pack: bits back; pack sparse",
        f"seed {arguments.seed}; the output is looked at every 5 ms; a comparison's output is a journal that grows",
    ]
    record(Result("faults", "killed, filled up, changed, locked", where, goals, figures, notes), arguments.small)


if __name__ == "__main__":
    main()
