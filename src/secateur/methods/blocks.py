"""What a method is that leaves out whole residual branches of any network: a score for each, in every round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets.channels import FLOPS_PER_MAC
from secateur.budgets.targets import Target
from secateur.errors import refuse
from secateur.evidence.batches import Example
from secateur.evidence.losses import Loss
from secateur.graph.blocks import Block, Depth, shortcuts
from secateur.graph.host import Batch, Host
from secateur.graph.ir import Value
from secateur.methods.base import Named


@dataclass(frozen=True)
class BlockStudy:
    """What such a method may look at.

    Attributes:
        depth: what the network can do without.
        blocks: those that may still go.
        host: the network with its numbers; it is not changed.
        generator: the only source of randomness.
        example: inputs that it was recorded on.
        batches: calibration data; None where none was given.
        losses: by name, of outputs and labels.
        gone: what went already.
    """

    depth: Depth
    blocks: Sequence[Block]
    host: Host
    generator: torch.Generator
    example: Batch
    batches: Iterable[Example] | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    gone: tuple[Block, ...] = ()

    @cached_property
    def present(self) -> Host:
        """The network without what went already."""
        return self.host.bypassed(self.depth, self.gone)

    def run(self, inputs: Batch, without: Sequence[Block] = (), watch: Sequence[Value] = ()) -> Any:
        """Outputs and watched values of the network without what went and some more; see ``Host.run``."""
        return self.host.run(inputs, watch, shortcuts((*self.gone, *without)))

    def data(self) -> Iterable[Example]:
        """The calibration data."""
        if self.batches is None:
            refuse("no-data", "calibration", "no data was given", "data=[batch, ...], each like example_inputs")
        return self.batches

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """All losses together."""
        return torch.stack([loss(outputs, labels) for loss in self.losses.values()]).sum()

    def cost(self, target: Target, gone: Sequence[Block]) -> int:
        """What remains of the target's measure without some blocks."""
        if target.measure not in ("params", "flops"):
            refuse("bad-target", f"target {target}", "blocks are measured in params and flops", "name one of these")
        params, macs = self.depth.remaining(gone)
        return params if target.measure == "params" else FLOPS_PER_MAC * macs

    def without(self, block: Block) -> Self:
        """The same after one more block went, and with it those that lie in it."""
        rest = [other for other in self.blocks if other is not block and not other.inside(block)]
        return replace(self, blocks=rest, gone=(*self.gone, block))


class BlockMethod(Named):
    """Base of the methods that leave out blocks, one in every round."""

    group: ClassVar[str] = "graph"

    keep: int = Field(
        1, ge=0, description="blocks that stay of every stage, that is among those whose streams have one size"
    )
    per_cost: bool = Field(False, description="divide scores by what a block costs in the target's measure")

    def require_no_gradients(self) -> None:
        """Refuse options that need gradients, which only modules have."""

    def score(self, study: BlockStudy) -> list[float]:
        """One number for each of ``study.blocks``; higher = keep."""
        raise NotImplementedError

    def decide(self, study: BlockStudy, target: Target, tolerance: float) -> tuple[Block, ...]:
        """Blocks that go, in order: the one with the lowest score in every round, as long as the target gets nearer.

        Raises:
            RequestError: the target is not reached; names the nearest.
        """
        full = study.cost(target, ())
        wanted, present = target.of(full), full
        stages = [block.stage for block in study.blocks]
        while True:
            open_ = []
            for block in study.blocks:
                left = sum(other.stage == block.stage for other in study.without(block).blocks)
                after = study.cost(target, (*study.gone, block))
                if left >= min(self.keep, stages.count(block.stage)) and abs(after - wanted) < abs(present - wanted):
                    open_.append((block, after))
            if not open_:
                break
            study = replace(study, blocks=study.blocks)
            scores = dict(zip(map(id, study.blocks), self.score(study), strict=True))
            worth = [scores[id(b)] / (max(present - after, 1) if self.per_cost else 1) for b, after in open_]
            block, present = open_[min(range(len(open_)), key=worth.__getitem__)]
            study = study.without(block)
        if abs(present - wanted) > tolerance * full:
            refuse(
                "target-out-of-reach",
                f"target {target}",
                f"whole blocks come to {present / full:.3f} of the {target.measure}",
                "ask for that, a larger tolerance, or let more blocks go (option keep)",
            )
        return study.gone
