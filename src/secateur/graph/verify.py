"""Masked == cut: what a cut network computes against the uncut one with the same units silenced.

Both run with all parameters stirred, so that zeros, ones and tiny scales of an initialisation hide nothing. What a
network lives in makes the trials (:class:`secateur.graph.host.Bench`); which to make, and what follows, is said here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from secateur.graph.host import Bench, Literal
from secateur.graph.spaces import ChannelSpace

TOLERANCE: Final = 1e-8
_MADE_GOOD: Final = ("layer_norm", "group_norm", "rms_norm")
"""Statistics that the silenced network takes over what stays."""
SINGLE: Final = "a single unit"
"""Why a space of one is left alone."""
_TURNS: Final = 12
"""Guesses about attributes, for spaces alike."""


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        sound: names of spaces whose cut computes the same as their mask.
        refused: reasons, by name of a space.
        literals: what had to be settled of attributes that may hold a size.
    """

    sound: tuple[str, ...]
    refused: Mapping[str, str]
    literals: frozenset[Literal]


def verify(bench: Bench, seed: int = 0) -> Verdict:
    """Try some units of every space of a bench, those alike together, then all together."""
    graph = bench.graph
    refused: dict[str, str] = {}
    rest: list[ChannelSpace] = []
    for space in graph.spaces:
        bad = [flag for flag in space.flags if not flag.startswith(_MADE_GOOD)]
        if bad:
            refused[space.name] = f"a statistic over it changes: {bad[0]}" + (
                f" and {len(bad) - 1} more" if bad[1:] else ""
            )
        elif space.size < 2:
            refused[space.name] = SINGLE
        else:
            rest.append(space)
    trial = _Trial(bench, np.random.default_rng(seed))
    if rest and trial(rest):
        alike: dict[Any, list[ChannelSpace]] = {}
        for space in rest:
            alike.setdefault(space.topology, []).append(space)
        good: list[ChannelSpace] = []
        for group in alike.values():
            reason = trial(group)
            if not reason:
                good += group
            refused.update({space.name: reason for space in group if reason})
        rest = trial.largest(good, refused)
    return Verdict(tuple(space.name for space in rest), refused, frozenset(trial.literals))


def faults(bench: Bench, units: Mapping[str, Sequence[int]], literals: Collection[Literal]) -> dict[str, str]:
    """Spaces whose chosen units cannot be cut as they are, with the reasons; spaces alike are tried together."""
    graph, alike = bench.graph, dict[Any, dict[str, Sequence[int]]]()
    for name, chosen in units.items():
        alike.setdefault(graph.space(name).topology, {})[name] = chosen
    found: dict[str, str] = {}
    for group in alike.values():
        if reason := bench.compare(graph.gone(group), literals)[0]:
            found |= dict.fromkeys(group, reason)
    return found


class _Trial:
    """Cuts of some units of each of some spaces; remembers what it had to settle of attributes."""

    def __init__(self, bench: Bench, generator: np.random.Generator) -> None:
        self._bench, self._generator = bench, generator
        self.literals: set[Literal] = set()

    def __call__(self, spaces: Sequence[ChannelSpace]) -> str:
        """Why the cut is wrong, empty where it is right."""
        return self.of({space.name: self._some(space.size) for space in spaces}, {s.topology for s in spaces})

    def _some(self, size: int) -> list[int]:
        """A few units, at most a third of them."""
        count = int(self._generator.integers(1, max(size // 3, 1) + 1))
        return [int(unit) for unit in self._generator.choice(size, count, replace=False)]

    def of(self, units: Mapping[str, Sequence[int]], topologies: Collection[Any]) -> str:
        """Why the cut of these very units is wrong, empty where it is right."""
        gone = self._bench.graph.gone(units)
        if self._bench.graph.costs.smallest(gone) < 1:
            return "an axis would be empty"
        reason, doubtful = self._bench.compare(gone, self.literals)
        if reason and len(topologies) > 1:
            return reason  # attributes are settled where spaces alike are tried
        settled = {literal[:2] for literal in self.literals}
        for one in sorted(literal for literal in doubtful if literal[:2] not in settled)[:_TURNS] if reason else ():
            if not self._bench.compare(gone, {*self.literals, one})[0]:
                self.literals.add(one)
                return ""
        return reason

    def largest(self, spaces: list[ChannelSpace], refused: dict[str, str]) -> list[ChannelSpace]:
        """Spaces that can be cut together; those that cannot are refused, by halves."""
        reason = self(spaces) if spaces else ""
        if not reason:
            return spaces
        if len(spaces) == 1:
            refused[spaces[0].name] = reason
            return []
        half = len(spaces) // 2
        first, second = self.largest(spaces[:half], refused), self.largest(spaces[half:], refused)
        both = self([*first, *second]) if first and second else ""
        if both:
            refused.update({space.name: f"not together with others: {both}" for space in second})
            return first
        return [*first, *second]


def difference(wanted: Sequence[Tensor], found: Sequence[Tensor], tolerance: float = TOLERANCE) -> str:
    """What is unequal, empty if nothing is."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return "the outputs have other shapes"
    worst = max(map(relative_difference, wanted, found), default=0.0)
    return "" if worst <= tolerance else f"the outputs differ by {worst:.1e} of the largest"


def relative_difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a share of the largest value; infinite if not a number."""
    if not wanted.numel():
        return 0.0
    worst = float((wanted - found).abs().max()) / max(float(wanted.abs().max()), 1e-12)
    return worst if worst == worst else float("inf")


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
