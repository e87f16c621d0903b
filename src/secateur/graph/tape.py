"""A module as a network: the operators of one run, recorded as they are called."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from secateur.errors import refuse
from secateur.graph.aten import name_of, read
from secateur.graph.host import Batch
from secateur.graph.ir import Network, Operation, Value
from secateur.graph.norms import name_norms
from secateur.graph.state import parts, read_state, restored, tensor_at


def arguments(inputs: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def call(module: nn.Module, inputs: Batch) -> Any:
    """The module's output."""
    args, kwargs = arguments(inputs)
    return module(*args, **kwargs)


def record(module: nn.Module, inputs: Batch) -> Network:
    """Run a module once, as at evaluation, and write down what it does.

    In inference mode composite operators (linear, reshape, attention) are called whole, so the words are those of
    ``torch.export`` before decomposition. Afterwards the module is as it was.
    """
    network = Network()
    named = parts(module)
    unique = {part: path for path, part in reversed(named)}
    tape = _Tape(network, read_state(named, network), {id(part): path for part, path in unique.items()})
    args, kwargs = arguments(inputs)
    with restored(unique), torch.inference_mode(), _plain_attention(), tape.following():
        module.eval()
        args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        network.inputs = [tape.value(leaf, "input") for leaf in tree_flatten((args, kwargs))[0] if _is_tensor(leaf)]
        with tape:
            result = module(*args, **kwargs)
        network.outputs = [tape.value(leaf) for leaf in tree_flatten(result)[0] if _is_tensor(leaf)]
    name_norms(network)
    return network


def replay(
    module: nn.Module,
    inputs: Batch,
    network: Network,
    watch: Collection[Value] = (),
    instead: Mapping[Value, Value] | None = None,
    head: Replay | None = None,
) -> tuple[list[Tensor], dict[Value, Tensor]]:
    """Run a module again as :func:`record` ran it, and catch some of the values that it computes on the way.

    Args:
        module: the one that was recorded, or one that differs in the numbers of its tensors.
        inputs: like those of the record; sizes that the code leaves open may differ.
        network: the record.
        watch: values of the network.
        instead: for values that one operation makes, the one of its tensors that is taken in their place.
        head: what is told of every operator that is called; by default it catches and replaces these values.

    Returns:
        The outputs in the order of ``network.outputs``, and the watched values; copies, so nothing can change them.

    Raises:
        RequestError: on these inputs the module takes another path than on the example inputs.
    """
    if head is None and (watch or instead):
        head = Replay(network.operations, watch, instead or {})
    args, kwargs = arguments(inputs)
    with restored(module.modules()), torch.inference_mode(), _plain_attention():
        module.eval()
        args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        entering = [leaf.clone() for leaf in tree_flatten((args, kwargs))[0] if _is_tensor(leaf)] if watch else []
        with head or nullcontext():
            result = module(*args, **kwargs)
    found = head.found if head else {}
    found |= {value: leaf for value, leaf in zip(network.inputs, entering, strict=False) if value in watch}
    for value in watch:
        if value.is_state:
            found[value] = tensor_at(module, value.name).detach()
    outputs = [leaf for leaf in tree_flatten(result)[0] if _is_tensor(leaf)]
    if len(found) < len(set(watch)) or len(outputs) != len(network.outputs):
        _strayed("it stops earlier")
    return [leaf.clone() for leaf in outputs], {value: leaf.clone() for value, leaf in found.items()}


def _strayed(how: str) -> NoReturn:
    refuse("another-path", "a run to watch", f"the network takes another path than on the example inputs: {how}")


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called, and keeps what some of them make."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(
        self,
        operations: Sequence[Operation],
        watch: Collection[Value] = (),
        instead: Mapping[Value, Value] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations, self._count, self._watch = operations, 0, set(watch)
        self._instead = {}
        for number, step in enumerate(operations if instead else ()):
            taken = (instead or {}).get(step.outputs[0])
            if taken is not None:
                self._instead[number] = list(step.inputs.values()).index(taken)
        self.found: dict[Value, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = self._instead.get(self._count)
        other = None if taken is None else args[taken].clone()  # before the operation, which may write to it
        step = self._operations[self._count] if self._count < len(self._operations) else None
        result = self.call(step, func, args, kwargs or {})
        made = [leaf for leaf in (result if isinstance(result, list | tuple) else [result]) if _is_tensor(leaf)]
        if made:
            self._count += 1
            if other is not None:
                made[0].copy_(other)
            if step is None or step.source != name_of(func) or len(step.outputs) != len(made):
                _strayed(f"{name_of(func)} where {step.source if step else 'the end'} was")
            for value, tensor in zip(step.outputs, made, strict=True):
                if value in self._watch:
                    self.found[value] = tensor.clone()
        return result

    def call(self, step: Operation | None, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator gives; ``step`` is what it should be."""
        del step
        return func(*args, **kwargs)


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operator that is called while it is active."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs more than a small operator

    def __init__(self, network: Network, state: Mapping[int, Value], paths: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._network, self._state, self._paths = network, state, paths
        self._values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self._places = [""]

    def value(self, tensor: Tensor, kind: Any = "constant") -> Value:
        """The value that a tensor is."""
        if known := self._state.get(id(tensor)):
            return known
        made = self._values.get(id(tensor))
        if made is not None and made[0]() is tensor:
            return made[1]
        return self._enter(tensor, Value(tuple(tensor.shape), kind, "", tensor.element_size()))

    def _enter(self, tensor: Tensor, value: Value) -> Value:
        self._values[id(tensor)] = (weakref.ref(tensor), value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen_args = [self._read(item) for item in args]
        seen_kwargs = {name: self._read(item) for name, item in kwargs.items()}
        result = func(*args, **kwargs)
        made = [leaf for leaf in (result if isinstance(result, list | tuple) else [result]) if _is_tensor(leaf)]
        if made:
            outputs = [Value(tuple(tensor.shape), itemsize=tensor.element_size()) for tensor in made]
            self._network.operations.append(read(func, seen_args, seen_kwargs, outputs, self._places[-1]))
            for tensor, value in zip(made, outputs, strict=True):
                if id(tensor) not in self._state:
                    self._enter(tensor, value)
        return result

    def _read(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.value(item)
        if isinstance(item, list | tuple):
            return [self._read(part) for part in item]
        return item

    @contextmanager
    def following(self) -> Iterator[None]:
        """Know at every moment which module runs."""

        def enter(module: nn.Module, _: Any) -> None:
            self._places.append(self._paths.get(id(module), self._places[-1]))

        def leave(*_: Any) -> None:
            self._places.pop()

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` as the operators that it is, not as one fused call."""
    before: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
