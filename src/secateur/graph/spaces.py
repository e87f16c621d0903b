"""From merged atoms to spaces: which units there are, and where each lies in the state."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis, Classes
from secateur.graph.closures import closed_sets
from secateur.graph.costs import Costs
from secateur.graph.ir import Network, Operation, Value
from secateur.graph.propagation import Fact, Parts, Propagation, Role

Gone = NDArray[np.bool_]
"""Which atoms go, by atom."""


@dataclass(frozen=True)
class Entry:
    """Where the units of a space lie in one axis of one tensor of the state.

    Attributes:
        name: in the state dict.
        dim: of that tensor.
        index: [units, positions of each].
        roles: what the axis is for: producer, consumer, norm, bias, scale, buffer.
        parameter: whether it is one (else a buffer).
    """

    name: str
    dim: int
    index: NDArray[np.int64]
    roles: frozenset[Role]
    parameter: bool


@dataclass(frozen=True, eq=False)
class ChannelSpace:
    """Interchangeable units of a network: coupled channels, heads, dimensions in a head.

    Attributes:
        name: the first tensor that makes it, ``+`` how many positions of it a unit takes where it is more than one.
        size: number of units.
        entries: where they lie in the state.
        classes: the atoms' classes that go with each unit.
        flags: operators that take a statistic over it: removing is not the same as zeroing there.
        topology: names of the entries without their numbers: spaces with the same are alike.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    classes: tuple[Axis, ...]
    flags: tuple[str, ...]

    @cached_property
    def topology(self) -> tuple[tuple[str, int, int], ...]:
        alike = {(re.sub(r"\d+", "#", entry.name), entry.dim, entry.index.shape[1] > 1) for entry in self.entries}
        return tuple(sorted(alike))


@dataclass(frozen=True, eq=False)
class Graph:
    """The coupled channels of a network.

    Attributes:
        network: what was run.
        spaces: what can be cut, in the order of the state.
        axes: classes of every axis of every tensor of the state, by name.
        facts: attributes that count an axis, with the axis' classes.
        lists: attributes that list the sizes of parts of an axis, likewise.
        costs: parameters and multiply-accumulates as functions of what goes.
        charged: the operation behind every term of the multiply-accumulates.
        values: classes of every axis of every tensor of the run.
        steps: by module, the classes of all axes that its operations see.
        unknown: operators without a rule, and the modules they stand in; they freeze what they touch.
    """

    network: Network
    spaces: tuple[ChannelSpace, ...]
    axes: Mapping[str, tuple[Axis, ...]]
    facts: tuple[Fact, ...]
    lists: tuple[Parts, ...]
    costs: Costs
    charged: tuple[Operation, ...]
    values: Mapping[Value, tuple[Axis, ...]]
    steps: Mapping[str, tuple[Axis, ...]]
    unknown: Mapping[str, tuple[str, ...]]
    atoms: int

    def space(self, name: str) -> ChannelSpace:
        """The space of a name."""
        return next(space for space in self.spaces if space.name == name)

    def gone(self, units: Mapping[str, Sequence[int]]) -> Gone:
        """Which atoms go when some units of some spaces do."""
        gone = np.zeros(self.atoms, dtype=bool)
        for name, chosen in units.items():
            space = self.space(name)
            for unit in chosen:
                gone[space.classes[unit]] = True
        return gone

    def parameters(self) -> int:
        """Elements of all parameters, shared ones once."""
        return self.costs.params(np.zeros(self.atoms, dtype=bool))

    def reachable(self, spaces: Sequence[ChannelSpace] | None = None) -> int:
        """Parameters that lie in some units of some spaces (by default all): an entry counts once."""
        gone = np.zeros(self.atoms, dtype=bool)
        for space in self.spaces if spaces is None else spaces:
            gone[np.concatenate(space.classes)] = True
        return self.parameters() - self.costs.params(gone)


def build(network: Network) -> Graph:
    """Apply the rules to a network and find its spaces."""
    run = Propagation()
    run.run(network)
    classes = run.atoms.classes()
    raw = {name: run.axes(value) for name, value in network.state.items()}
    axes = {name: tuple(classes.of(axis) for axis in found) for name, found in raw.items()}
    entries = _Entries(axes)
    flagged = _flags(run, classes)
    groups = (*_plain_groups(entries, classes), *_composite_groups(entries, classes))
    spaces = [_space(entries, group, raw, network, run, flagged) for group in groups]
    spaces.sort(key=lambda space: (entries.order[space.entries[0].name], space.entries[0].dim, space.name))
    values: dict[Value, tuple[Axis, ...]] = {network.state[name]: found for name, found in axes.items()}
    steps: dict[str, list[Axis]] = defaultdict(list)
    for step in network.operations:
        for value in (*step.inputs.values(), *step.outputs):
            if value not in values:
                values[value] = tuple(classes.of(axis) for axis in run.axes(value))
            steps[step.place] += values[value]
    for value in (*network.inputs, *network.outputs):
        values.setdefault(value, tuple(classes.of(axis) for axis in run.axes(value)))
    parameters = [axes[name] for name, value in network.state.items() if value.kind == "parameter"]
    facts = [Fact(fact.name, classes.of(fact.axis), fact.weight, fact.place) for fact in run.facts]
    return Graph(
        network,
        tuple(_distinct(spaces)),
        axes,
        tuple(facts),
        tuple(Parts(tuple(map(classes.of, parts.axes)), parts.place) for parts in run.lists),
        Costs(parameters, [[classes.of(axis) for axis in term] for term in run.costs]),
        tuple(run.charged),
        values,
        {place: tuple(found) for place, found in steps.items()},
        {op: tuple(dict.fromkeys(places)) for op, places in run.frozen_by.items()},
        len(classes),
    )


def _distinct(spaces: Sequence[ChannelSpace]) -> Iterator[ChannelSpace]:
    """Spaces with names that differ."""
    seen: dict[str, int] = defaultdict(int)
    for space in spaces:
        seen[space.name] += 1
        suffix = f"#{seen[space.name]}" if seen[space.name] > 1 else ""
        yield ChannelSpace(space.name + suffix, space.size, space.entries, space.classes, space.flags)


class _Entries:
    """All positions of all axes of the state, sorted by their class."""

    def __init__(self, axes: Mapping[str, tuple[Axis, ...]]) -> None:
        self.keys = [(name, dim) for name, found in axes.items() for dim in range(len(found))]
        self.order = {name: number for number, name in enumerate(axes)}
        flat = [axis for found in axes.values() for axis in found]
        sizes = [len(axis) for axis in flat]
        root = np.concatenate(flat) if flat else np.zeros(0, dtype=np.int64)
        owner = np.repeat(np.arange(len(flat)), sizes)
        position = np.concatenate([np.arange(n) for n in sizes]) if flat else root
        order = np.lexsort((position, owner, root))
        order = order[root[order] != 0]
        self.root, self.owner, self.position = root[order], owner[order], position[order]

    def of(self, classes: Axis) -> tuple[Axis, Axis]:
        """Owners and positions of all entries of some classes, sorted by owner, then position."""
        start = np.searchsorted(self.root, classes, "left")
        count = np.searchsorted(self.root, classes, "right") - start
        index = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
        owner, position = self.owner[index], self.position[index]
        order = np.lexsort((position, owner))
        return owner[order], position[order]


@dataclass
class _Group:
    """Units alike: their classes, and of all entries the owner of each column and the positions [units, columns]."""

    classes: list[Axis]
    owner: Axis
    positions: NDArray[np.int64]


def _plain_groups(entries: _Entries, classes: Classes) -> Iterator[_Group]:
    """Units of one class that stands in no link."""
    root = entries.root
    plain = ~classes.linked(root)
    root, owner, position = root[plain], entries.owner[plain], entries.position[plain]
    if not len(root):
        return
    found, start, count = np.unique(root, return_index=True, return_counts=True)
    mixed = _mix(owner)
    sums = np.stack([np.add.reduceat(mixed, start), np.add.reduceat(mixed * mixed, start), count.astype(np.uint64)], 1)
    _, first, kind = np.unique(sums, axis=0, return_index=True, return_inverse=True)
    for number in np.argsort(first):
        units = np.flatnonzero(kind.ravel() == number)
        columns = count[units[0]]
        index = start[units][:, None] + np.arange(columns)
        order = np.lexsort(position[index].T[::-1])
        yield _Group([found[[unit]] for unit in units[order]], owner[index[0]], position[index[order]])


def _composite_groups(entries: _Entries, classes: Classes) -> Iterator[_Group]:
    """Units around one factor of a product: slabs, and all that goes with them."""
    for batch in closed_sets(classes):
        alike: dict[bytes, list[tuple[Axis, Axis, Axis]]] = {}
        for members in batch:
            owner, position = entries.of(members)
            if len(owner):
                alike.setdefault(owner.tobytes(), []).append((members, owner, position))
        for units in alike.values():
            positions = np.stack([position for _, _, position in units])
            order = np.lexsort(positions.T[::-1])
            yield _Group([units[unit][0] for unit in order], units[0][1], positions[order])


def _space(
    entries: _Entries,
    group: _Group,
    raw: Mapping[str, Sequence[Axis]],
    network: Network,
    run: Propagation,
    flagged: Mapping[int, set[str]],
) -> ChannelSpace:
    found = []
    for owner in np.unique(group.owner):
        name, dim = entries.keys[owner]
        kind = network.state[name].kind
        roles: frozenset[Role] = frozenset({"buffer"}) if kind == "buffer" else run.roles(raw[name][dim])
        index = group.positions[:, group.owner == owner]
        found.append(Entry(name, dim, index, roles or frozenset({"producer"}), kind == "parameter"))
    made = next((entry for entry in found if "producer" in entry.roles and entry.parameter), found[0])
    taken = made.index.shape[1]
    name = made.name.removesuffix(".weight") + (f"+{taken}" if taken > 1 else "")
    flags = (
        {flag for atom in np.concatenate(group.classes).tolist() for flag in flagged.get(atom, ())}
        if flagged
        else set()
    )
    return ChannelSpace(name, len(group.classes), tuple(found), tuple(group.classes), tuple(sorted(flags)))


def _flags(run: Propagation, classes: Classes) -> dict[int, set[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    for flag in run.flags:
        for atom in np.unique(classes.of(flag.axis)).tolist():
            found[atom].add(f"{flag.op} ({flag.place})" if flag.place else flag.op)
    found.pop(0, None)
    return found


def _mix(numbers: Axis) -> NDArray[np.uint64]:
    """A fixed scrambling of small integers (splitmix64), so that sums of them tell sets apart."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found
