"""Winning tickets made of layers (arXiv:2301.10835): whole residual blocks removed, before training or after."""

from __future__ import annotations

from typing import Final, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import refuse
from secateur.evidence.flow import synaptic_flow
from secateur.evidence.gradients import Slope, module_of
from secateur.graph.host import Batch, Host
from secateur.graph.ir import Value
from secateur.graph.modules import ModuleHost
from secateur.graph.state import shadow
from secateur.methods.base import Data
from secateur.methods.blocks import BlockMethod, BlockStudy
from secateur.scores.similarity import linear_cka

_BY_GRADIENTS: Final = ("grasp", "snip", "synflow")


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

    def require_no_gradients(self) -> None:
        if self.criterion in _BY_GRADIENTS:
            found, hint = "it needs gradients, which only modules have", "--set criterion=l1|cka|kl, or random"
            refuse("no-gradients", f"criterion={self.criterion} on an ONNX file", found, hint)

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
            names = {name for block in study.blocks for name in block.parameters} - study.depth.lost(study.gone)
            return {name: study.host.tensor(name).detach().abs() for name in names}
        host = study.present if self.norms == "stored" else _live(study.present, study.example)
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


def _live(host: Host, example: Batch) -> Host:
    """A module whose batch norms have no statistics of their own, so that they take the batch's."""
    found = shadow(module_of(host))
    for part in found.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return ModuleHost(found, example)


def _seen(study: BlockStudy, inputs: object, features: Value | None, *without: object) -> Tensor:
    outputs, watched = study.run(inputs, without, () if features is None else (features,))  # type: ignore[arg-type]
    tensors: list[Tensor] = outputs if features is None else [watched[features]]
    found = next((tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim > 1), None)
    if found is None:
        shapes = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
        refuse("no-scores", "scores of real numbers, by sample", f"the outputs are {shapes}", "--set criterion=l1")
    return found


def _last_read(study: BlockStudy) -> Value:
    """What the last multiplication with weights reads."""
    step = [step for step in study.depth.graph.charged if any(v.is_state for v in step.inputs.values())][-1]
    return next(value for value in step.inputs.values() if not value.is_state)


def _divergence(dense: Tensor, other: Tensor) -> float:
    """KL of class scores [batch, classes, ...] in nats, mean over the rest; of logits, or what a softmax made."""
    p, q = (x.double().movedim(1, -1).flatten(0, -2) for x in (dense, other))
    if all(bool((x >= 0).all()) and torch.allclose(x.sum(-1), x.new_ones(()), atol=1e-3) for x in (p, q)):
        p, q = (x.clamp_min(torch.finfo(torch.float32).tiny).log() for x in (p, q))
    p, q = (functional.log_softmax(x, -1) for x in (p, q))
    return float(functional.kl_div(q, p, reduction="batchmean", log_target=True))
