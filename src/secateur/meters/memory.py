"""Peak anonymous resident memory of this process, sampled."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup/memory.peak")


class MemoryWatch:
    """Samples the anonymous resident memory every 20 ms while it is entered.

    Mapped files (safetensors, activations on disk) are not counted: the system may drop them at any time. Where /proc
    is missing, the peak resident set size is given instead.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Anonymous resident memory now."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cgroup_peak() -> int | None:
    """Peak memory of the control group, files included; None where the system does not say."""
    try:
        return int(_CGROUP.read_text())
    except (OSError, ValueError):
        return None


def available_bytes() -> int:
    """Memory that can still be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**33
