"""``secateur --help``: wall time of a fresh process, beside a Python that does nothing."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import Goal, Result, conditions, parser, record, secateur

GOAL = 0.3  # seconds


def seconds(command: Sequence[str]) -> float:
    """Wall time of one process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Ten processes of each, in turn, after one that warms the file cache."""
    arguments = parser(__doc__ or "").parse_args()
    rounds = 2 if arguments.small else 10
    where = conditions()
    script = shutil.which("secateur", path=str(Path(sys.executable).parent))
    command = [script, "--help"] if script else secateur("--help")
    bare = [sys.executable, "-c", "pass"]
    seconds(command)
    helps, passes = [], []
    for _ in range(rounds):
        helps.append(seconds(command))
        passes.append(seconds(bare))
    middle = statistics.median(helps)
    record(
        Result(
            "help",
            "time to the first answer",
            where,
            [Goal("`secateur --help`, median of 10 processes", f"< {GOAL} s", f"{middle:.3f} s", middle < GOAL)],
            {
                "slowest_s": round(max(helps), 3),
                "fastest_s": round(min(helps), 3),
                "python_c_pass_s": round(statistics.median(passes), 3),
            },
            ["as " + ("the installed command" if script else "`python -m secateur`") + ", output discarded"],
        ),
        arguments.small,
    )


if __name__ == "__main__":
    main()
