"""Learning gates: the loss of the gated network and a penalty on its size, down the gradient of the gates alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

from secateur.errors import refuse
from secateur.gates.estimators import Estimator, gate
from secateur.gates.generator import LogitGenerator
from secateur.gates.network import GatedNetwork
from secateur.gates.vectors import open_counts

Told = Callable[[int, float, float], None]
_DECAY = 0.05


class LearningOptions(BaseModel):
    """How gates are learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    estimator: Estimator = Field(
        "reinmax", description="gradient through the random gates: as the paper, or soft as its released code"
    )
    steps: PositiveInt = Field(500, description="steps of AdamW (paper: 10000)")
    rate: PositiveFloat = Field(1e-3, description="learning rate (paper: 1e-3, constant)")
    anneal: bool = Field(False, description="let the rate fall to zero along a cosine")
    pressure: PositiveFloat = Field(16.0, description="lambda, weight of the penalty on the size (paper: at least 6)")
    batch_tokens: PositiveInt = Field(2048, description="tokens of a step, at least one window (paper: 2048)")


def size_penalty(share: Tensor, wanted: float) -> Tensor:
    """log(max(T, p) / min(T, p)) of the share T of parameters that stays and the share p that shall."""
    return torch.log(share.clamp(min=1e-12) / wanted).abs()


def learn(
    network: GatedNetwork,
    ids: Tensor,
    wanted: float,
    options: LearningOptions,
    generator: torch.Generator,
    told: Told = lambda *_: None,
) -> dict[str, Tensor]:
    """Logits of all gates, by name, for a network that keeps about a share ``wanted`` of its gated parameters.

    Args:
        network: the frozen network.
        ids: [windows, tokens] to learn on.
        wanted: share of ``Gates.dense``.
        options: how.
        generator: of codes, noise and the order of windows.
        told: step, loss per token and share after each step.

    Raises:
        RequestError: the loss is not finite.
    """
    gates = network.gates
    source = LogitGenerator(list(gates.gates.values()), generator)
    source.to(next(network.model.parameters()).device)
    optimizer = torch.optim.AdamW(source.parameters(), lr=options.rate, weight_decay=_DECAY)
    rows = max(1, options.batch_tokens // ids.shape[1])
    order = torch.randperm(len(ids), generator=generator)
    with network.open(), torch.enable_grad():
        for step in range(options.steps):
            if len(order) < rows:
                order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
            windows, order = order[:rows], order[rows:]
            batch = ids[windows]
            drawn = {name: gate(logit, options.estimator, generator) for name, logit in source().items()}
            share = gates.params(open_counts({name: hard for name, (_, hard) in drawn.items()})) / gates.dense
            assert isinstance(share, Tensor)
            loss = network.loss(batch, {name: value for name, (value, _) in drawn.items()})
            if not torch.isfinite(loss):
                which = ", ".join(map(str, sorted(windows.tolist())[:8]))
                found = f"the loss of step {step} is not finite, on calibration windows {which}"
                refuse("not-finite", "learning the gates", found, "--dtype float32")
            optimizer.zero_grad()
            (loss + options.pressure * size_penalty(share, wanted)).backward()  # type: ignore[no-untyped-call]
            if options.anneal:
                for group in optimizer.param_groups:
                    group["lr"] = options.rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
            optimizer.step()
            told(step, float(loss.detach()), float(share.detach()))
    with torch.no_grad():
        return {name: logit.cpu() for name, logit in source().items()}


def fisher(network: GatedNetwork, ids: Tensor, told: Callable[[int], None] = lambda *_: None) -> dict[str, Tensor]:
    """Mean over windows of the squared gradient of each window's loss with respect to every gate, all being open.

    Nothing is learned: one backward pass per window (ours).
    """
    device = next(network.model.parameters()).device
    ones = {name: torch.ones(g.size, device=device, requires_grad=True) for name, g in network.gates.gates.items()}
    sums = {name: torch.zeros(len(values), dtype=torch.float64) for name, values in ones.items()}
    with network.open(), torch.enable_grad():
        for index in range(len(ids)):
            found = torch.autograd.grad(network.loss(ids[index : index + 1], ones), list(ones.values()))
            for total, gradient in zip(sums.values(), found, strict=True):
                total += gradient.double().cpu().square() / len(ids)
            told(index)
    return sums
