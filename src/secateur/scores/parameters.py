"""What every parameter of a module is worth before training: SNIP, GraSP, SynFlow (arXiv:2006.05467 has all three)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from secateur.graph.tape import call

Labelled = Sequence[tuple[Any, Any]]
"""Batches: inputs and labels."""
Loss = Callable[[Any, Any], Tensor]


def snip(module: nn.Module, batches: Labelled, loss: Loss, live: bool = False) -> dict[str, Tensor]:
    """|weight x gradient| of the mean loss (arXiv:1810.02340), by name.

    Args:
        module: not touched.
        live: batch norms take the batch's statistics.
    """
    own, names, values = _copy(module, live)
    slopes = _gradient(own, values, batches, loss)
    return {n: (v.detach() * g).abs() for n, v, g in zip(names, values, slopes, strict=True)}


def grasp(module: nn.Module, batches: Labelled, loss: Loss, live: bool = False) -> dict[str, Tensor]:
    """weight x (H g), by name (arXiv:2002.07376): by how much the gradient's square falls, to first order, without it.

    Half of the derivative of |g|^2 along the weight; what is least hinders the flow of gradients.
    Args: see :func:`snip`.
    """
    own, names, values = _copy(module, live)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        stopped = _gradient(own, values, batches, loss)
        total = [torch.zeros_like(value) for value in values]
        for inputs, labels in batches:
            slopes = torch.autograd.grad(loss(call(own, inputs), labels), values, create_graph=True, allow_unused=True)
            flow = sum((g * s).sum() for g, s in zip(slopes, stopped, strict=True) if g is not None and g.requires_grad)
            if not isinstance(flow, Tensor):
                continue
            curved = torch.autograd.grad(flow, values, allow_unused=True)
            total = [t if h is None else t + h / len(batches) for t, h in zip(total, curved, strict=True)]
    return {n: v.detach() * h for n, v, h in zip(names, values, total, strict=True)}


def synflow(module: nn.Module, example: Any) -> dict[str, Tensor]:
    """weight x dR/d weight, where R sums the outputs of the absolute network for inputs of ones, in float64.

    Layers that are not homogeneous (layer norms, attention) are taken as they are. Args: see :func:`snip`.
    """
    own = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        for tensor in (*own.parameters(), *own.buffers()):
            tensor.abs_()
    names, values = _named(own)
    ones = tree_map(lambda x: torch.ones_like(x[:1]).double() if _real(x) else x, example)
    flow = torch.stack([leaf.sum() for leaf in tree_leaves(call(own, ones)) if _real(leaf)]).sum()
    slopes = torch.autograd.grad(flow, values, allow_unused=True)
    return {n: v.detach() * (0 if g is None else g) for n, v, g in zip(names, values, slopes, strict=True)}


def _copy(module: nn.Module, live: bool) -> tuple[nn.Module, list[str], list[Tensor]]:
    """A module of its own with gradients everywhere; only its batch norms in training, if at all."""
    own = copy.deepcopy(module).eval()
    for part in own.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train(live)
    return own, *_named(own)


def _named(module: nn.Module) -> tuple[list[str], list[Tensor]]:
    names, values = [], []
    for name, value in module.named_parameters():
        names.append(name)
        values.append(value.requires_grad_(True))
    return names, values


def _gradient(module: nn.Module, values: Sequence[Tensor], batches: Labelled, loss: Loss) -> list[Tensor]:
    """Mean over the batches."""
    total = [torch.zeros_like(value) for value in values]
    for inputs, labels in batches:
        slopes = torch.autograd.grad(loss(call(module, inputs), labels), values, allow_unused=True)
        total = [t if g is None else t + g / len(batches) for t, g in zip(total, slopes, strict=True)]
    return total


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
