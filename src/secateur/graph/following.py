"""Two networks that differ in numbers alone, followed side by side: what one sees, and what the other sees there.

So layers can be mended in the order of the run, each on the inputs that the mended layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from secateur.graph.aten import name_of
from secateur.graph.edit import kept
from secateur.graph.host import Batch, Host
from secateur.graph.ir import Network, Operation, Value
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import Gone, Graph
from secateur.graph.state import parts, read_state
from secateur.graph.tape import Replay, replay
from secateur.graph.verify import relative_difference

_SAME: Final = 1e-3
Tensors = dict[str, Tensor]
Observe = Callable[[Operation, Tensor, Tensor], Mapping[str, Tensor]]
"""New numbers for the second network, given a step and what it reads in the first and in the second."""


def silent(host: Host, graph: Graph, gone: Gone) -> Tensors:
    """Tensors of the state with zeros wherever something goes."""
    found = {}
    for name, dims in kept(graph, gone).items():
        value = host.tensor(name).detach().clone()
        found[name] = zeroed(value, dims)
    return found


def zeroed(value: Tensor, stays: Mapping[int, Tensor]) -> Tensor:
    """A tensor, written to, with zeros outside of what stays of some of its axes."""
    for dim, index in stays.items():
        goes = torch.ones(value.shape[dim], dtype=torch.bool)
        goes[index] = False
        value.index_fill_(dim, goes.nonzero().flatten().to(value.device), 0)
    return value


def source_of(step: Operation) -> Value | None:
    """What a step with tensors of the state reads besides them; None where it is not one value."""
    free = [value for value in step.inputs.values() if not value.is_state]
    return free[0] if len(free) == 1 and len(step.inputs) > 1 else None


def follow(
    host: Host, other: Mapping[str, Tensor], batches: Sequence[Batch], wanted: Collection[Operation], observe: Observe
) -> Tensors:
    """Ask at every wanted step, in order, for new numbers of the second network; what follows sees them.

    Args:
        host: the first network.
        other: tensors in which the second one differs.
        batches: what both are run on.
        wanted: steps that have a source (:func:`source_of`).
        observe: is shown all batches at once.

    Returns:
        All tensors in which the second network differs in the end.
    """
    if isinstance(host, ModuleHost):
        found = _side_by_side(host, other, batches, wanted, observe)
        if found is not None:
            return found
    tensors = dict(other)
    for step in host.network.operations:
        source = source_of(step) if step in wanted else None
        if source is not None:
            pair = [_seen(each, batches, source) for each in (host, host.with_tensors(tensors))]
            tensors |= observe(step, *pair)
    return tensors


def _seen(host: Host, batches: Sequence[Batch], value: Value) -> Tensor:
    return torch.cat([host.run(batch, [value])[1][value] for batch in batches])


class _Astray(Exception):  # noqa: N818 - no error, but the other way
    """The two cannot be run as halves of one batch."""


def _side_by_side(
    host: ModuleHost,
    other: Mapping[str, Tensor],
    batches: Sequence[Batch],
    wanted: Collection[Operation],
    observe: Observe,
) -> Tensors | None:
    """Both as the halves of one batch, in a single run; None where the module does not keep the halves apart."""
    if not all(isinstance(leaf, Tensor) and leaf.ndim for batch in batches for leaf in tree_flatten(batch)[0]):
        return None
    both = tree_map(lambda *parts: torch.cat([*parts, *parts]), *batches)
    mode = _Halves(host, other, wanted, observe)
    try:
        outputs, _ = replay(host.module, both, host.network, head=mode)
    except Exception:  # the module's own code may count on the size of a batch
        if mode.failure is not None:
            raise mode.failure from None
        return None
    found = {name: value.clone() for name, value in mode.tensors.items()}  # as tensors that may have slopes
    for each, half in ((host, 0), (host.with_tensors(found), 1)):
        for whole, alone in zip(outputs, each.run(batches[0])[0], strict=True):
            if len(whole) % 2 or not _alike(torch.chunk(whole, 2)[half][: len(alone)], alone):
                return None
    return found


def _alike(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and relative_difference(wanted, found) < _SAME


class _Halves(Replay):  # type: ignore[no-untyped-call]
    """The first half of every batch goes through the network itself, the second through the one that differs."""

    def __init__(
        self, host: ModuleHost, other: Mapping[str, Tensor], wanted: Collection[Operation], observe: Observe
    ) -> None:
        super().__init__(host.network.operations)
        self.tensors: Tensors = dict(other)
        self.failure: Exception | None = None
        self._names = {key: value.name for key, value in read_state(parts(host.module), Network()).items()}
        self._wanted, self._observe = set(wanted), observe

    def call(self, step: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        free = [leaf for leaf in leaves if id(leaf) not in self._names]
        names = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
        if step in self._wanted and step is not None and step.source == name_of(func):
            if len(free) != 1 or len(free[0]) % 2:
                raise _Astray
            try:
                self.tensors |= self._observe(step, *torch.chunk(free[0], 2))
            except Exception as failure:
                self.failure = failure
                raise
        if not names & set(self.tensors):
            return func(*args, **kwargs)
        if len(free) != 1 or not free[0].ndim or len(free[0]) % 2:
            raise _Astray
        first, second = (func(*a, **k) for a, k in (self._half(half, free[0], args, kwargs) for half in (0, 1)))
        return torch.cat([first, second])

    def _half(self, half: int, free: Tensor, args: Any, kwargs: Any) -> Any:
        """Arguments of one of the two."""

        def of(leaf: Any) -> Any:
            if leaf is free:
                return torch.chunk(leaf, 2)[half]
            name = self._names.get(id(leaf), "")
            return self.tensors[name].to(leaf) if half and name in self.tensors else leaf

        return tree_map(of, (args, kwargs))
