"""``prune`` by methods that leave out whole blocks of any network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from secateur.api.telling import achieved_by, with_reasons
from secateur.budgets.blocks import Amounts
from secateur.budgets.targets import Target
from secateur.errors import InternalError, RequestError
from secateur.evidence.batches import Batches
from secateur.evidence.losses import Loss
from secateur.graph.blocks import Block, Depth
from secateur.graph.host import Batch, Bench, Host
from secateur.graph.spaces import Graph, build
from secateur.methods.blocks import BlockMethod, BlockStudy


@dataclass(frozen=True)
class BlockDecision:
    """What is to be left out of a network.

    Attributes:
        amounts: what remains of it without some blocks.
        gone: blocks that go.
        refused: blocks that could not go, with the reasons.
        latency: what was measured to remain of it, as a share; None where that was not asked for.
        notes: nothing; methods of blocks say nothing of how they decided.
    """

    amounts: Amounts
    gone: tuple[Block, ...]
    refused: Mapping[str, str]
    latency: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> Depth:
        return self.amounts.depth

    @property
    def graph(self) -> Graph:
        return self.depth.graph

    @property
    def removed(self) -> Mapping[str, tuple[int, ...]]:
        """Names of the blocks that go, as keys."""
        return {block.name: () for block in self.gone}

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Parameters of the blocks that go, and what stays of them."""
        return {block.name: (block.params, 0) for block in self.gone}

    @cached_property
    def achieved(self) -> Mapping[str, float]:
        """What remains of every measure, and what there was."""
        return achieved_by(self.amounts.graph(self.gone), {}, self.latency, self.graph)


def blocks_decided(
    host: Host,
    example: Batch,
    method: BlockMethod,
    target: Target,
    tolerance: float,
    batches: Batches | None,
    losses: Mapping[str, Loss],
    seed: int,
    tick: Callable[[], Any],
) -> BlockDecision:
    """Find the blocks of a network, check each, let a method choose, and check what it chose.

    Args:
        example: what the network was recorded on.
        tick: called at the end of every part of the work: graph, verify, choose, mend.

    Raises:
        RequestError: the target is out of reach, or the method cannot be used here.
        InternalError: without a block that was found sound the network computes something else.
    """
    graph = build(host.network)
    depth = Depth(graph)
    tick()
    bench = host.bench(graph, seed)
    reasons = {block.name: bench.unsound(depth, [block]) for block in depth.blocks}
    refused = {name: reason for name, reason in reasons.items() if reason}
    tick()
    good = [block for block in depth.blocks if block.name not in refused]
    generator = torch.Generator().manual_seed(seed)
    amounts = Amounts(depth, host)
    study = BlockStudy(amounts, good, generator, example, batches, losses)
    try:
        gone = _choose(study, bench, method, target, tolerance, refused)
    except RequestError as error:
        none = [] if depth.blocks else ["nothing is added to what it was computed from"]
        raise with_reasons(error, "blocks", refused.values(), none) from error
    tick()
    tick()  # nothing is mended
    latency = amounts("latency", gone) if target.measure == "latency" else None
    return BlockDecision(amounts, gone, refused, latency)


def _choose(
    study: BlockStudy,
    bench: Bench,
    method: BlockMethod,
    target: Target,
    tolerance: float,
    refused: dict[str, str],
) -> tuple[Block, ...]:
    """Blocks that can go together; those that turn out not to are refused, and the method is asked again."""
    while True:
        gone = method.decide(study, target, tolerance)
        if not bench.unsound(study.depth, gone):
            return gone
        found = ((n, bench.unsound(study.depth, gone[:n])) for n in range(1, len(gone) + 1))
        count, reason = next((n, reason) for n, reason in found if reason)
        last = gone[count - 1]
        if count < 2:
            raise InternalError("block-not-silenced", f"method {method.name}", reason, "nothing was changed")
        refused[last.name] = f"not together with others: {reason}"
        study = replace(study, blocks=[block for block in study.blocks if block is not last])
