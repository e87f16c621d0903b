"""``prune`` by methods that leave out whole blocks of any network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from secateur.budgets.channels import FLOPS_PER_MAC
from secateur.budgets.targets import Target
from secateur.errors import InternalError
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
        depth: what it can do without.
        gone: blocks that go.
        refused: blocks that could not go, with the reasons.
        notes: nothing; methods of blocks say nothing of how they decided.
    """

    depth: Depth
    gone: tuple[Block, ...]
    refused: Mapping[str, str]
    notes: Mapping[str, Any] = field(default_factory=dict)

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
        """What remains, and what there was."""
        found: dict[str, float] = {}
        for suffix, blocks in (("", self.gone), ("_before", ())):
            params, macs = self.depth.remaining(blocks)
            found |= {f"params{suffix}": params, f"flops{suffix}": FLOPS_PER_MAC * macs}
        return found


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
    study = BlockStudy(depth, good, host, generator, example, batches, losses)
    gone = _choose(study, bench, method, target, tolerance, refused)
    tick()
    tick()  # nothing is mended
    return BlockDecision(depth, gone, refused)


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
        count = next(n for n in range(1, len(gone) + 1) if bench.unsound(study.depth, gone[:n]))
        reason, last = bench.unsound(study.depth, gone[:count]), gone[count - 1]
        if count < 2:
            raise InternalError("block-not-silenced", f"method {method.name}", reason, "nothing was changed")
        refused[last.name] = f"not together with others: {reason}"
        study = replace(study, blocks=[block for block in study.blocks if block is not last])
