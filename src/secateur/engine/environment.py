"""What torchrun and its like say to the processes that they start. Imports nothing heavy."""

from __future__ import annotations

import os


def place_in_environment() -> tuple[int, int]:
    """Number of this process and of all (``RANK``, ``WORLD_SIZE``); 0 of 1 where nobody says."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0, 1
    return (rank, count) if 0 <= rank < count else (0, 1)


def leave_environment() -> None:
    """Be a process of its own, as will be those that this one starts."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
