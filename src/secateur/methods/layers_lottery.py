"""Winning tickets made of layers (arXiv:2301.10835): whole residual blocks removed, before training or after."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from secateur.evidence.flow import synaptic_flow
from secateur.evidence.gradients import Slope
from secateur.graph.ir import Value
from secateur.graph.modules import ModuleHost
from secateur.graph.state import shadow
from secateur.methods.base import Data
from secateur.methods.blocks import BlockMethod, BlockStudy
from secateur.scores.similarity import linear_cka


class LayersLottery(BlockMethod):
    """Remove the block whose parameters, or whose effect, matter least; score again; what stays keeps its weights."""

    name = "layers_lottery"
    title = "When Layers Play the Lottery, all Tickets Win at Initialization"
    paper = "arXiv:2301.10835"

    criterion: Literal["grasp", "snip", "synflow", "l1", "cka", "kl", "random"] = Field(
        "grasp",
        description="what a block is worth: the sum over its parameters of GraSP, SNIP, SynFlow or absolute values; "
        "1 - CKA of what the last layer reads, or KL of the outputs, without it; or at random",
    )
    aggregation: Literal["sum", "mean"] = Field("sum", description="sum over a block's parameters, or their mean")
    norms: Literal["stored", "batch"] = Field(
        "stored", description="statistics of batch norms while gradients are taken: those of the module, or the batch's"
    )

    @property
    def data(self) -> Data:  # type: ignore[override]
        needs: dict[str, Data] = {"grasp": "labels", "snip": "labels", "cka": "inputs", "kl": "inputs"}
        return needs.get(self.criterion, "none")

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.criterion == "random"

    def score(self, study: BlockStudy) -> list[float]:
        if self.criterion == "random":
            return torch.rand(len(study.blocks), generator=study.generator).tolist()
        if self.criterion in ("cka", "kl"):
            return self._changes(study)
        worth = self._saliency(study)
        found = []
        for block in study.blocks:
            parts = [worth[name].double() for name in block.parameters if name in worth]
            total = float(sum(part.sum() for part in parts))
            found.append(total / max(sum(part.numel() for part in parts), 1) if self.aggregation == "mean" else total)
        return found

    def _saliency(self, study: BlockStudy) -> dict[str, Tensor]:
        """What every parameter that is left is worth."""
        if self.criterion == "l1":
            return {name: value.detach().abs() for name, value in study.module.named_parameters()}
        host = ModuleHost(study.module if self.norms == "stored" else _live(study.module), study.example)
        if self.criterion == "synflow":
            return synaptic_flow(host, study.example)
        slope = Slope(host, study.loss)
        mean = slope.mean(study.data())
        if self.criterion == "snip":
            return {name: (slope.point[name].detach() * each).abs() for name, each in mean.items()}
        return {name: slope.point[name].detach() * each for name, each in slope.along(mean, study.data()).items()}

    def _changes(self, study: BlockStudy) -> list[float]:
        """How far a network without a block is from the one with it, summed over the batches."""
        features = _last_read(study) if self.criterion == "cka" else None
        found = [0.0] * len(study.blocks)
        for batch in study.data():
            dense = _seen(study, batch.inputs, features)
            for number, block in enumerate(study.blocks):
                other = _seen(study, batch.inputs, features, block)
                found[number] += 1 - linear_cka(dense, other) if features is not None else _divergence(dense, other)
        return found


def _live(module: nn.Module) -> nn.Module:
    """The module with batch norms that have no statistics of their own, so that they take the batch's."""
    found = shadow(module)
    for part in found.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return found


def _seen(study: BlockStudy, inputs: object, features: Value | None, *without: object) -> Tensor:
    outputs, watched = study.run(inputs, without, () if features is None else (features,))  # type: ignore[arg-type]
    found: Tensor = next(t for t in outputs if t.is_floating_point()) if features is None else watched[features]
    return found


def _last_read(study: BlockStudy) -> Value:
    """What the last multiplication with weights reads."""
    step = [step for step in study.depth.graph.charged if any(v.is_state for v in step.inputs.values())][-1]
    return next(value for value in step.inputs.values() if not value.is_state)


def _divergence(dense: Tensor, other: Tensor) -> float:
    """KL of class scores [batch, classes, ...] in nats, mean over the rest."""
    p, q = (functional.log_softmax(x.double().movedim(1, -1).flatten(0, -2), -1) for x in (dense, other))
    return float(functional.kl_div(q, p, reduction="batchmean", log_target=True))
