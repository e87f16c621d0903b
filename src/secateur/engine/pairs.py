"""Pairs: what the same matrices see in the dense model and behind the cuts, side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.activations import real
from secateur.engine.blocks import BlockRunner
from secateur.evidence import CrossMoments, Later, Total
from secateur.families import Block
from secateur.families.roles import ATTENTION_WRITERS, BEHIND_A_WRITER, IN_THE_STREAM

CROSS, TARGET = "cross", "target"
COMPARING = (f".{CROSS}", f".{TARGET}")
"""How the names of such evidence end."""
_NORMS = {"out": "attention_norm", "down": "ffn_norm"}

Seen = dict[tuple[str, str], Tensor]
"""What one run saw, by role and by what of it: ``in``, ``out`` or the ``stream`` in front of the branch."""


class Pairs:
    """Products of signals of the dense model with the inputs of a matrix behind the cuts.

    ``ROLE.cross`` is the sum over tokens of x' x^T, x' being the input of the role's matrix in the dense model and x
    behind the cuts; ``ROLE.target`` of y x^T, y being what the branch that the role closes has to write for the
    stream behind it to be the dense model's again: the dense branch's output and what the streams in front differ by.
    Where a norm stands behind the branch, or both branches of a block write side by side, it is the output alone.

    Args:
        runner: runs the block behind the cuts.
        block: which; None for the stem, whose head has inputs.
        wanted: the names above; those of roles that are not there, or lie in experts, are passed over.
        later: see :class:`secateur.evidence.Total`.
    """

    def __init__(self, runner: BlockRunner, block: Block, wanted: Collection[str], later: Later | None = None) -> None:
        architecture = runner.architecture
        self._architecture, self._block = architecture, block
        self._sums: dict[str, CrossMoments] = {}
        self._roles: set[str] = set()
        present = {
            tensor.role: architecture.shapes[tensor.name]
            for tensor in architecture.tensors_of(block)
            if tensor.kind == "weight" and tensor.expert is None
        }
        if block is None and architecture.family.has_head:  # also one that is tied has inputs
            present["head"] = (architecture.sizes.vocab, architecture.sizes.residual)
        for name in sorted(wanted):
            role, _, kind = name.rpartition(".")
            if kind in (CROSS, TARGET) and role in present:
                rows, columns = present[role]
                self._sums[name] = CrossMoments(columns if kind == CROSS else rows, columns, runner.device, later)
                self._roles.add(role)
        beside = architecture.roles_of(block)
        self._corrects = not architecture.parallel and not beside.intersection((*BEHIND_A_WRITER, *IN_THE_STREAM))
        self._gain = float(getattr(architecture.config, architecture.family.branch_multiplier or "", 1.0))
        self._dense: Seen = {}
        self._cut: Seen = {}

    @property
    def wanted(self) -> bool:
        """Whether there is anything to see."""
        return bool(self._sums)

    @contextmanager
    def see(self, runner: BlockRunner, dense: bool) -> Iterator[None]:
        """Take note of what the block sees inside, in the dense model or behind the cuts."""
        seen = self._dense if dense else self._cut
        with ExitStack() as stack:
            for role in self._roles:
                module = runner.model.get_submodule(self._architecture.module_of(role, self._block))
                stack.callback(module.register_forward_hook(_noting(seen, role)).remove)
                norm = _NORMS.get("out" if role in ATTENTION_WRITERS else role)
                if norm is not None and self._corrects:
                    stream = runner.norm_on_stream(norm, self._block)
                    stack.callback(stream.register_forward_pre_hook(_noting_input(seen, role)).remove)
            yield

    def see_head(self, dense: Tensor, cut: Tensor) -> None:
        """Take note of what the head reads."""
        self._dense["head", "in"], self._cut["head", "in"] = dense, cut

    def add(self, there: Tensor | None = None) -> None:
        """Add the products of the batch that both have seen, of the tokens that are ``there``."""
        if there is not None:
            for seen in (self._dense, self._cut):
                seen.update({key: real(signal, there) for key, signal in seen.items()})
        for name, sums in self._sums.items():
            role, _, kind = name.rpartition(".")
            inputs = self._cut[role, "in"]
            if kind == CROSS:
                sums.add(self._dense[role, "in"], inputs)
                continue
            wanted = self._dense[role, "out"]
            if self._corrects:
                behind = (self._dense[role, "stream"] - self._cut[role, "stream"]) / self._gain
                wanted = wanted + behind.reshape(wanted.shape)
            sums.add(wanted, inputs)
        self._dense.clear()
        self._cut.clear()

    @property
    def totals(self) -> list[Total]:
        return [total for sums in self._sums.values() for total in sums.totals]

    def close_shard(self) -> None:
        """End a logical shard of the data."""
        for sums in self._sums.values():
            sums.close_shard()

    def evidence(self) -> dict[str, Tensor]:
        """All sums, by name."""
        return {name: sums.total for name, sums in self._sums.items()}


def _noting(seen: Seen, role: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        seen[role, "in"], seen[role, "out"] = inputs[0], output[0] if isinstance(output, tuple) else output

    return hook


def _noting_input(seen: Seen, role: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[role, "stream"] = inputs[0]

    return hook


def head_inputs(runner: BlockRunner, signal: Tensor) -> Tensor:
    """What the head reads when the last block gives ``signal``."""
    with torch.no_grad():
        found: Tensor = runner.norm_on_stream("final_norm", None)(signal)
    return found
