"""What a method is that leaves out whole residual branches of any network: a score for each, in every round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets.blocks import Amounts
from secateur.budgets.channels import counted
from secateur.budgets.targets import Target
from secateur.budgets.timed import TOLERANCE
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
        amounts: what remains of the network without some blocks.
        blocks: those that may still go.
        generator: the only source of randomness.
        example: inputs that it was recorded on.
        batches: calibration data; None where none was given.
        losses: by name, of outputs and labels.
        gone: what went already.
    """

    amounts: Amounts
    blocks: Sequence[Block]
    generator: torch.Generator
    example: Batch
    batches: Iterable[Example] | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    gone: tuple[Block, ...] = ()

    @property
    def depth(self) -> Depth:
        """What the network can do without."""
        return self.amounts.depth

    @property
    def host(self) -> Host:
        """The network with its numbers; it is not changed."""
        return self.amounts.host

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
    per_cost: bool = Field(
        False, description="divide scores by what a block costs in the target's measure, of a latency in FLOPs"
    )

    def require_no_gradients(self) -> None:
        """Refuse options that need gradients, which only modules have."""

    def score(self, study: BlockStudy) -> list[float]:
        """One number for each of ``study.blocks``; higher = keep."""
        raise NotImplementedError

    def decide(self, study: BlockStudy, target: Target, tolerance: float) -> tuple[Block, ...]:
        """Blocks that go: in every round the one with the lowest score, until what remains is no more than the target.

        What is counted only gets nearer to the target or stays (a peak of memory falls with the last of several
        blocks); then those come back without which it is as near. A latency is measured after every round, and the
        nearest is taken.

        Raises:
            RequestError: the nearest is too far from the target; names it.
        """
        measure, timed = target.measure, target.measure == "latency"
        full = study.amounts(measure, ())
        wanted, stages = target.of(full), Counter(block.stage for block in study.blocks)

        def off(gone: Sequence[Block]) -> float:
            return abs(study.amounts(measure, gone) - wanted)

        def serves(block: Block) -> bool:
            return timed or off((*study.gone, block)) <= off(study.gone)

        tried = [study.gone]
        while study.amounts(measure, study.gone) > wanted:
            free = [block for block in study.blocks if self._may_go(study, block, stages)]
            if not any(map(serves, free)):
                break
            worth = dict(zip(study.blocks, self._worth(study, target), strict=True))
            study = study.without(next(block for block in sorted(free, key=worth.__getitem__) if serves(block)))
            tried.append(study.gone)
        gone = min(tried, key=off)
        for block in () if timed else reversed(gone):  # some may have gone for nothing
            rest = tuple(other for other in gone if other is not block)
            gone = rest if off(rest) <= off(gone) else gone
        if off(gone) > (max(tolerance, TOLERANCE) if timed else tolerance) * full:
            kept = [] if any(self._may_go(study, block, stages) for block in study.blocks) else study.blocks
            refuse(
                "target-out-of-reach",
                f"target {target}",
                f"whole blocks come to {study.amounts(measure, gone) / full:.3f} of the {measure}"
                + (f", and {len(kept)} more are kept for their stages" if kept else ""),
                "ask for that, a larger tolerance, or let more blocks go (option keep)"
                + (", or measure on a quiet machine" if timed else ""),
            )
        return gone

    def _may_go(self, study: BlockStudy, block: Block, stages: Mapping[tuple[int, ...], int]) -> bool:
        """Whether enough others stay in its stage; ``stages`` says how many there were."""
        left = sum(other.stage == block.stage for other in study.without(block).blocks)
        return left >= min(self.keep, stages[block.stage])

    def _worth(self, study: BlockStudy, target: Target) -> list[float]:
        """Scores of ``study.blocks``, divided by costs where that is asked for."""
        scores = self.score(study)
        if not self.per_cost:
            return scores
        measure = counted(target).measure
        present = study.amounts(measure, study.gone)
        saved = [present - study.amounts(measure, (*study.gone, block)) for block in study.blocks]
        return [score / max(amount, 1) for score, amount in zip(scores, saved, strict=True)]
