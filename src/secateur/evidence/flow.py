"""The linear network of absolute weights that a module is for SynFlow (arXiv:2006.05467)."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from secateur.errors import refuse
from secateur.evidence.gradients import Slopes, module_of
from secateur.graph.host import Host
from secateur.graph.state import shadow
from secateur.graph.tape import arguments

_SHIFTS: Final = ("running_mean",)


def synaptic_flow(host: Host, example: Any) -> Slopes:
    """|w| dR/d|w| of every parameter, float64: R is what ones become behind all absolute weights, summed.

    Everything that is not a product with a weight is made one: biases and running means are zero, batch norms scale,
    layer and group norms only multiply by their weight, smooth activations pass what they get (all is positive), and
    attention looks everywhere alike (derived; the paper has convolutions with ReLU). So what flows into a unit is what
    flows out of it.

    Args:
        host: a module.
        example: inputs, replaced by ones.

    Raises:
        RequestError: the host is no module, or inputs that are no real numbers.
    """
    module = shadow(module_of(host)).eval()
    biases = {
        f"{path}.{leaf}".lstrip(".")
        for path, part in module.named_modules()
        for leaf, _ in part.named_parameters(recurse=False)
        if leaf.startswith("bias")
    }
    state, point = {}, {}
    for name, value in host.network.state.items():
        tensor = host.tensor(name).detach()
        if not tensor.is_floating_point():
            continue
        silent = name in biases or name.rpartition(".")[2] in _SHIFTS
        state[name] = torch.zeros_like(tensor, dtype=torch.float64) if silent else tensor.double().abs()
        if value.kind == "parameter":
            point[name] = state[name].requires_grad_()
    args, kwargs = tree_map(_ones, arguments(example))
    with torch.enable_grad(), _Flow():
        made = [leaf for leaf in tree_flatten(functional_call(module, state, args, kwargs))[0] if _is_real(leaf)]
        total = torch.stack([leaf.double().sum() for leaf in made]).sum()
    found = torch.autograd.grad(total, list(point.values()), materialize_grads=True)
    scores = {name: value.detach() * slope for (name, value), slope in zip(point.items(), found, strict=True)}
    if not all(bool(torch.isfinite(score).all()) for score in scores.values()):
        refuse("no-flow", "the synaptic flow of this network", "it is beyond all numbers", "another score, e.g. l1")
    return scores


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _ones(leaf: Any) -> Any:
    return torch.ones_like(leaf, dtype=torch.float64) if _is_real(leaf) else leaf


_PASSING: Final = frozenset(
    [
        *(functional.relu, functional.relu6, functional.leaky_relu, functional.gelu, functional.silu, functional.mish),
        *(functional.elu, functional.selu, functional.celu, functional.hardswish, functional.softplus),
        *(functional.prelu, functional.dropout, functional.dropout2d, functional.tanh),
        *(torch.relu, torch.relu_, torch.tanh, Tensor.relu, Tensor.relu_, Tensor.tanh),
    ]
)
_GATES: Final = frozenset({torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, functional.sigmoid, functional.hardsigmoid})


class _Flow(TorchFunctionMode):
    """Operators of a network as they are on a stream of positive numbers that only weights change."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PASSING:
            return args[0] if args else kwargs["input"]
        if func in _GATES:
            return torch.ones_like(args[0] if args else kwargs["input"])
        if func is functional.layer_norm:
            x, _, weight = (*args, *kwargs.values())[:3]
            return x if weight is None else x * weight
        if func is functional.group_norm:
            x, _, weight = (*args, *kwargs.values())[:3]
            return x if weight is None else x * weight.view(1, -1, *(1,) * (x.ndim - 2))
        if func in (functional.softmax, torch.softmax, Tensor.softmax):
            x, dim = args[0] if args else kwargs["input"], kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return torch.full_like(x, 1 / x.shape[dim])
        if func is functional.scaled_dot_product_attention:
            q, _, v = (*args, *kwargs.values())[:3]
            return v.mean(-2, keepdim=True).expand(*v.shape[:-2], q.shape[-2], v.shape[-1])
        return func(*args, **kwargs)
