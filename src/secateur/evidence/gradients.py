"""Slopes of a module's loss: of its parameters, sample by sample or batch by batch, and of the slopes themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import refuse
from secateur.evidence.batches import Example
from secateur.evidence.losses import Loss
from secateur.graph.host import Host
from secateur.graph.modules import ModuleHost
from secateur.graph.state import shadow
from secateur.graph.tape import arguments

Slopes = dict[str, Tensor]
"""Derivatives of a number, by the name of the parameter."""


class Slope:
    """Derivatives of a loss by a module's parameters, as at evaluation; the module is not touched.

    Args:
        host: a module; nothing else has gradients.
        loss: of outputs and labels, the mean over a batch.

    Raises:
        RequestError: the host is no module.
    """

    def __init__(self, host: Host, loss: Loss) -> None:
        self._module, self._loss = shadow(module_of(host)).eval(), loss
        state = {name: host.tensor(name) for name, value in host.network.state.items() if value.kind == "parameter"}
        self.point = {
            name: tensor.detach().clone().requires_grad_()
            for name, tensor in state.items()
            if tensor.is_floating_point()
        }

    def at(self, example: Example) -> Tensor:
        """The loss of a batch, which can be derived."""
        args, kwargs = arguments(example.inputs)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others cannot be derived twice
            loss = self._loss(functional_call(self._module, self.point, args, kwargs), example.labels)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss).all()):
            refuse("bad-loss", "the loss of a batch", "it is no finite number", "loss=fn(outputs, labels) -> a mean")
        return loss

    def of(self, example: Example, again: bool = False) -> Slopes:
        """The slopes of a batch; with ``again`` they can be derived once more."""
        found = torch.autograd.grad(
            self.at(example), list(self.point.values()), create_graph=again, materialize_grads=True
        )
        return dict(zip(self.point, found, strict=True))

    def mean(self, examples: Iterable[Example], of: Callable[[Slopes], Mapping[str, Tensor]] = dict) -> Slopes:
        """The mean over batches of their slopes, or of what ``of`` makes of each batch's."""
        total, count = Slopes(), 0
        for example in examples:
            for name, value in of(self.of(example)).items():
                total[name] = total[name] + value.double() if name in total else value.double()
            count += 1
        return {name: value / count for name, value in total.items()}

    def along(self, direction: Mapping[str, Tensor], examples: Iterable[Example]) -> Slopes:
        """The Hessian of the mean loss times a direction, exactly (a derivative of a derivative)."""
        total, count = Slopes(), 0
        for example in examples:
            slopes = self.of(example, again=True)
            product = torch.stack([(direction[name].to(g) * g).sum() for name, g in slopes.items()]).sum()
            found = torch.autograd.grad(product, list(self.point.values()), materialize_grads=True)
            for name, value in zip(self.point, found, strict=True):
                total[name] = total[name] + value.double() if name in total else value.double()
            count += 1
        return {name: value / count for name, value in total.items()}


def module_of(host: Host) -> torch.nn.Module:
    """The module that a host is."""
    if not isinstance(host, ModuleHost):
        refuse(
            "no-gradients", "slopes of a loss", "only modules have them", "prune the module, or choose another score"
        )
    return host.module
