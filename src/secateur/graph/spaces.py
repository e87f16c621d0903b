"""From merged atoms to spaces: which units there are, and where each lies in the state."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis, Classes
from secateur.graph.closures import closed_sets
from secateur.graph.costs import Costs
from secateur.graph.ir import Network, Operation, Value
from secateur.graph.memory import Memory
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
        classes: the atoms' classes that go with each unit, in order.
        flags: operators that take a statistic over it: removing is not the same as zeroing there.
        topology: names of the entries without their numbers: spaces with the same are alike.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    classes: Sequence[Axis]
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
        steps: for every module, the classes of the axes that its operations see, each array once.
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
        return self._named[name]

    def draw(self, path: str | Path) -> Path:
        """Write a drawing of the operations with the spaces in colours: ``.svg``, or ``.dot`` for Graphviz."""
        from secateur.graph.drawing import draw

        return draw(self, path)

    @cached_property
    def memory(self) -> Memory:
        """Bytes of the network, exactly, as functions of what goes."""
        return Memory(self.network, self.values)

    @cached_property
    def _named(self) -> dict[str, ChannelSpace]:
        return {space.name: space for space in self.spaces}

    def gone(self, units: Mapping[str, Sequence[int]]) -> Gone:
        """Which atoms go when some units of some spaces do."""
        gone = np.zeros(self.atoms, dtype=bool)
        for name, chosen in units.items():
            classes = self.space(name).classes
            if len(chosen):
                gone[np.concatenate([classes[unit] for unit in chosen])] = True
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
    flagged = _Flags(run, classes)
    groups = (*_plain_groups(entries, classes), *_composite_groups(entries, classes))
    spaces = [_space(entries, group, raw, network, run, flagged) for group in groups]
    spaces.sort(key=lambda space: (entries.order[space.entries[0].name], space.entries[0].dim, space.name))
    values: dict[Value, tuple[Axis, ...]] = {network.state[name]: found for name, found in axes.items()}
    steps: dict[str, dict[int, Axis]] = defaultdict(dict)
    for step in network.operations:
        seen = steps[step.place]
        for value in (*step.inputs.values(), *step.outputs):
            if value not in values:
                values[value] = tuple(classes.of(axis) for axis in run.axes(value))
            for axis in values[value]:
                seen[id(axis)] = axis
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
        {place: tuple(found.values()) for place, found in steps.items()},
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
    """All positions of all axes of the state, sorted by their class.

    Attributes:
        keys, order: name and dimension of every axis; number of every name.
        root: the class of every entry, ascending; those of one class as in the state.
        place: where each lies among all positions of all axes, one after the other.
        owner, position: the axis of every place, and the position in it.
    """

    def __init__(self, axes: Mapping[str, tuple[Axis, ...]]) -> None:
        self.keys = [(name, dim) for name, found in axes.items() for dim in range(len(found))]
        self.order = {name: number for number, name in enumerate(axes)}
        flat = [axis for found in axes.values() for axis in found]
        sizes = np.array([len(axis) for axis in flat], dtype=np.int64)
        root = np.concatenate(flat) if flat else np.zeros(0, dtype=np.int64)
        self.owner = np.repeat(np.arange(len(flat)), sizes)
        self.position = np.arange(len(root)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        free = np.flatnonzero(root)
        self.place = free[np.argsort(root[free], kind="stable")]
        self.root = root[self.place]

    def of(self, classes: Axis) -> tuple[Axis, Axis]:
        """Places of all entries of some classes, class by class, and how many each has."""
        start = np.searchsorted(self.root, classes, "left")
        count = np.searchsorted(self.root, classes, "right") - start
        return self.place[np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())], count


@dataclass
class _Group:
    """Units alike: their classes, and of all entries the owner of each column and the positions [units, columns]."""

    classes: Sequence[Axis]
    owner: Axis
    positions: NDArray[np.int64]


def _plain_groups(entries: _Entries, classes: Classes) -> Iterator[_Group]:
    """Units of one class that stands in no link."""
    plain = ~classes.linked(entries.root)
    root, place = entries.root[plain], entries.place[plain]
    start = np.flatnonzero(np.diff(root, prepend=-1))
    for units, owner, positions in _alike(entries, place, start, np.zeros_like(start)):
        members: Sequence[Axis] = root[start[units]][:, None]  # type: ignore[assignment]
        yield _Group(members, owner, positions)


def _composite_groups(entries: _Entries, classes: Classes) -> Iterator[_Group]:
    """Units around one factor of a product: slabs, and all that goes with them."""
    batches = list(closed_sets(classes))
    units = [unit for batch in batches for unit in batch]
    if not units:
        return
    batch = np.repeat(np.arange(len(batches)), [len(found) for found in batches])
    unit = np.repeat(np.arange(len(units)), [len(found) for found in units])
    place, count = entries.of(np.concatenate(units))
    unit, total = np.repeat(unit, count), len(entries.owner)
    sorted_ = np.sort(unit * total + place)  # of every unit, in the order of the state
    unit, place = np.divmod(sorted_, total)
    start = np.flatnonzero(np.diff(unit, prepend=-1))
    present = unit[start]  # units without any entry in the state are none
    for chosen, owner, positions in _alike(entries, place, start, batch[present]):
        yield _Group([units[number] for number in present[chosen].tolist()], owner, positions)


def _alike(entries: _Entries, place: Axis, start: Axis, batch: Axis) -> Iterator[tuple[Axis, Axis, NDArray[np.int64]]]:
    """Units of one batch with entries in the same axes, in the order of their positions.

    Args:
        place: entries of all units, those of one after the other, each in the order of the state.
        start: where each unit begins.
        batch: the batch of every unit.

    Yields:
        Units, the axes of their entries [columns], and the positions in them [units, columns].
    """
    if not len(start):
        return
    count = np.diff(start, append=len(place))
    mixed = _mix(entries.owner[place])
    keys = (np.add.reduceat(mixed * mixed, start), np.add.reduceat(mixed, start), count, batch)
    order = np.lexsort(keys)
    breaks = np.flatnonzero(np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)) + 1
    for units in sorted(np.split(order, breaks), key=lambda group: (batch[group[0]], group[0])):
        where = place[start[units][:, None] + np.arange(count[units[0]])]
        positions = entries.position[where]
        first = np.argsort(positions[:, 0], kind="stable")
        if not np.diff(positions[first, 0]).all():  # units that overlap
            first = np.lexsort(positions.T[::-1])
        yield units[first], entries.owner[where[0]], positions[first]


def _space(
    entries: _Entries,
    group: _Group,
    raw: Mapping[str, Sequence[Axis]],
    network: Network,
    run: Propagation,
    flagged: _Flags,
) -> ChannelSpace:
    found = []
    starts = np.flatnonzero(np.diff(group.owner, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(group.owner)], strict=True):
        name, dim = entries.keys[group.owner[start]]
        kind = network.state[name].kind
        roles: frozenset[Role] = frozenset({"buffer"}) if kind == "buffer" else run.roles(raw[name][dim])
        index = group.positions[:, start:end]
        found.append(Entry(name, dim, index, roles or frozenset({"producer"}), kind == "parameter"))
    made = next((entry for entry in found if "producer" in entry.roles and entry.parameter), found[0])
    taken = made.index.shape[1]
    name = made.name.removesuffix(".weight") + (f"+{taken}" if taken > 1 else "")
    flags = flagged.over(group.classes)
    return ChannelSpace(name, len(group.classes), tuple(found), group.classes, flags)


class _Flags:
    """Statistics, by the classes of their axes."""

    def __init__(self, run: Propagation, classes: Classes) -> None:
        self._marked = np.zeros(len(classes), dtype=bool)
        self._texts: dict[bytes, tuple[Axis, set[str]]] = {}
        for flag in run.flags:
            axis = classes.of(flag.axis)
            if axis.any():
                self._marked[axis] = True
                _, texts = self._texts.setdefault(axis.tobytes(), (axis, set()))
                texts.add(f"{flag.op} ({flag.place})" if flag.place else flag.op)
        self._marked[0] = False

    def over(self, units: Sequence[Axis]) -> tuple[str, ...]:
        """What statistics are taken over some units."""
        if not self._texts:
            return ()
        classes = units.ravel() if isinstance(units, np.ndarray) else np.concatenate(units)
        hit = classes[self._marked[classes]]
        if not len(hit):
            return ()
        mine = np.zeros(len(self._marked), dtype=bool)
        mine[hit] = True
        return tuple(sorted(set().union(*(texts for axis, texts in self._texts.values() if mine[axis].any()))))


def _mix(numbers: Axis) -> NDArray[np.uint64]:
    """A fixed scrambling of small integers (splitmix64), so that sums of them tell sets apart."""
    mixed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found
