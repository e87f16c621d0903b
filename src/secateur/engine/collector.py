"""Gradients of one place, summed over the calibration windows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.blocks import BlockRunner
from secateur.evidence import CrossMoments, Later, Total
from secateur.families import Block
from secateur.methods.base import Derivative

_SHORTCUTS = {"attention": "attention_shortcut", "ffn": "ffn_shortcut"}


class Collector:
    """Sums the gradients of one place over windows.

    Args:
        runner: whose modules they are of.
        place: block, or None for the stem.
        wanted: what to sum.
        predicted: predictions that the loss is a mean over.
        samples: pieces of the text whose losses stand by themselves.
        tables: of the stem, the embeddings instead of all others.
        later: see :class:`secateur.evidence.Total`.
    """

    def __init__(
        self,
        runner: BlockRunner,
        place: Block,
        wanted: Collection[Derivative],
        predicted: int,
        samples: int,
        tables: bool = False,
        later: Later | None = None,
    ) -> None:
        self._runner, self._wanted, self._predicted, self._samples = runner, wanted, predicted, samples
        architecture, names = runner.architecture, {"stem.embedding.weight", "stem.positions.weight"}
        weights = "mean" in wanted or "squares" in wanted
        self._packed = [
            p for p in architecture.packed_of(place) if weights and names.isdisjoint(p.canonical) is not tables
        ]
        self.parameters = [runner.parameter(packed).requires_grad_(True) for packed in self._packed]
        kinds = ("mean", "squares") if "squares" in wanted else ("mean",)
        self._mean, self._square = (
            [Total(tuple(p.shape), p.device, torch.float32, later) for p in self.parameters if kind in kinds]
            for kind in ("mean", "squares")
        )
        self._modules: dict[str, nn.Module] = {}
        if "signals" in wanted and place is not None:
            for branch, role in _SHORTCUTS.items():
                if role in architecture.shortcut_roles or architecture.parallel:
                    self._modules[branch] = runner.model.get_submodule(architecture.writer_of(role, place))
        self._signals = {
            b: CrossMoments(architecture.sizes.residual, architecture.sizes.residual, runner.device, later)
            for b in self._modules
        }
        self.heard: list[Tensor] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember what the branches give inside."""
        self.heard = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.heard.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for module in self._modules.values():
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def add(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Add the gradients of one batch with respect to the parameters and to what was heard."""
        count = len(self.parameters)
        for index, gradient in enumerate(gradients[:count]):
            if gradient is not None:
                self._mean[index].running += gradient
                if self._square:  # of the loss of this sample alone, not of its share of the mean
                    self._square[index].running += (gradient.float() * self._samples).square() / self._samples
        for sums, gradient in zip(self._signals.values(), gradients[count:], strict=True):
            if gradient is not None:
                sums.add(gradient, gradient)

    @property
    def totals(self) -> list[Total]:
        return [*self._mean, *self._square, *(total for sums in self._signals.values() for total in sums.totals)]

    def close_shard(self) -> None:
        """End a logical shard of the data."""
        for total in self.totals:
            total.close_shard()

    def close(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Means, squares and signals."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        shapes = self._runner.architecture.shapes
        both: list[dict[str, Tensor]] = [{}, {}]
        for found, sums in zip(both, (self._mean, self._square), strict=True):
            for packed, total in zip(self._packed, sums, strict=False):
                found.update(packed.unpack(total.value, shapes))
        signals = {branch: sums.total * self._predicted for branch, sums in self._signals.items()}
        return both[0], both[1], signals
