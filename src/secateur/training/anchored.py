"""AdamR: Adam with decay towards the weights that training began with, so that what a fine-tune adds stays small.

Deltas that are small in mean and variance survive random pruning at high rates (DAREx-L2, arXiv:2410.09344).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor


class AdamR(torch.optim.AdamW):
    """Adam whose decoupled decay pulls towards the starting weights instead of towards zero.

    Before every Adam step, with v the mean over all parameters of the bias-corrected second moments of the gradients,

        w <- w - min(1, lr * strength / sqrt(v)) * (w - start)                (``l2``)
        w <- w - min(|w - start|, lr * strength / sqrt(v)) * sign(w - start)  (``l1``)

    so that decay keeps its proportion to Adam's steps whatever the scale of the gradients. Where v is nought, its root
    counts as one.

    Args:
        params: parameters or groups of them, as of any optimiser; a group may have a ``strength`` of its own, 0 for
            none.
        lr: learning rate.
        strength: of the decay.
        norm: ``l2``, or ``l1``, which sets small deltas to nought.
        betas, eps: of Adam.

    The starting weights are those at construction: build it before the first step, on the pretrained model. They take
    as much memory as the parameters. The state is Adam's, so schedulers and checkpoints work as ever; of a run that is
    resumed, construct it on the pretrained weights and load state and weights then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        strength: float = 0.01,
        norm: Literal["l2", "l1"] = "l2",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if strength < 0:
            raise ValueError(f"strength {strength} is below nought")
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm {norm!r} is neither l2 nor l1")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
        self.norm = norm
        for group in self.param_groups:
            group.setdefault("strength", strength)
        self._starts = {
            parameter: parameter.detach().clone()
            for group in self.param_groups
            if group["strength"]
            for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Decay towards the start, then Adam's step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        root = self._root_mean_moment()
        for group in self.param_groups:
            pull = float(group["lr"]) * group["strength"] / root
            for parameter in group["params"]:
                if pull and parameter.grad is not None:
                    self._decay(parameter, pull)
        super().step()
        return loss

    def _decay(self, parameter: Tensor, pull: float) -> None:
        delta = parameter - self._starts[parameter]
        if self.norm == "l2":
            parameter.sub_(delta, alpha=min(1.0, pull))
        else:
            parameter.sub_(delta.sign() * delta.abs().clamp(max=pull))

    def _root_mean_moment(self) -> float:
        """Root of the mean of the second moments, the present gradients included; a function of state and gradients
        alone, so that a resumed run has the same."""
        total, count = 0.0, 0
        for group in self.param_groups:
            beta = group["betas"][1]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state.get(parameter, {})
                moment = (1 - beta) * parameter.grad.double().square().sum()
                if state:
                    moment += beta * state["exp_avg_sq"].double().sum()
                step = float(state["step"]) + 1 if state else 1.0
                total += float(moment) / (1 - beta**step)
                count += parameter.numel()
        return math.sqrt(total / count) if total > 0 else 1.0
