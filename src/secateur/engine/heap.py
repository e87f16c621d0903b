"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library, or a system without names for the own process
        return None


def give_back() -> None:
    """Return the free pages of the heap.

    glibc keeps freed tensors of up to 32 MiB in its heap, where those of the next block, of other sizes, do not fit: a
    walk over many blocks would grow by most of a matrix at each. Elsewhere nothing happens.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
