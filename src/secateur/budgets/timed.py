"""Channels chosen so that a measured latency is met: cut networks are timed beside the uncut one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from torch import Tensor

from secateur.budgets.channels import Units
from secateur.budgets.targets import Target
from secateur.errors import refuse

TOLERANCE: Final = 0.05
"""How far from the target a measured latency may at least be: what is timed is never met exactly."""
_TRIALS, _ROUNDS, _LEAST_SECONDS = 7, 15, 0.004
_NEARLY: Final = 1 - 1e-9
"""The way to a share of the FLOPs on which the nearest size will do."""

Run = Callable[[], object]
"""One run of a network on its example inputs."""


def relative_latency(
    whole: Run, small: Run, rounds: int = _ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one network as a share of another's: the median over rounds that run both, in alternating order.

    A round repeats each as often as it takes for a clock to tell, the same number of times for both.
    """
    small()
    repeats = max(1, round(_LEAST_SECONDS / max(min(_seconds(whole, 1, clock) for _ in range(2)), 1e-9)))
    found = []
    for number in range(rounds):
        order = [(0, whole), (1, small)][:: 1 if number % 2 else -1]
        took = dict(sorted((which, _seconds(run, repeats, clock)) for which, run in order))
        found.append(took[1] / took[0])
    return statistics.median(found)


def _seconds(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(repeats):
        run()
    return clock() - started


@dataclass
class Timed:
    """A choice of channels that meets latencies, by a search over the FLOPs that remain.

    Attributes:
        choose: meets shares of the FLOPs, or comes as near as it can.
        runner: what runs the network without some units, and, given none, the whole one.
        tolerance: how far the nearest may be from the target, at least :data:`TOLERANCE`.
        measured: what was timed last: the latency that remained, by the share of the FLOPs asked for.
        latency: what remained of the one that was chosen; None where no latency was asked for.
    """

    choose: Callable[[Mapping[str, Tensor], Target, float], Units]
    runner: Callable[[Units], Run]
    tolerance: float
    measured: dict[float, float] = field(default_factory=dict, init=False)
    latency: float | None = field(default=None, init=False)

    def __call__(self, scores: Mapping[str, Tensor], target: Target, way: float = 1.0) -> Units:
        """See :class:`secateur.methods.channels.Choose`.

        Raises:
            RequestError: the nearest latency that was measured is too far from the target; names it.
        """
        if target.measure != "latency":
            return self.choose(scores, target, way)
        assert target.fraction is not None
        wanted = 1 + way * (target.fraction - 1)
        if wanted == 1:
            return {}
        self.measured = {1.0: 1.0}
        tried: dict[float, Units] = {1.0: {}}
        whole, share = self.runner({}), wanted
        for _ in range(_TRIALS):
            units = self.choose(scores, replace(target, measure="flops", fraction=share), _NEARLY)
            if units in tried.values():
                break
            self.measured[share], tried[share] = relative_latency(whole, self.runner(units)), units
            if abs(self.measured[share] - wanted) <= TOLERANCE / 3:
                break
            share = self._next(wanted)
        best = min(tried, key=lambda share: (abs(self.measured[share] - wanted), share))
        if abs(self.measured[best] - wanted) > max(self.tolerance, TOLERANCE) and way >= 1:
            found = f"{self.measured[best]:.2f} of the latency, at {best:.2f} of the FLOPs"
            refuse(
                "target-out-of-reach",
                f"target {target}",
                f"the nearest that was measured is {found}",
                "ask for that, let more spaces be cut (options floor, statistics), or measure on a quiet machine",
            )
        self.latency = self.measured[best]
        return tried[best]

    def _next(self, wanted: float) -> float:
        """The share of the FLOPs to try next: between the two tried ones whose latencies lie around the wanted one."""
        slower = min((s for s, latency in self.measured.items() if latency > wanted), default=1.0)
        faster = max((s for s, latency in self.measured.items() if latency <= wanted and s < slower), default=0.0)
        if faster == 0.0:
            return slower / 2
        return round((slower + faster) / 2, 4)
