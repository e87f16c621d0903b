"""Readers: what enters the last matrix of each branch, kept, so that a block need not run whole for their sake."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.activations import Activations, stored
from secateur.engine.blocks import BlockRunner
from secateur.families.roles import ATTENTION_WRITERS, branch_of

_LARGEST = 16 * 2**30  # bytes of what is kept for one branch, on a disk with twice as many free; above it, nothing is
_WRITERS = ("up", "gate")
_READER = "down"


class Readers:
    """The inputs of a block's ``out`` and ``down`` on all windows, from one run of the block for the next.

    A stage of a mend most often changes only the matrix at the end of a branch. When the block then runs again, the
    attention gives what the new ``out`` makes of its old inputs, and the FFN what the new ``down`` makes of its own;
    norms and additions are the stock model's. The same operations on the same numbers give the same bits, which is
    checked on the first batch for every kind of block; where it does not hold, blocks run whole.

    Args:
        runner: whose blocks run.
        activations: the signal in front of the block.
        path: files that hold large inputs start with this name.
    """

    def __init__(self, runner: BlockRunner, activations: Activations, path: Path) -> None:
        self._runner, self._activations, self._path = runner, activations, path
        self._inputs: dict[str, Tensor] = {}
        self._shapes: dict[str, dict[int, torch.Size]] = {}
        self._tensors: Mapping[str, Tensor] = {}
        self._block, self._role, self._known = -1, "", frozenset[str]()
        self._proven: dict[tuple[frozenset[str], frozenset[str]], int | None] = {}
        self._parts = 0  # of what the attention returns, where it is not the signal alone

    def begin(
        self, block: int, tensors: Mapping[str, Tensor], seen: Collection[str], run: Callable[[slice], Tensor]
    ) -> None:
        """A run of a block, loaded with ``tensors``, begins.

        Args:
            block: its index.
            tensors: canonical tensors.
            seen: roles whose inputs are looked at; what they are must be computed.
            run: runs the loaded block on a batch, to try what is kept.
        """
        architecture = self._runner.architecture
        roles = architecture.roles_of(block)
        if block != self._block:
            self._block, self._shapes = block, {}
            self._role = next((role for role in ATTENTION_WRITERS if role in roles), "")
        changed, whole = self._changed(tensors), len(self._activations.batches)
        known = {role for role, seen in self._shapes.items() if len(seen) == whole and changed <= self._behind(role)}
        self._shapes = {role: seen for role, seen in self._shapes.items() if role in known}
        self._known = frozenset(role for role in known if not set(seen) - self._behind(role) - {self._role})
        self._tensors = dict(tensors)
        if self._known and whole:
            case = roles, self._known
            if case not in self._proven:
                self._proven[case] = self._tried(run)
            parts = self._proven[case]
            self._known, self._parts = (frozenset(), 0) if parts is None else (self._known, parts)

    def forget(self) -> None:
        """The block is done with."""
        self._block, self._shapes, self._tensors = -1, {}, {}

    def _behind(self, role: str) -> set[str]:
        """Roles on which the inputs of ``out`` or ``down`` do not depend."""
        roles = self._runner.architecture.roles_of(self._block)
        return {role} if role == _READER else {role, "ffn_norm", *(r for r in roles if branch_of(r) == "ffn")}

    def _changed(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Roles of the tensors whose values, in the type of the computation, are others than in the last run."""
        dtype, found = self._runner.dtype, set()
        for name, tensor in tensors.items():
            before = self._tensors.get(name)
            same = before is tensor or (before is not None and torch.equal(before.to(dtype), tensor.to(dtype)))
            if not same:
                found.add(self._runner.architecture.tensors[name].role)
        return found

    def _tried(self, run: Callable[[slice], Tensor]) -> int | None:
        """Parts of what the attention returns, if the first batch gives the same bits whole and from what is kept."""
        batch, parts = self._activations.batches[0], [0]

        def note(_: nn.Module, __: Any, output: Any) -> None:
            parts[0] = len(output) if isinstance(output, tuple) else 0

        with ExitStack() as stack:
            if self._role in self._known:
                stack.callback(self._attention().register_forward_hook(note).remove)
            whole = run(batch)
        self._parts = parts[0]
        try:
            with self._replaced(batch):
                return parts[0] if torch.equal(whole, run(batch)) else None
        except (RuntimeError, TypeError, ValueError):  # the stock class does more between these modules than is known
            return None

    def _module(self, role: str) -> nn.Module:
        found: nn.Module = self._runner.model.get_submodule(self._runner.architecture.module_of(role, self._block))
        return found

    def _attention(self) -> nn.Module:
        """The module around the last matrix of the attention."""
        name = self._runner.architecture.module_of(self._role, self._block)
        found: nn.Module = self._runner.model.get_submodule(name.rpartition(".")[0])
        return found

    @contextmanager
    def open(self, batch: slice, keep: bool) -> Iterator[None]:
        """Run the block inside on one batch, from what is known.

        Args:
            batch: which.
            keep: whether to keep what is not known for the next run.
        """
        with ExitStack() as stack:
            if keep and self._runner.device.type == "cpu":  # elsewhere moving it would take as long as running again
                for role in self._single() - self._known:
                    stack.callback(self._module(role).register_forward_pre_hook(self._keeping(role, batch)).remove)
            stack.enter_context(self._replaced(batch))
            yield

    def _single(self) -> set[str]:
        """Roles whose inputs can be kept: of one module each, inside another than the block."""
        found, runner = set[str](), self._runner
        for tensor in runner.architecture.tensors_of(self._block):
            if tensor.kind == "weight" and tensor.expert is None and tensor.role in (self._role, _READER):
                found.add(tensor.role)
        if self._role in found and self._attention() is runner.blocks[self._block]:
            found.remove(self._role)
        return found if self._role in found else set()  # a branch that runs again costs what the other one saves

    def _keeping(self, role: str, batch: slice) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (signal,) = inputs
            place = self._place(role, signal.shape[-1], signal.dtype)
            if place is not None and signal.numel() == place[batch].numel():
                place[batch].copy_(signal.reshape(place[batch].shape))
                self._shapes.setdefault(role, {})[batch.start] = signal.shape

        return hook

    def _place(self, role: str, width: int, dtype: torch.dtype) -> Tensor | None:
        """Where the inputs of a role lie, [count, length, width]; None for too many."""
        shape = (*self._activations.ids.shape, width)
        known = self._inputs.get(role)
        if known is None or known.shape != shape or known.dtype != dtype:
            needed = self._activations.ids.numel() * width * dtype.itemsize
            if needed > min(_LARGEST, shutil.disk_usage(self._path.parent).free // 2):
                return None
            self._inputs[role] = stored(self._path.with_suffix(f".{role}.bin"), shape, dtype)
        return self._inputs[role]

    @contextmanager
    def _replaced(self, batch: slice) -> Iterator[None]:
        """The block computes inside what is known of a batch from what is kept."""
        kept = {role: self._inputs[role][batch].clone().view(self._shapes[role][batch.start]) for role in self._known}
        with ExitStack() as stack:
            if self._role in kept:
                out, parts = self._module(self._role), self._parts

                def attend(*_: Any, **__: Any) -> Any:
                    found = out(kept[self._role])
                    return (found, *[None] * (parts - 1)) if parts else found

                stack.enter_context(_forward(self._attention(), attend))
            if _READER in kept:
                reader = self._module(_READER)
                stack.callback(reader.register_forward_pre_hook(lambda *_: (kept[_READER],)).remove)
                for packed in self._runner.architecture.packed_of(self._block):
                    tensors = [self._runner.architecture.tensors[name] for name in packed.canonical]
                    alone = all(tensor.role in _WRITERS and tensor.expert is None for tensor in tensors)
                    if alone and packed.name.endswith(".weight"):
                        width = packed.shape(self._runner.architecture.shapes)[-2 + packed.transposed]
                        module = self._runner.model.get_submodule(packed.name.removesuffix(".weight"))
                        stack.enter_context(_forward(module, _silent(width)))
            yield


def _silent(width: int) -> Callable[[Tensor], Tensor]:
    """A matrix whose outputs nobody reads."""
    return lambda signal: signal.new_zeros(()).expand(*signal.shape[:-1], width)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
