"""Runs prunes in several processes, forked from one that has imported everything: ``several.py COUNT FILE``.

FILE names the prunes as JSON: ``requests``, ``kill`` (a process and how many runs of a block it lives) and ``stop``
(the same, with SIGSTOP). Prints the exit status of every process; 77 is one that outlived all others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds after the first end in which all others must end


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def main(count: int, content: dict[str, Any]) -> list[int]:
    import secateur.api.pruning
    import secateur.engine.team  # noqa: F401

    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    children = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os._exit(work(rank, content))
        children.append(pid)
    return wait(children)


def wait(children: list[int]) -> list[int]:
    """Exit status of every child, those killed that do not end in time."""
    found: dict[int, int] = {}
    first = None
    while len(found) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            found[pid] = os.waitstatus_to_exitcode(status)
            first = first or time.monotonic()
        if first is not None and time.monotonic() - first > PATIENCE:
            for child in set(children) - set(found):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                found[child] = 77
        time.sleep(0.02)
    return [found[pid] for pid in children]


def work(rank: int, content: dict[str, Any]) -> int:
    import torch

    import secateur
    from secateur.engine.walk import Walk
    from secateur.errors import SecateurError

    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if content.get(name, [None])[0] == rank:
            interrupt(Walk, content[name][1], number)
    try:
        for request in content["requests"]:
            result = secateur.prune(**request)
            if result.output != request["output"]:
                return 3
    except SecateurError as error:
        print(f"{rank}: {error.code}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def interrupt(walk: Any, after: int, number: int) -> None:
    """Send this process a signal at some run of a block."""
    run, seen = walk._load, [0]

    def ticking(*args: Any, **options: Any) -> Any:
        seen[0] += 1
        if seen[0] == after:
            os.kill(os.getpid(), number)
        return run(*args, **options)

    walk._load = ticking


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))))
