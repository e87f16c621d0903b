"""Residual branches of a network: what is added to a value that it was computed from, and can be left out whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from secateur.graph.ir import Network, Operation, Value
from secateur.graph.spaces import Graph

_ADDITIONS: Final = frozenset({"add", "add_", "Add", "Sum"})
"""What the front ends call an addition of tensors."""


@dataclass(frozen=True, eq=False)
class Block:
    """A branch beside an identity shortcut: without it, the sum is the shortcut.

    Attributes:
        name: path of the module that it fills, or of the largest part of it.
        step: position of the addition among the operations.
        shortcut, branch, out: the value that stays, what is added to it, their sum.
        region: positions of the operations that serve the branch alone.
        parameters: names of the parameters that these alone read.
        params: their elements.
        macs: their multiply-accumulates on the example inputs.
    """

    name: str
    step: int
    shortcut: Value
    branch: Value
    out: Value
    region: frozenset[int]
    parameters: tuple[str, ...]
    params: int
    macs: int

    @property
    def stage(self) -> tuple[int, ...]:
        """Sizes of the stream it is added to: blocks of one stage have the same."""
        return self.out.shape

    def inside(self, other: Block) -> bool:
        """Whether it goes with another one."""
        return self.step in other.region


class Depth:
    """What a network can do without.

    Attributes:
        graph: its channels, and what its operations cost.
        blocks: all branches that add to a value which they were computed from, in the order of the run. Blocks may
            lie in others.
        work: multiply-accumulates of every operation.
        unused: positions of operations that nothing reads.

    The sum has the sizes of the shortcut, so that everything behind it can read the shortcut instead. Where sizes
    change (down-sampling, projected shortcuts), neither operand was computed from the other, and there is no block.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._flow = flow = _Flow(graph.network)
        self.unused = frozenset(flow.dead)
        counted: dict[Operation, int] = defaultdict(int)
        for step, count in zip(graph.charged, graph.costs.each_macs(graph.gone({})).tolist(), strict=True):
            counted[step] += count
        self.work = [counted[step] for step in flow.steps]
        found = []
        for number, (shortcut, branch) in flow.sums():
            region = flow.serving(number, branch)
            own = flow.owned(region, graph.network)
            params, macs = _elements(own), sum(self.work[i] for i in region)
            if params or macs:
                out, names = flow.steps[number].outputs[0], tuple(value.name for value in own)
                found.append(Block("", number, shortcut, branch, out, frozenset(region), names, params, macs))
        called = _names(found, flow.steps)
        self.blocks = tuple(replace(block, name=name) for name, block in zip(called, found, strict=True))

    def remaining(self, gone: Sequence[Block]) -> tuple[int, int]:
        """Parameters and multiply-accumulates without some blocks."""
        lost = sum(self.work[i] for i in self._steps(gone))
        return self.graph.parameters() - _elements(self._owned(gone)), sum(self.work) - lost

    def lost(self, gone: Sequence[Block]) -> set[str]:
        """Names of the parameters that go with some blocks."""
        return {value.name for value in self._owned(gone)}

    def _steps(self, gone: Sequence[Block]) -> set[int]:
        return {number for block in gone for number in block.region}

    def _owned(self, gone: Sequence[Block]) -> list[Value]:
        return self._flow.owned(self._steps(gone), self.graph.network)

    def by_module(self) -> Mapping[str, set[int]]:
        """Positions of the operations that run in every module, those of its parts included."""
        found: dict[str, set[int]] = defaultdict(set)
        for number, step in enumerate(self._flow.steps):
            path = step.path
            while path:
                found[path].add(number)
                path = path.rpartition(".")[0]
        return found


def outermost(blocks: Sequence[Block]) -> list[Block]:
    """Those that lie in no other one."""
    return [block for block in blocks if not any(block.inside(other) for other in blocks)]


def shortcuts(blocks: Sequence[Block]) -> dict[Value, Value]:
    """The sums of some blocks, and what stands for each without them."""
    return {block.out: block.shortcut for block in outermost(blocks)}


def _elements(values: Sequence[Value]) -> int:
    return sum(int(np.prod(value.shape)) for value in values)


class _Flow:
    """Who reads what, and what was computed from what."""

    def __init__(self, network: Network) -> None:
        self.steps = network.operations
        self.users: dict[Value, list[int]] = defaultdict(list)
        for number, step in enumerate(self.steps):
            for value in dict.fromkeys(step.inputs.values()):
                self.users[value].append(number)
        self._outputs = set(network.outputs)
        self._sources: dict[Value, int] = {}
        """Ancestors of a value, itself included, as bits."""
        self._bits: dict[Value, int] = {}
        for value in network.inputs:
            self._born(value, 0)
        for step in self.steps:
            before = 0
            for value in step.inputs.values():
                before |= self._sources.get(value, 0)
            for value in step.outputs:
                self._born(value, before)
        self.dead: set[int] = set()
        for number in range(len(self.steps) - 1, -1, -1):
            if self._only(self.steps[number], self.dead):
                self.dead.add(number)

    def _born(self, value: Value, before: int) -> None:
        self._bits[value] = 1 << len(self._bits)
        self._sources[value] = before | self._bits[value]

    def _only(self, step: Operation, readers: Collection[int]) -> bool:
        """Whether nothing else reads what a step makes."""
        return all(v not in self._outputs and all(i in readers for i in self.users[v]) for v in step.outputs)

    def owned(self, steps: Collection[int], network: Network) -> list[Value]:
        """Parameters that some operations read and no others."""
        parameters = (value for value in network.state.values() if value.kind == "parameter")
        return [value for value in parameters if (users := set(self.users[value])) and users <= set(steps)]

    def sums(self) -> Iterator[tuple[int, tuple[Value, Value]]]:
        """Additions of two values of one shape of which one was computed from the other: (shortcut, branch)."""
        for number, step in enumerate(self.steps):
            pair = list(step.inputs.values())
            if step.source not in _ADDITIONS or len(pair) != 2 or number in self.dead:
                continue
            if pair[0] is pair[1] or {pair[0].shape, pair[1].shape} != {step.outputs[0].shape}:
                continue
            for shortcut, branch in (pair, pair[::-1]):
                if self._bits.get(shortcut, 0) & self._sources.get(branch, 0):
                    yield number, (shortcut, branch)

    def serving(self, step: int, branch: Value) -> set[int]:
        """Operations before an addition that serve one of its operands alone."""
        if branch in self._outputs or set(self.users[branch]) - self.dead != {step}:
            return set()
        region: set[int] = set()
        near = {number for number in self.dead if number < step}
        for number in range(step - 1, -1, -1):
            one = self.steps[number]
            if number in self.dead:
                continue
            readers = {i for value in one.outputs for i in self.users[value]} - self.dead
            own = readers <= region | ({step} if branch in one.outputs else set())
            if readers and own and self._only(one, region | near | readers):
                region.add(number)
        makes = {value for number in region for value in self.steps[number].outputs}
        for number in sorted(near):  # what is computed from it and read by nobody goes along
            if any(value in makes for value in self.steps[number].inputs.values()):
                region.add(number)
                makes |= set(self.steps[number].outputs)
        return region


def _names(blocks: Sequence[Block], steps: Sequence[Operation]) -> list[str]:
    """The module in which the addition stands where it holds one branch only, else the part with most operations."""
    holders = [_common([steps[block.step].path, *(steps[i].path for i in block.region)]) for block in blocks]
    found: list[str] = []
    for block, holder in zip(blocks, holders, strict=True):
        name = holder
        if holders.count(holder) > 1 or not holder:
            depth = len(holder.split(".")) + 1 if holder else 1
            parts = [".".join(steps[i].path.split(".")[:depth]) for i in sorted(block.region)]
            inner = [part for part in parts if len(part) > len(holder)]
            name = max(dict.fromkeys(inner), key=inner.count) if inner else holder
        name = name or "network"
        found.append(name if name not in found else f"{name}#{sum(n.split('#')[0] == name for n in found) + 1}")
    return found


def _common(places: Sequence[str]) -> str:
    """The deepest module that holds all of some places."""
    split = [place.split(".") if place else [] for place in places]
    found = []
    for level in zip(*split, strict=False):
        if len(set(level)) > 1:
            break
        found.append(level[0])
    return ".".join(found)
