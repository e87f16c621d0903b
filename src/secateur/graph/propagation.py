"""One pass of the rules over a network, and what it leaves: the axes of all tensors, merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from secateur.graph.atoms import Atoms, Axis, frozen
from secateur.graph.ir import Network, Operation, Value

Axes = list[Axis]
Role = Literal["producer", "consumer", "norm", "bias", "scale", "buffer"]


@dataclass(frozen=True)
class Flag:
    """A statistic over an axis, which changes when something of the axis goes.

    Attributes:
        axis: what it is taken over.
        op, place: the operator, and where it stands.
    """

    axis: Axis
    op: str
    place: str


@dataclass(frozen=True)
class Fact:
    """A number that an attribute must follow: how much of an axis remains.

    Attributes:
        name: ``groups`` or ``num_groups``.
        axis: what is counted.
        weight: the parameter beside whose module the attribute lies; empty where there is none.
        place: the module it stands in.
    """

    name: str
    axis: Axis
    weight: str
    place: str


@dataclass(frozen=True)
class Parts:
    """A list of numbers that an attribute may hold: sizes of parts of an axis, in order."""

    axes: tuple[Axis, ...]
    place: str


@dataclass
class Propagation:
    """What the rules write to.

    Attributes:
        atoms: all atoms so far.
        costs: of every contraction, the axes whose sizes multiply to its multiplications.
        charged: the operation behind each of them.
        flags, facts, lists: see :class:`Flag`, :class:`Fact`, :class:`Parts`.
        frozen_by: operators without a rule, and where they stand.
    """

    atoms: Atoms = field(default_factory=Atoms)
    costs: list[Axes] = field(default_factory=list)
    charged: list[Operation] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    lists: list[Parts] = field(default_factory=list)
    frozen_by: dict[str, list[str]] = field(default_factory=dict)
    _axes: dict[Value, Axes] = field(default_factory=dict)
    _fixed: set[Value] = field(default_factory=set)
    _roles: dict[int, set[Role]] = field(default_factory=lambda: defaultdict(set))
    _step: Operation | None = None

    def axes(self, value: Value) -> Axes:
        """Axes of a tensor; those of the state may change, those of inputs and constants stay."""
        if value not in self._axes:
            self._axes[value] = [self.atoms.fresh(n) if value.is_state else frozen(n) for n in value.shape]
            if value.is_state:
                self._fixed.add(value)
        return self._axes[value]

    def role(self, value: Value, role: Role, dim: int | None = None) -> None:
        """Say what axes of a tensor of the state, or of one computed from the state alone, are for."""
        axes = self.axes(value)
        if value in self._fixed:
            for axis in axes if dim is None else axes[dim : dim + 1]:
                self._roles[id(axis)].add(role)

    def roles(self, axis: Axis) -> frozenset[Role]:
        """What was said of an axis."""
        return frozenset(self._roles.get(id(axis), ()))

    def macs(self, axes: Sequence[Axis]) -> None:
        """Count a contraction."""
        assert self._step is not None
        self.costs.append(list(axes))
        self.charged.append(self._step)

    def flag(self, axis: Axis, step: Operation, name: str = "") -> None:
        """Say that a statistic is taken over an axis, by the operator or by what it is called."""
        self.flags.append(Flag(axis, name or step.op, step.place))

    def fact(self, name: str, axis: Axis) -> None:
        """Say that an attribute of the present step's module counts an axis."""
        assert self._step is not None
        weight = self._step.inputs.get("weight")
        named = weight.name if weight is not None and weight.is_state else ""
        self.facts.append(Fact(name, axis, named, self._step.place))

    def parts(self, axes: Sequence[Axis]) -> None:
        """Say that a list of sizes names the parts of an axis."""
        assert self._step is not None
        self.lists.append(Parts(tuple(axes), self._step.place))

    def run(self, network: Network) -> None:
        """Apply the rules to every operation; what enters and leaves the network stays."""
        from secateur.graph.rules import RULES

        for step in network.operations:
            self._step = step
            if step.op not in RULES:
                self.frozen_by.setdefault(step.op, []).append(step.place)
            try:
                made = RULES.get(step.op, RULES["barrier"])(self, step)
            except (IndexError, KeyError, StopIteration, ValueError):
                made = []
            if [[len(axis) for axis in axes] for axes in made] != [list(value.shape) for value in step.outputs]:
                self.frozen_by.setdefault(step.source, []).append(
                    step.place
                )  # no wrong cut: what was misread is frozen
                for axes in made:
                    for axis in axes:
                        self.atoms.freeze(axis)
                made = RULES["barrier"](self, step)
            fixed = bool(step.inputs) and all(value in self._fixed for value in step.inputs.values())
            for value, axes in zip(step.outputs, made, strict=True):
                self._axes[value] = axes
                if fixed:
                    self._fixed.add(value)
        for value in [*network.inputs, *network.outputs]:
            for axis in self.axes(value):
                self.atoms.freeze(axis)
        for value in network.state.values():  # nothing is known of what the run did not read
            self._axes.setdefault(value, [frozen(size) for size in value.shape])
