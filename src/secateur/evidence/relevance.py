"""Layer-wise relevance propagation through any module: a score of the output, handed back to what made it.

A run in which every operator has a relevance rule in place of its derivative; the backward pass then carries relevance
(arXiv:1912.08881, sec. 3). What enters an operator gets what leaves it: sums are conserved, but for ``EPSILON`` and
for what no contribution accounts for. Biases get nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from secateur.errors import refuse
from secateur.evidence.batches import Example
from secateur.evidence.gradients import module_of
from secateur.graph.host import Host
from secateur.graph.state import shadow
from secateur.graph.tape import arguments

Rule = Literal["alpha1beta0", "epsilon"]
EPSILON: Final = 1e-9
Linear = Callable[[Tensor], Tensor]


def relevance(host: Host, examples: Iterable[Example], rule: Rule) -> dict[str, Tensor]:
    """Relevance of every output channel of every layer with a weight, summed over places and samples, signed.

    What is handed back is the logit of the true class, from class scores [batch, classes].

    Args:
        host: a module.
        examples: batches with class numbers as labels.
        rule: of layers: positive contributions alone (alpha1beta0), or all.

    Returns:
        [channels] float64 by the name of the weight.

    Raises:
        RequestError: the host is no module, or the outputs are no class scores.
    """
    module = shadow(module_of(host)).eval()
    state = {name: host.tensor(name).detach() for name in host.network.state}
    total: dict[str, Tensor] = {}

    def note(name: str, found: Tensor) -> None:
        total[name] = total[name] + found if name in total else found

    for example in examples:
        leaves: list[Tensor] = []
        args, kwargs = tree_map(partial(_leaf, leaves), arguments(example.inputs))
        mode = Propagation({id(tensor): name for name, tensor in state.items()}, rule, note, leaves)
        with torch.enable_grad(), mode:
            outputs = functional_call(module, state, args, kwargs)
        scores = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        labels = example.labels
        if len(scores) != 1 or scores[0].ndim != 2 or not isinstance(labels, Tensor) or labels.ndim != 1 or not leaves:
            refuse("no-relevance", "relevance", "outputs or labels of another form", "class scores, class numbers")
        start = functional.one_hot(labels, scores[0].shape[1]) * scores[0].detach()
        torch.autograd.grad(scores[0], leaves, start, allow_unused=True)
    return total


def _leaf(leaves: list[Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        leaves.append(leaf.detach().clone().requires_grad_())
        return leaves[-1]
    return leaf


class _Layer(torch.autograd.Function):
    """A product with a weight: relevance in proportion to contributions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Product) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.made(x)

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.layer.handed_back(x, found), None


class _Product:
    """One call of a layer.

    Args:
        call: of input, weight and bias.
        name: of the weight; empty if it is not in the state.
        axis: of the weight along which outputs lie.
        rule: see :func:`relevance`.
        note: told of the relevance of the outputs.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        name: str,
        axis: int,
        rule: Rule,
        note: Callable[[str, Tensor], None],
    ) -> None:
        self.call, self.weight, self.bias, self.name, self.axis = call, weight, bias, name, axis
        self._rule, self._note = rule, note
        self.x: Tensor | None = None

    def made(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)

    def scaled(self, scale: Tensor, shift: Tensor) -> _Product:
        """The same with a batch norm behind it."""
        weight = (self.weight.movedim(self.axis, -1) * scale).movedim(-1, self.axis)
        bias = shift if self.bias is None else self.bias * scale + shift
        return _Product(self.call, weight, bias, self.name, self.axis, self._rule, self._note)

    def handed_back(self, x: Tensor, found: Tensor) -> Tensor:
        """Relevance of the input, given that of the output."""
        channels = found.transpose(0, 1 if self.weight.ndim > 2 else -1).flatten(1)
        self._note(self.name, channels.double().sum(1).cpu())
        if self._rule == "epsilon":
            return _proportional([(x, partial(_plain, self.call, self.weight))], found)[0]
        signs = [(x.clamp(min=0), self.weight.clamp(min=0)), (x.clamp(max=0), self.weight.clamp(max=0))]
        parts = [(part, partial(_plain, self.call, weight)) for part, weight in signs]
        return torch.stack(_proportional(parts, found)).sum(0)


def _plain(call: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
    return call(x, weight, None)


def _proportional(parts: Sequence[tuple[Tensor, Linear]], found: Tensor) -> list[Tensor]:
    """Relevance of several inputs x, whose linear functions f are summed: x f^T(R / sum f(x))."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x, _ in parts]
        made = torch.stack([f(leaf) for leaf, (_, f) in zip(leaves, parts, strict=True)]).sum(0)
        share = found / _away(made.detach())
        slopes = torch.autograd.grad(made, leaves, share)
    return [leaf.detach() * slope for leaf, slope in zip(leaves, slopes, strict=True)]


def _away(made: Tensor) -> Tensor:
    """A denominator that is not zero."""
    return made + torch.where(made < 0, -EPSILON, EPSILON)


class _Sum(torch.autograd.Function):
    """A linear function of one or two tensors without weights: relevance in proportion."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*parts)
        return call(*parts)

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> Any:
        parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
        with torch.enable_grad():
            made = ctx.call(*parts)
            slopes = torch.autograd.grad(made, parts, found / _away(made.detach()))
        return None, *(part.detach() * slope for part, slope in zip(parts, slopes, strict=True))


class _Through(torch.autograd.Function):
    """An elementwise function: what comes in gets what goes out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor) -> Tensor:
        ctx.shape = x.shape
        return made.clone()

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> Any:
        return found.sum_to_size(ctx.shape), None


class _Alike(torch.autograd.Function):
    """A product of several tensors: each gets as much as the others."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, *parts: Tensor) -> Tensor:
        ctx.shapes = [part.shape for part in parts]
        return made.clone()

    @staticmethod
    def backward(ctx: Any, found: Tensor) -> Any:
        return None, *((found / len(ctx.shapes)).sum_to_size(shape) for shape in ctx.shapes)


_LAYERS: Final[Mapping[Any, int]] = {
    functional.linear: 0,
    functional.conv1d: 0,
    functional.conv2d: 0,
    functional.conv3d: 0,
    functional.conv_transpose1d: 1,
    functional.conv_transpose2d: 1,
    functional.conv_transpose3d: 1,
}
"""Products with a weight, and its axis of outputs."""
_ELEMENTWISE: Final = frozenset(
    [
        *(functional.relu, functional.relu6, functional.leaky_relu, functional.gelu, functional.silu, functional.mish),
        *(functional.elu, functional.selu, functional.celu, functional.hardswish, functional.softplus),
        *(functional.prelu, functional.tanh, functional.layer_norm, functional.group_norm, functional.instance_norm),
        *(torch.relu, torch.relu_, torch.tanh, Tensor.relu, Tensor.relu_, Tensor.tanh),
    ]
)
_CONSTANT: Final = frozenset(
    [
        *(functional.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid, functional.sigmoid),
        functional.hardsigmoid,
    ]
)
_SUMS: Final = frozenset(
    [
        *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
        *(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__),
    ]
)
_PRODUCTS: Final = frozenset(
    [
        *(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
        *(torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__),
    ]
)
_MEANS: Final = frozenset(
    [
        *(torch.mean, Tensor.mean, torch.sum, Tensor.sum, functional.avg_pool1d, functional.avg_pool2d),
        *(functional.avg_pool3d, functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
    ]
)
_MATRICES: Final = frozenset([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm])


class Propagation(TorchFunctionMode):
    """Operators with rules for relevance; what has none passes it on as it would a derivative.

    Args:
        names: of the tensors of the state, by their ``id``.
        rule, note: see :class:`_Product`.
        leaves: what relevance ends in; embeddings are added.
    """

    def __init__(
        self, names: dict[int, str], rule: Rule, note: Callable[[str, Tensor], None], leaves: list[Tensor]
    ) -> None:
        super().__init__()
        self._names, self._rule, self._note, self._leaves = names, rule, note, leaves
        self._made: dict[int, tuple[Tensor, Tensor, _Product]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            return self._layer(func, *args, **kwargs)
        if func is functional.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is functional.embedding:
            self._leaves.append(func(*args, **kwargs).detach().requires_grad_())
            return self._leaves[-1]
        if func in _ELEMENTWISE:
            x = args[0] if args else kwargs["input"]
            return _Through.apply(x, func(x.detach().clone(), *args[1:], **kwargs))  # type: ignore[no-untyped-call]
        if func in _CONSTANT:
            return func(*args, **kwargs).detach()
        if func in _MEANS and args and args[0].is_floating_point():
            return _Sum.apply(lambda x: func(x, *args[1:], **kwargs), args[0])  # type: ignore[no-untyped-call]
        if func in _MATRICES:
            return self._matrices(func, *args)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in _SUMS or func in _PRODUCTS:
            return self._pair(func, args, kwargs)
        return func(*args, **kwargs)

    def _layer(self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *more: Any, **named: Any) -> Any:
        def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made: Tensor = func(x, weight, bias, *more, **named)
            return made

        layer = _Product(call, weight, bias, self._names.get(id(weight), ""), _LAYERS[func], self._rule, self._note)
        return self._apply(x, layer)

    def _apply(self, x: Tensor, layer: _Product) -> Tensor:
        made: Tensor = _Layer.apply(x, layer)  # type: ignore[no-untyped-call]
        self._made[id(made)] = (made, x, layer)
        return made

    def _batch_norm(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        """Merged into the layer before it, where there is one."""
        del training, momentum
        scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
        shift = -mean * scale if bias is None else bias - mean * scale
        if id(x) in self._made:
            _, entering, layer = self._made[id(x)]
            return self._apply(entering, layer.scaled(scale, shift))
        form = (1, -1, *(1,) * (x.ndim - 2))
        made = x.detach() * scale.view(form) + shift.view(form)
        return _Through.apply(x, made)  # type: ignore[no-untyped-call]

    def _pair(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Sums share in proportion, products alike; what is no activation gets nothing."""
        active = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.requires_grad]
        if not active:
            return func(*args, **kwargs)
        if len(active) == 1:
            plain = [arg.detach().clone() if arg is active[0] else arg for arg in args]
            return _Through.apply(active[0], func(*plain, **kwargs))  # type: ignore[no-untyped-call]
        if func in _SUMS:
            sign = -1 if "sub" in func.__name__ else 1
            return _Sum.apply(lambda a, b: a + sign * b, *active)  # type: ignore[no-untyped-call]
        made = func(*(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args), **kwargs)
        return _Alike.apply(made, *active)  # type: ignore[no-untyped-call]

    def _matrices(self, func: Any, one: Tensor, other: Tensor) -> Any:
        """A product with a constant matrix is a linear function; of two activations each gets half."""
        if one.requires_grad and not other.requires_grad:
            return _Sum.apply(lambda x: func(x, other), one)  # type: ignore[no-untyped-call]
        if other.requires_grad and not one.requires_grad:
            return _Sum.apply(lambda x: func(one, x), other)  # type: ignore[no-untyped-call]
        return func(one, other)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *more: Any, **named: Any) -> Any:
        """Where it looks is taken as given."""
        fixed = (q.detach(), k.detach())
        return _Sum.apply(  # type: ignore[no-untyped-call]
            lambda x: functional.scaled_dot_product_attention(*fixed, x, *more, **named), v
        )
