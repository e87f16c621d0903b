"""``prune`` by methods that leave out whole blocks of a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.budgets.channels import FLOPS_PER_MAC
from secateur.budgets.targets import Target
from secateur.errors import InternalError
from secateur.evidence.batches import Batches
from secateur.evidence.losses import Loss
from secateur.graph.blocks import Block, Depth
from secateur.graph.bypass import bypass, unsound
from secateur.graph.modules import ModuleBench, ModuleHost
from secateur.graph.spaces import build
from secateur.methods.blocks import BlockMethod, BlockStudy


@dataclass(frozen=True)
class Shallower:
    """A module without some of its blocks.

    Attributes:
        model: the smaller module.
        removed: names of the blocks that went, as keys.
        refused: blocks that could not go, with the reasons.
        achieved: what remains, and what there was.
    """

    model: nn.Module
    removed: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    achieved: Mapping[str, int]


def prune_blocks(
    host: ModuleHost,
    method: BlockMethod,
    target: Target,
    tolerance: float,
    batches: Batches | None,
    losses: Mapping[str, Loss],
    seed: int,
    inplace: bool,
    tick: Callable[[], Any],
) -> Shallower:
    """Find the blocks of a module, check each, let a method choose, check what it chose, and leave it out.

    Args:
        tick: called at the end of every part of the work: graph, verify, choose, mend, cut.
    """
    graph = build(host.network)
    depth = Depth(graph)
    tick()
    bench = host.bench(graph, seed)
    reasons = {block.name: unsound(bench, depth, [block]) for block in depth.blocks}
    refused = {name: reason for name, reason in reasons.items() if reason}
    tick()
    good = [block for block in depth.blocks if block.name not in refused]
    generator = torch.Generator().manual_seed(seed)
    study = BlockStudy(depth, good, host, generator, host.inputs, batches, losses)
    gone = _choose(study, bench, method, target, tolerance, refused)
    tick()
    tick()  # nothing is mended
    model = host.module if inplace else copy.deepcopy(host.module)
    bypass(model, depth, host.inputs, gone)
    tick()
    return Shallower(model, {block.name: () for block in gone}, refused, _achieved(depth, gone))


def _choose(
    study: BlockStudy,
    bench: ModuleBench,
    method: BlockMethod,
    target: Target,
    tolerance: float,
    refused: dict[str, str],
) -> tuple[Block, ...]:
    """Blocks that can go together; those that turn out not to are refused, and the method is asked again."""
    while True:
        gone = method.decide(study, target, tolerance)
        if not unsound(bench, study.depth, gone):
            return gone
        count = next(n for n in range(1, len(gone) + 1) if unsound(bench, study.depth, gone[:n]))
        reason, last = unsound(bench, study.depth, gone[:count]), gone[count - 1]
        if count < 2:
            raise InternalError("block-not-silenced", f"method {method.name}", reason, "nothing was changed")
        refused[last.name] = f"not together with others: {reason}"
        study = replace(study, blocks=[block for block in study.blocks if block is not last])


def _achieved(depth: Depth, gone: tuple[Block, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for suffix, blocks in (("", gone), ("_before", ())):
        params, macs = depth.remaining(blocks)
        found |= {f"params{suffix}": params, f"flops{suffix}": FLOPS_PER_MAC * macs}
    return found
