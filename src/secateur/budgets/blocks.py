"""What remains of a network without some of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from secateur.budgets.channels import FLOPS_PER_MAC, remaining
from secateur.budgets.timed import Run, relative_latency
from secateur.graph.blocks import Block, Depth, outermost
from secateur.graph.host import Host
from secateur.graph.spaces import Graph, build


class Amounts:
    """Every measure of a network without some blocks; what was found once is not looked for again.

    Parameters and FLOPs are those of the operations that stay. For bytes and activation the network without the blocks
    is read anew, and for a latency it is timed beside the whole one.

    Args:
        depth: what the network can do without.
        host: the network; it is not changed.
    """

    def __init__(self, depth: Depth, host: Host) -> None:
        self.depth, self.host = depth, host
        self._known: dict[tuple[str, frozenset[Block]], float] = {}

    def __call__(self, measure: str, gone: Sequence[Block]) -> float:
        """What remains of a measure without some blocks; of the latency, as a share of the whole network's."""
        key = measure, frozenset(outermost(gone))
        if key not in self._known:
            self._known[key] = self._found(measure, gone)
        return self._known[key]

    def graph(self, gone: Sequence[Block]) -> Graph:
        """The channels and costs of the network without some blocks."""
        return build(self.host.bypassed(self.depth, gone).network) if gone else self.depth.graph

    def _found(self, measure: str, gone: Sequence[Block]) -> float:
        if measure in ("params", "flops"):
            params, macs = self.depth.remaining(gone)
            return params if measure == "params" else FLOPS_PER_MAC * macs
        if measure == "latency":
            return relative_latency(self._whole, self._runner(self.host.bypassed(self.depth, gone))) if gone else 1.0
        return remaining(self.graph(gone), measure, {})

    @cached_property
    def _whole(self) -> Run:
        return self._runner(self.host)

    def _runner(self, host: Host) -> Run:
        graph = self.depth.graph
        return host.runner(graph, graph.gone({}))
