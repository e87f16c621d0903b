"""A network as operations on values, in words that belong to no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["parameter", "buffer", "input", "constant", "made"]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor.

    Attributes:
        shape: its sizes in the example run.
        kind: where it comes from; a ``constant`` is a tensor that no name reaches.
        name: of a parameter or buffer, as in the state dict.
        itemsize: bytes of an element.
    """

    shape: tuple[int, ...]
    kind: Kind = "made"
    name: str = ""
    itemsize: int = 4

    @property
    def is_state(self) -> bool:
        return self.kind in ("parameter", "buffer")


@dataclass(frozen=True, eq=False)
class Operation:
    """One step: an operator of :mod:`secateur.graph.rules`, or one without a rule under its own name.

    Attributes:
        op: name of the operator.
        inputs: its tensors by the names that the rule knows; lists of tensors under ``tensors``.
        outputs: what it makes.
        attrs: everything else that the rule needs.
        place: path of the module it stands in; in a file the name of what its node makes first.
        source: what the front end calls it.
        scope: path of the module it came from, where ``place`` is none and that is known.
    """

    op: str
    inputs: Mapping[str, Value]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    source: str = ""
    scope: str | None = None

    @property
    def path(self) -> str:
        """The module that it stands in, as far as anything tells."""
        return self.place if self.scope is None else self.scope


@dataclass
class Network:
    """Operations in the order of the run.

    Attributes:
        state: parameters and buffers that the run reads, by name.
        aliases: further names of one and the same tensor, by the name used here.
        transient: names in the state of what is not saved with the network.
    """

    operations: list[Operation] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    state: dict[str, Value] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transient: set[str] = field(default_factory=set)
