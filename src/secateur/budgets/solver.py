"""Solve a target for one size: the reachable value whose cost is nearest."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from torch import Tensor

from secateur.budgets.costs import Costs
from secateur.budgets.path import SizesPath
from secateur.budgets.ranking import GlobalRanking
from secateur.budgets.targets import Target
from secateur.errors import InternalError, RequestError, refuse
from secateur.families import Architecture, Kind, Layout, Sizes, resized
from secateur.families.limits import grain, problems, refusals

Latency = Callable[[Sizes], float]
_LARGEST_STEP = 0.01  # of all parameters
_FIXED_GAP = 0.005  # of all parameters, between a target and what a fixed pattern leaves


@dataclass
class Budget:
    """A request against one architecture; a method asks it for the size it may keep.

    Attributes:
        architecture: dense architecture.
        costs: its cost functions.
        targets: what shall remain; each is met, the smallest solution wins.
        quantum: sizes are multiples of it; None chooses (see ``quantum_of``).
        largest_quantum: cap of the chosen quantum, 8 on a CPU and 64 on a GPU.
        tolerance: largest accepted gap as a share of what is there; None: any that rounding to the nearest leaves.
        itemsize: bytes of a weight.
        layout: what the output may look like.
        latency: seconds of a forward pass at given sizes, measured; called for latency targets only.
    """

    architecture: Architecture
    costs: Costs
    targets: tuple[Target, ...]
    itemsize: int
    quantum: int | None = None
    largest_quantum: int = 8
    tolerance: float | None = None
    layout: Layout = "native"
    latency: Latency | None = None
    gap: float = field(default=0.0, init=False)

    @property
    def sizes(self) -> Sizes:
        return self.architecture.sizes

    def _cost(self, target: Target) -> Callable[[Sizes], float]:
        if target.measure == "latency":
            if self.latency is None:
                raise InternalError("no-latency", f"target {target}", "this budget was made without a latency meter")
            return self.latency
        cost: Callable[[Sizes], float] = getattr(self.costs, target.measure)
        return cost

    def quantum_of(self, kind: Kind) -> int:
        """Multiple that sizes of ``kind`` keep to: as asked, else the largest power of two whose step is <= 1 %."""
        if kind in ("experts", "kv", "heads", "blocks"):
            return 1
        if self.quantum is not None:
            return self.quantum
        present = self.sizes.size(kind)
        step = self.costs.params(self.sizes) - self.costs.params(self.sizes.resized(kind, present - 1))
        quantum = 1
        while quantum < self.largest_quantum and 2 * quantum * step <= _LARGEST_STEP * self.costs.params(self.sizes):
            quantum *= 2
        return quantum

    def reachable(self, kind: Kind, base: Sizes) -> list[int]:
        """Sizes of ``kind`` that the quantum and the layout admit, ascending."""
        reasons = refusals(self.architecture, kind, self.layout)
        if reasons:
            other = " or --layout per-layer" if self.layout == "native" and not self._refused_anyway(kind) else ""
            refuse(
                "not-native" if self.layout == "native" else "not-exact",
                f"a smaller {kind} size in the {self.layout} layout",
                "; ".join(reasons),
                f"choose another space, e.g. --set spaces=ffn where the method has it{other}",
            )
        present = base.size(kind)
        quantum = self.quantum_of(kind)
        candidates = [n for n in range(1, present) if n % quantum == 0] + [present]
        return [n for n in candidates if not self.problems(base.resized(kind, n))]

    def _refused_anyway(self, kind: Kind) -> bool:
        return bool(refusals(self.architecture, kind, "per-layer"))

    def problems(self, sizes: Sizes) -> list[str]:
        """Why the layout does not admit these sizes (empty: it does)."""
        return problems(self.architecture, sizes, self.itemsize, self.layout)

    def solve(self, kind: Kind, base: Sizes | None = None) -> Sizes:
        """Sizes with the reachable ``kind`` whose cost is nearest to the target (ties: the smaller).

        Args:
            kind: the size to solve for.
            base: sizes to start from, e.g. with the head untied; the dense ones when omitted.

        Raises:
            RequestError: the target lies outside what is reachable, or the gap exceeds the tolerance.
        """
        start = base or self.sizes
        candidates = [start.resized(kind, n) for n in self.reachable(kind, start)]
        if not candidates:
            refuse("not-native", f"another {kind} size", "the stock configuration admits none", "lower --quantum")
        solutions = [self._nearest(target, candidates, kind, kind) for target in self.targets]
        return min(solutions, key=lambda sizes: sizes.size(kind))

    def solve_along(self, sizes_at: Callable[[float], Sizes], what: str) -> Sizes:
        """The sizes nearest to the target on a path of sizes from the smallest to the largest.

        Args:
            sizes_at: sizes at a share from 0 to 1, along which every cost grows.
            what: is cut, for messages.

        Raises:
            RequestError: as ``solve``.
        """
        return self.solve_among(_Path(sizes_at), what)

    def solve_among(self, candidates: Sequence[Sizes], what: str) -> Sizes:
        """The sizes nearest to the target among some, the smallest first.

        Args:
            what: is cut, for messages.

        Raises:
            RequestError: as ``solve``.
        """
        solutions = [self._nearest(target, candidates, what) for target in self.targets]
        return min(solutions, key=self.costs.params)

    def step(self, kind: Kind) -> int:
        """What sizes of ``kind`` are multiples of."""
        return math.lcm(self.quantum_of(kind), grain(self.architecture, kind, self.itemsize))

    def met(self, sizes: Sizes) -> bool:
        """Whether no more has to go than what ``sizes`` are without."""
        return all(self._cost(target)(sizes) <= target.of(self._cost(target)(self.sizes)) for target in self.targets)

    def rounded(self, kind: Kind, wanted: float, full: int) -> int:
        """The reachable size nearest to one wanted of the ``full`` units of a block: at least one step, at most all."""
        step = self.step(kind)
        return full if wanted >= full else min(full, max(step, round(wanted / step) * step))

    def solve_ranked(
        self, scores: Mapping[Kind, Mapping[str, Tensor]], keep: float | None = None, base: Sizes | None = None
    ) -> Sizes:
        """Sizes of every block from one ranking of all units of some kinds, nearest to the target.

        Args:
            scores: one number per unit, comparable over all of them, by space, by kind.
            keep: share of all units that stays, instead of the target.
            base: sizes to start from.

        Raises:
            RequestError: as ``solve``, or in the native layout, which has one size for all blocks.
        """
        if self.layout == "native":
            asked = "one ranking over all blocks in the native layout"
            refuse("not-native", asked, "stock classes give all blocks one size", "--layout per-layer")
        start = base or self.sizes
        grains = {}
        for kind in scores:
            self.reachable(kind, start)  # refuses what the layout cannot hold
            grains[kind] = self.step(kind)
        candidates = GlobalRanking(start, scores, grains)
        if keep is not None:
            return candidates[int(keep * (len(candidates) - 1))]
        solutions = [self._nearest(target, candidates, " and ".join(scores)) for target in self.targets]
        return min(solutions, key=self.costs.params)

    def _nearest(self, target: Target, candidates: Sequence[Sizes], what: str, kind: Kind | None = None) -> Sizes:
        cost = self._cost(target)
        present = cost(self.sizes)
        wanted = target.of(present)
        # costs grow with the size, so a bisection finds the two neighbours; a latency is measured a few times only
        above = bisect.bisect_left(candidates, wanted, key=cost)
        neighbours = candidates[max(above - 1, 0) : above + 1]
        best = min(neighbours, key=lambda sizes: (abs(cost(sizes) - wanted), cost(sizes)))
        reached, index = cost(best), max(above - 1, 0) + neighbours.index(best)
        self.gap = (reached - wanted) / present
        beside = [cost(candidates[i]) for i in (index - 1, index + 1) if 0 <= i < len(candidates)]
        step = max((abs(other - reached) for other in beside), default=0.0)
        nearest = f"the nearest is {_number(reached)} ({reached / present:.1%})"
        nearest += "" if kind is None else f" at {kind} {best.size(kind)}"
        lowest, highest = cost(candidates[0]), cost(candidates[-1])
        if wanted < lowest - step / 2 or wanted > highest + step / 2:
            reach = f"cutting {what} reaches from {lowest / present:.1%} to {highest / present:.1%} of {target.measure}"
            asked = f"{target.measure} {_number(wanted)} ({wanted / present:.1%} of what is there)"
            refuse("out-of-reach", asked, f"{reach}; {nearest}")
        if self.tolerance is not None and abs(self.gap) > self.tolerance:
            found = f"{nearest}, a gap of {abs(self.gap):.2%}, above the tolerance of {self.tolerance:.2%}"
            raise RequestError(
                "out-of-tolerance", f"{target.measure} {_number(wanted)}", found, "raise --tolerance or lower --quantum"
            )
        return best

    def behind(self, sizes: Sizes) -> Budget:
        """The same amounts that shall remain, asked of the model at other sizes."""
        targets = tuple(replace(t, fraction=None, absolute=t.of(self._cost(t)(self.sizes))) for t in self.targets)
        return replace(self, architecture=resized(self.architecture, sizes, layout=self.layout), targets=targets)

    def part(self, share: float) -> Budget:
        """A share of what shall go."""

        def less(target: Target) -> Target:
            present = self._cost(target)(self.sizes)
            return replace(target, fraction=None, absolute=present - share * (present - target.of(present)))

        return self if share == 1 else replace(self, targets=tuple(map(less, self.targets)))

    def weights(self, prunable: int) -> int:
        """How many of some single weights may stay: what the targets leave when the others all do.

        Args:
            prunable: weights that can become zero one by one.

        Raises:
            RequestError: a target that zeros do not reach, or that asks for more of them than can go.
        """
        return min(self._weights_for(target, prunable) for target in self.targets)

    def require_weights(self, prunable: int, kept: int, what: str) -> None:
        """Refuse targets that are not what a rule for single weights leaves.

        Args:
            prunable: weights that can become zero one by one.
            kept: how many of them the rule keeps.
            what: the rule, for messages.
        """
        present = self.costs.params(self.sizes)
        for target in self.targets:
            self.gap = (kept - self._weights_for(target, prunable)) / present
            allowed = _FIXED_GAP if self.tolerance is None else self.tolerance
            if abs(self.gap) > allowed:
                reach = f"{what} leaves {1 - (prunable - kept) / present:.2%} of all parameters"
                hint = "leave --ratio out: the pattern is the size"
                refuse("out-of-tolerance", f"target {target}", f"{reach}, a gap of {abs(self.gap):.2%}", hint)

    def _weights_for(self, target: Target, prunable: int) -> int:
        if target.measure not in ("params", "block_params"):
            found = f"zeros change nothing about {target.measure}"
            refuse("bad-target", f"target {target} of single weights", found, "--ratio, or a method that removes units")
        present = self._cost(target)(self.sizes)
        gone = round(present - target.of(present))
        if gone < 0:
            found = f"only {present:,.0f} are there before any weight goes"
            refuse("out-of-reach", f"target {target}", found, "a lower target, or less that goes before")
        kept = prunable - gone
        if not 0 < kept <= prunable:
            reach = f"only {prunable:,} of {present:,.0f} can become zero"
            most = f"{target.measure} from {present - prunable:,.0f} to {present:,.0f}"
            hint = most if target.fraction is None else f"a ratio below {prunable / present:.4g}"
            refuse("out-of-reach", f"target {target}", reach, hint)
        return kept

    def at(self, kind: Kind, size: int, base: Sizes | None = None) -> Sizes:
        """Sizes with a given ``kind``, for the paper's own knob; refused where the stock class does not admit it."""
        sizes = (base or self.sizes).resized(kind, size)
        reasons = self.problems(sizes) if size >= 1 else [f"{kind} {size} leaves nothing"]
        if reasons:
            refuse("out-of-reach", f"{kind} {size}", "; ".join(reasons))
        return sizes


class _Path(SizesPath):
    """Points of a path of sizes, computed when asked for."""

    _POINTS = 4097

    def __init__(self, sizes_at: Callable[[float], Sizes]) -> None:
        self._at = cache(lambda index: sizes_at(index / (self._POINTS - 1)))

    def __len__(self) -> int:
        return self._POINTS

    def point(self, index: int) -> Sizes:
        return self._at(index)


def _number(value: float) -> str:
    """A count with thousands separated, or a small measure with its leading digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
