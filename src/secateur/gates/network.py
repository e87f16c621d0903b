"""Gates on the modules of a stock network, through hooks: nothing of the network is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.families import Architecture, Packed
from secateur.families.roles import TABLES
from secateur.gates.vectors import Gate, Gates

Values = Callable[[str], Tensor]


class GatedNetwork:
    """A frozen stock network whose signals are multiplied by gates.

    A read is gated where the matrix takes its input, a write where it gives its output, neurons and groups where they
    are read; each signal once.

    Args:
        model: the stock network.
        gates: which, and of which architecture.
    """

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        self.model, self.gates, self._values = model, gates, dict[str, Tensor]()

    def loss(self, ids: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood per predicted token of ids [windows, tokens] behind gates by name."""
        self._values = dict(values)
        device = next(self.model.parameters()).device
        ids = ids.to(device)
        logits = self.model(input_ids=ids, use_cache=False).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    @contextmanager
    def open(self) -> Iterator[None]:
        """The gates are in place inside."""
        architecture = self.gates.architecture
        with ExitStack() as stack:
            for place in architecture.places:
                done: set[tuple[str, int]] = set()
                for packed in architecture.packed_of(place):
                    self._install(stack, architecture, packed, done)
            yield

    def _install(
        self, stack: ExitStack, architecture: Architecture, packed: Packed, done: set[tuple[str, int]]
    ) -> None:
        tensor = architecture.tensors[packed.canonical[0]]
        path, _, leaf = packed.name.rpartition(".")
        if tensor.kind != "weight" or len(tensor.axes) != 2:
            return
        for dimension in (0, 1):
            gate = self.gates.along(tensor, dimension, dimension)
            if gate is None or (path, dimension) in done or not _carries(tensor.role, dimension, gate):
                continue
            done.add((path, dimension))
            module = self.model.get_submodule(path)
            if packed.stacked and dimension:
                stack.enter_context(self._inside(module, leaf, packed))
                continue
            span = architecture.shapes[tensor.name][dimension] // gate.size
            handle = (
                module.register_forward_pre_hook(self._on_input(gate.name, span))
                if dimension and tensor.role not in TABLES
                else module.register_forward_hook(self._on_output(gate.name, span))
            )
            stack.callback(handle.remove)

    def _on_input(self, name: str, span: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * self._spread(name, span, inputs[0]), *inputs[1:])

        return hook

    def _on_output(self, name: str, span: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output * self._spread(name, span, output)

        return hook

    def _spread(self, name: str, span: int, like: Tensor) -> Tensor:
        return self._values[name].repeat_interleave(span).to(like)

    @contextmanager
    def _inside(self, module: nn.Module, leaf: str, packed: Packed) -> Iterator[None]:
        """The columns of stacked experts' readers, gated before every call: no module stands at a single expert."""
        parameter = module._parameters.pop(leaf)
        assert parameter is not None
        names = [self.gates.along(self.gates.architecture.tensors[part], 1, 1) for (part,) in packed.parts]

        def hook(_: nn.Module, __: Any) -> None:
            values = torch.stack([self._values[gate.name] for gate in names if gate is not None]).to(parameter)
            object.__setattr__(module, leaf, parameter * (values[:, :, None] if packed.transposed else values[:, None]))

        handle = module.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()
            object.__delattr__(module, leaf) if leaf in module.__dict__ else None
            module._parameters[leaf] = parameter


def _carries(role: str, dimension: int, gate: Gate) -> bool:
    """Whether a signal is gated here, rather than where the same entries are read or written."""
    if gate.field in ("ffn", "shared"):
        return role == "down" and dimension == 1
    if gate.field == "kv":
        return role == "out" and dimension == 1
    if gate.field == "residual":  # what is never written is never read
        return role in TABLES or (role in ("out", "latent_out", "down") and dimension == 0)
    return True
