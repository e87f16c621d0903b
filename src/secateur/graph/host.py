"""What a network lives in: the one thing in which front ends differ. A module is one, an ONNX file another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, Self

from torch import Tensor

from secateur.graph.blocks import Block, Depth
from secateur.graph.ir import Network, Value
from secateur.graph.spaces import Gone, Graph

Literal = tuple[str, str, bool]
"""An attribute by the class of its module and its name, and whether its number follows the channels."""
Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a network is run on: one tensor, positional arguments, or arguments by name."""


class Bench(Protocol):
    """A stirred copy of a network, on which cuts are tried against masks."""

    @property
    def graph(self) -> Graph:
        """Its channels."""

    def compare(self, gone: Gone, literals: Collection[Literal] = ()) -> tuple[str, frozenset[Literal]]:
        """Why cut and mask differ, empty where they agree; and what may be true of attributes that may hold a size."""

    def unsound(self, depth: Depth, blocks: Sequence[Block]) -> str:
        """Why the network without some blocks differs from the whole one in whose run their sums are overwritten by the
        shortcuts; empty where it does not.
        """


class Host(Protocol):
    """A network with its numbers; nothing here changes it."""

    @property
    def network(self) -> Network:
        """Its operations; their values are the words for everything that a run computes."""

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name in ``network.state``."""

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same network with some tensors of the state replaced by others of the same shape.

        Args:
            tensors: by name, under any of its names if it has several.
        """

    def run(
        self, inputs: Batch, watch: Collection[Value] = (), instead: Mapping[Value, Value] | None = None
    ) -> tuple[list[Tensor], dict[Value, Tensor]]:
        """Run once, as at evaluation.

        Args:
            inputs: like the example inputs; sizes that the network leaves open may differ.
            watch: values of the network that are wanted.
            instead: for values that one operation makes, the one of its tensors that is taken in their place.

        Returns:
            The outputs in the order of ``network.outputs``, and the watched values.
        """

    def runner(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> Callable[[], object]:
        """A call that runs the network without some units once on the example inputs, as in use; for measuring time."""

    def bench(self, graph: Graph, seed: int = 0) -> Bench:
        """A stirred copy for trying cuts."""

    def cut(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> Any:
        """The smaller network, in the form in which this one was given."""

    def bypassed(self, depth: Depth, blocks: Sequence[Block]) -> Self:
        """The network without some blocks; everything else is shared with this one.

        Args:
            depth: what the network can do without.
            blocks: some of these, of which a bench says nothing bad.
        """
