"""Masked == cut: what a cut module computes against the uncut one with the same units silenced.

Both run in float64 with all parameters stirred, so that zeros, ones and tiny scales of an initialisation hide nothing.
Silencing and cutting share the list of what goes and nothing else: one writes zeros into the uncut module (whose
normalisations then see only what stays), the other slices tensors and renumbers attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from secateur.graph.edit import Literal, cut, kept
from secateur.graph.spaces import ChannelSpace, Gone, Graph
from secateur.graph.state import shadow, tensor_at
from secateur.graph.tape import Inputs, call

TOLERANCE: Final = 1e-8
_MADE_GOOD: Final = ("layer_norm", "group_norm")
"""Statistics that the silenced module takes over what stays."""
_TURNS: Final = 12
"""Guesses about attributes, for spaces alike."""


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        sound: names of spaces whose cut computes the same as their mask.
        refused: reasons, by name of a space.
        literals: what had to be settled of attributes that may hold a size.
    """

    sound: tuple[str, ...]
    refused: Mapping[str, str]
    literals: frozenset[Literal]


@dataclass
class Bench:
    """A stirred copy of a module in float64, on which cuts are tried.

    Args:
        module: the original; not touched.
        graph: its channels.
        inputs: example inputs.
        seed: of the stirring.
    """

    module: nn.Module
    graph: Graph
    inputs: Inputs
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
        for owner in self.copy.modules():
            if isinstance(owner, nn.RNNBase):
                owner._init_flat_weights()
        self.inputs = tree_map(_double, self.inputs)

    def compare(self, gone: Gone, literals: Collection[Literal] = ()) -> tuple[str, frozenset[Literal]]:
        """Why cut and mask differ, empty where they agree; and what may be true of attributes that may hold a size."""
        doubtful: frozenset[Literal] = frozenset()
        with torch.no_grad():
            small = shadow(self.copy)
            try:
                doubtful = cut(small, self.graph, gone, literals)
                found = _outputs(call(small, self.inputs))
            except Exception as error:  # the module's own code may fail in any way
                return f"the cut module does not run: {_first_line(error)}", doubtful
            stays, reason = kept(self.graph, gone), ""
            for there in (self._made(stays), stays):
                with silenced(self.copy, there):
                    wanted = _outputs(call(self.copy, self.inputs))
                if not (reason := _difference(wanted, found)):
                    break
        return reason, doubtful

    def _made(self, stays: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
        """The part of what stays that makes channels: silence in what reads them is stronger, and tried afterwards."""
        reads = {(e.name, e.dim) for space in self.graph.spaces for e in space.entries if e.roles == {"consumer"}}
        parts = {name: {d: i for d, i in dims.items() if (name, d) not in reads} for name, dims in stays.items()}
        return {name: dims for name, dims in parts.items() if dims}


@contextmanager
def silenced(module: nn.Module, stays: Mapping[str, Mapping[int, Tensor]]) -> Iterator[None]:
    """Zeros in a module for a while, where something of its tensors goes; normalisations see only what stays.

    Args:
        module: its tensors are written to and restored.
        stays: positions that stay, by name and dimension; other axes stay whole.
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
        with _Statistics(weights):
            yield
    finally:
        for name, tensor in backup.items():
            tensor_at(module, name).copy_(tensor)


class _Statistics(TorchFunctionMode):
    """Normalisations with a weight that loses entries take their statistics over what stays."""

    def __init__(self, stays: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._stays = stays

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is functional.group_norm:
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

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


def verify(graph: Graph, module: nn.Module, inputs: Inputs, seed: int = 0) -> tuple[Verdict, Bench]:
    """Try some units of every space, those alike together, then all together.

    Returns:
        The verdict, and the bench for trying more.
    """
    bench = Bench(module, graph, inputs, seed)
    refused: dict[str, str] = {}
    rest: list[ChannelSpace] = []
    for space in graph.spaces:
        bad = [flag for flag in space.flags if not flag.startswith(_MADE_GOOD)]
        if bad:
            refused[space.name] = f"a statistic over it changes: {bad[0]}" + (
                f" and {len(bad) - 1} more" if bad[1:] else ""
            )
        elif space.size < 2:
            refused[space.name] = "a single unit"
        else:
            rest.append(space)
    trial = _Trial(bench, np.random.default_rng(seed))
    if rest and trial(rest):
        alike: dict[Any, list[ChannelSpace]] = {}
        for space in rest:
            alike.setdefault(space.topology, []).append(space)
        good: list[ChannelSpace] = []
        for group in alike.values():
            reason = trial(group)
            if not reason:
                good += group
            refused.update({space.name: reason for space in group if reason})
        rest = trial.largest(good, refused)
    return Verdict(tuple(space.name for space in rest), refused, frozenset(trial.literals)), bench


def faults(
    graph: Graph, bench: Bench, units: Mapping[str, Sequence[int]], literals: Collection[Literal]
) -> dict[str, str]:
    """Spaces whose chosen units cannot be cut as they are, with the reasons; spaces alike are tried together."""
    alike: dict[Any, dict[str, Sequence[int]]] = {}
    for name, chosen in units.items():
        alike.setdefault(graph.space(name).topology, {})[name] = chosen
    found: dict[str, str] = {}
    for group in alike.values():
        if reason := bench.compare(graph.gone(group), literals)[0]:
            found |= dict.fromkeys(group, reason)
    return found


class _Trial:
    """Cuts of some units of each of some spaces; remembers what it had to settle of attributes."""

    def __init__(self, bench: Bench, generator: np.random.Generator) -> None:
        self._bench, self._generator = bench, generator
        self.literals: set[Literal] = set()

    def __call__(self, spaces: Sequence[ChannelSpace]) -> str:
        """Why the cut is wrong, empty where it is right."""
        return self.of({space.name: self._some(space.size) for space in spaces}, {s.topology for s in spaces})

    def _some(self, size: int) -> list[int]:
        """A few units, at most a third of them."""
        count = int(self._generator.integers(1, max(size // 3, 1) + 1))
        return [int(unit) for unit in self._generator.choice(size, count, replace=False)]

    def of(self, units: Mapping[str, Sequence[int]], topologies: Collection[Any]) -> str:
        """Why the cut of these very units is wrong, empty where it is right."""
        gone = self._bench.graph.gone(units)
        if self._bench.graph.costs.smallest(gone) < 1:
            return "an axis would be empty"
        reason, doubtful = self._bench.compare(gone, self.literals)
        if reason and len(topologies) > 1:
            return reason  # attributes are settled where spaces alike are tried
        settled = {literal[:2] for literal in self.literals}
        for one in sorted(literal for literal in doubtful if literal[:2] not in settled)[:_TURNS] if reason else ():
            if not self._bench.compare(gone, {*self.literals, one})[0]:
                self.literals.add(one)
                return ""
        return reason

    def largest(self, spaces: list[ChannelSpace], refused: dict[str, str]) -> list[ChannelSpace]:
        """Spaces that can be cut together; those that cannot are refused, by halves."""
        reason = self(spaces) if spaces else ""
        if not reason:
            return spaces
        if len(spaces) == 1:
            refused[spaces[0].name] = reason
            return []
        half = len(spaces) // 2
        first, second = self.largest(spaces[:half], refused), self.largest(spaces[half:], refused)
        both = self([*first, *second]) if first and second else ""
        if both:
            refused.update({space.name: f"not together with others: {both}" for space in second})
            return first
        return [*first, *second]


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


def _outputs(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """What is unequal, empty if nothing is."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        return "the outputs have other shapes"
    worst = max(map(relative_difference, wanted, found), default=0.0)
    return "" if worst <= TOLERANCE else f"the outputs differ by {worst:.1e} of the largest"


def relative_difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a share of the largest value; infinite if not a number."""
    if not wanted.numel():
        return 0.0
    worst = float((wanted - found).abs().max()) / max(float(wanted.abs().max()), 1e-12)
    return worst if worst == worst else float("inf")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
