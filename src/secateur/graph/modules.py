"""A module as a host: run with any of its values watched, cut as a copy, tried in float64.

Silencing and cutting share the list of what goes and nothing else: one writes zeros into the uncut module (whose
normalisations then see only what stays), the other slices tensors and renumbers attributes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from secateur.graph.blocks import Block, Depth, shortcuts
from secateur.graph.bypass import NoBypassError, bypass
from secateur.graph.edit import cut, kept, made_only
from secateur.graph.host import Batch, Literal
from secateur.graph.ir import Network, Value
from secateur.graph.norms import MEAN_SQUARE
from secateur.graph.spaces import Gone, Graph
from secateur.graph.state import shadow, tensor_at
from secateur.graph.tape import call, record, replay
from secateur.graph.verify import difference, first_line


@dataclass(frozen=True)
class ModuleHost:
    """A module and what it is run on.

    Attributes:
        module: never changed, except by what is called ``in_place``.
        inputs: example inputs.
    """

    module: nn.Module
    inputs: Batch

    @cached_property
    def network(self) -> Network:
        return record(self.module, self.inputs)

    def tensor(self, name: str) -> Tensor:
        return tensor_at(self.module, name)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """See :meth:`secateur.graph.host.Host.with_tensors`; all other tensors are shared with this host's module."""
        module, network = shadow(self.module), self.network
        for name, value in tensors.items():
            names = next(({k, *v} for k, v in network.aliases.items() if name in (k, *v)), {name})
            old = tensor_at(module, name)
            value = value.detach().to(old)
            made = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
            for alias in names:
                path, _, leaf = alias.rpartition(".")
                setattr(module.get_submodule(path), leaf, made)
        host = type(self)(_flat_weights(module), self.inputs)
        vars(host)["network"] = network  # the same operations on the same values
        return host

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Change the module itself: new values of some tensors of the state."""
        with torch.no_grad():
            for name, value in tensors.items():
                tensor_at(self.module, name).copy_(value)

    def run(
        self, inputs: Batch, watch: Collection[Value] = (), instead: Mapping[Value, Value] | None = None
    ) -> tuple[list[Tensor], dict[Value, Tensor]]:
        """See :meth:`secateur.graph.host.Host.run`; without anything to watch or change the module just runs."""
        return replay(self.module, inputs, self.network, watch, instead)

    def runner(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> Callable[[], object]:
        """See :meth:`secateur.graph.host.Host.runner`."""
        module = (self.cut(graph, gone, literals) if gone.any() else shadow(self.module)).eval()

        def run() -> None:
            with torch.inference_mode():
                call(module, self.inputs)

        return run

    def bench(self, graph: Graph, seed: int = 0) -> ModuleBench:
        return ModuleBench(self.module, graph, self.inputs, seed)

    def cut(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> nn.Module:
        """A smaller copy of the module."""
        small = copy.deepcopy(self.module)
        cut(small, graph, gone, literals)
        return small

    def cut_in_place(self, graph: Graph, gone: Gone, literals: Collection[Literal] = ()) -> nn.Module:
        """The module itself made smaller; the host is of no use afterwards."""
        cut(self.module, graph, gone, literals)
        return self.module

    def bypassed(self, depth: Depth, blocks: Sequence[Block]) -> Self:
        """See :meth:`secateur.graph.host.Host.bypassed`; it shares all tensors, and is read anew where it is asked."""
        return type(self)(type(self)(shadow(self.module), self.inputs).bypassed_in_place(depth, blocks), self.inputs)

    def bypassed_in_place(self, depth: Depth, blocks: Sequence[Block]) -> nn.Module:
        """The module itself without some blocks; the host is of no use afterwards."""
        bypass(self.module, depth, self.inputs, blocks)
        return self.module


def _flat_weights(module: nn.Module) -> nn.Module:
    """Recurrent layers keep a list of their weights, which must be that of the present ones."""
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()
    return module


@dataclass
class ModuleBench:
    """A stirred copy of a module in float64, on which cuts are tried.

    Args:
        module: the original; not touched.
        graph: its channels.
        inputs: example inputs.
        seed: of the stirring.
    """

    module: nn.Module
    graph: Graph
    inputs: Batch
    seed: int = 0
    copy: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.copy = shadow(self.module).eval()
        tensors: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(self.seed)
        for owner in self.copy.modules():
            tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for table in tables:
                for leaf, tensor in table.items():
                    if tensor is not None:
                        if id(tensor) not in tensors:
                            tensors[id(tensor)] = _stirred(leaf, tensor, generator)
                        table[leaf] = tensors[id(tensor)]
        _flat_weights(self.copy)
        self.inputs = tree_map(_double, self.inputs)

    def compare(self, gone: Gone, literals: Collection[Literal] = ()) -> tuple[str, frozenset[Literal]]:
        """Why cut and mask differ, empty where they agree; and what may be true of attributes that may hold a size."""
        doubtful: frozenset[Literal] = frozenset()
        with torch.no_grad(), _InDouble():
            small = shadow(self.copy)
            try:
                doubtful = cut(small, self.graph, gone, literals)
                found = tensors_of(call(small, self.inputs))
            except Exception as error:  # the module's own code may fail in any way
                return f"the cut module does not run: {first_line(error)}", doubtful
            stays, reason = kept(self.graph, gone), ""
            for there in (made_only(self.graph, stays), stays):
                with silenced(self.copy, there, _means(self.graph, gone)):
                    wanted = tensors_of(call(self.copy, self.inputs))
                if not (reason := difference(wanted, found)):
                    break
        return reason, doubtful

    def unsound(self, depth: Depth, blocks: Sequence[Block]) -> str:
        """See :meth:`secateur.graph.host.Bench.unsound`; with stirred parameters, in float64."""
        with torch.inference_mode():
            small = shadow(self.copy)
            try:
                bypass(small, depth, self.inputs, blocks)
                found = tensors_of(call(small, self.inputs))
            except NoBypassError as error:
                return str(error)
            except Exception as error:  # the module's own code may fail in any way
                return f"without it the module does not run: {first_line(error)}"
        wanted, _ = replay(self.copy, self.inputs, self.graph.network, instead=shortcuts(blocks))
        return difference([tensor for tensor in wanted if tensor.is_floating_point()], found)


@contextmanager
def silenced(
    module: nn.Module, stays: Mapping[str, Mapping[int, Tensor]], means: Sequence[Mean] = ()
) -> Iterator[None]:
    """Zeros in a module for a while, where something of its tensors goes; normalisations see only what stays.

    Args:
        module: its tensors are written to and restored.
        stays: positions that stay, by name and dimension; other axes stay whole.
        means: of all means that a run takes, in order.
    """
    backup, weights = {}, {}
    for name, dims in stays.items():
        tensor = tensor_at(module, name)
        backup[name] = tensor.clone()
        for dim, index in dims.items():
            goes = torch.ones(tensor.shape[dim], dtype=torch.bool)
            goes[index] = False
            tensor.index_fill_(dim, goes.nonzero().flatten(), 0)
        if tensor.ndim == 1:
            weights[id(tensor)] = dims[0]
    try:
        with _Statistics(weights, means):
            yield
    finally:
        for name, tensor in backup.items():
            tensor_at(module, name).copy_(tensor)


Mean = tuple[tuple[int, ...], float]
"""The shape of a mean, and what it is multiplied by so that silent entries do not count."""


def _means(graph: Graph, gone: Gone) -> list[Mean]:
    """All means of a run, in order; those of squares in a norm count what stays alone."""
    found = []
    for step in graph.network.operations:
        if step.source == "mean":
            axis, scale = graph.values[step.inputs["x"]][-1:], 1.0
            if step.attrs.get("kind") == MEAN_SQUARE:
                scale = len(axis[0]) / max(int((~gone[axis[0]]).sum()), 1)
            found.append((step.outputs[0].shape, scale))
    return found


class _InDouble(TorchFunctionMode):
    """Casts to a lower precision in a module's code do nothing, so that what is compared has only real differences."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
                return x
            if func is Tensor.to:
                args = tuple(torch.float64 if isinstance(arg, torch.dtype) and arg in _LOWER else arg for arg in args)
            if kwargs.get("dtype") in _LOWER:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


_LOWER: Final = (torch.float32, torch.float16, torch.bfloat16)


class _Statistics(TorchFunctionMode):
    """Normalisations that lose entries take their statistics over what stays."""

    def __init__(self, stays: Mapping[int, Tensor], means: Sequence[Mean] = ()) -> None:
        super().__init__()
        self._stays, self._means = stays, iter(means)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is functional.group_norm:
            return self._group_norm(*args, **kwargs)
        if func in (functional.rms_norm, torch.rms_norm):
            return self._rms_norm(*args, **kwargs)
        found = func(*args, **kwargs)
        if func in (torch.mean, Tensor.mean):
            shape, scale = next(self._means, (None, 1.0))
            return found * scale if scale != 1 and shape == tuple(found.shape) else found
        return found

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        index = self._stays.get(id(weight))
        if index is None or weight is None:
            return functional.rms_norm(x, shape, weight, eps)
        part = x[..., index]
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        out = part / (part.square().mean(-1, keepdim=True) + eps).sqrt() * weight[index]
        return torch.zeros_like(x).index_copy(x.ndim - 1, index, out)

    def _layer_norm(
        self, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        index = self._stays.get(id(weight))
        if index is None or weight is None:
            return functional.layer_norm(x, shape, weight, bias, eps)
        out = _standardised(x[..., index], eps) * weight[index]
        return torch.zeros_like(x).index_copy(x.ndim - 1, index, out if bias is None else out + bias[index])

    def _group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        index = self._stays.get(id(weight))
        if index is None or weight is None:
            return functional.group_norm(x, groups, weight, bias, eps)
        out, width = torch.zeros_like(x), x.shape[1] // groups
        for group in range(groups):
            own = index[(index // width) == group]
            if len(own):
                part, shape = x[:, own], (1, -1) + (1,) * (x.ndim - 2)
                value = _standardised(part.flatten(1), eps).reshape(part.shape) * weight[own].view(shape)
                out[:, own] = value if bias is None else value + bias[own].view(shape)
        return out


def _standardised(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and variance 1 along the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _stirred(leaf: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor in float64 without special values."""
    if not tensor.is_floating_point():
        return tensor
    value = tensor.detach().double().clone()
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(value.device)
    if isinstance(tensor, nn.Parameter):
        constant = tensor.numel() < 2 or bool((value == value.flatten()[0]).all())
        value = value + 0.1 * noise if constant else value * (1 + 0.1 * noise)
        return nn.Parameter(value, requires_grad=False)
    if leaf == "running_mean":
        return value + 0.1 * noise
    return value * (1 + 0.1 * noise).abs() if leaf == "running_var" else value


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def tensors_of(result: Any) -> list[Tensor]:
    """The real numbers among what a module returned."""
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
