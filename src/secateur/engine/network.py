"""The network under trial: the stock model with some tensors edited, on this process' share of the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from secateur.engine.activations import Activations, require_finite_signal, stored
from secateur.engine.blocks import BlockRunner
from secateur.engine.collector import Collector
from secateur.engine.objectives import Objective, told_objective
from secateur.engine.processes import Processes, Shared, everywhere
from secateur.engine.telling import told_of
from secateur.evidence import Influence
from secateur.families import Block
from secateur.methods.base import Derivative

_REMEMBERED = 2**31  # bytes of signals in front of the blocks that stay


class Network(Shared):
    """What every process does of a trial, each on its own windows; sums come together in the first.

    Args:
        runner: the stock model.
        ids: [count, length] token ids of all windows.
        objective: what the loss is.
        folder: where large signals are kept.
        processes: those that share the windows.
    """

    def __init__(
        self, runner: BlockRunner, ids: Tensor, objective: Objective, folder: Path, processes: Processes
    ) -> None:
        self.runner, self.ids, self.objective = runner, ids, objective
        self._folder, self.processes = folder, processes
        told = {**told_of(runner), "ids": ids, "objective": told_objective(objective), "folder": str(folder)}
        self.number = processes.opened(self, "network", told)
        self._activations: Activations | None = None
        self._first: Tensor | None = None
        self._dense: Tensor | None = None  # signal behind the last block of the dense model
        self._signals: list[Tensor] = []
        self._inputs = torch.zeros(0)
        self._backward = torch.zeros(0)

    @property
    def activations(self) -> Activations:
        """The signal; its windows wait for the stem."""
        if self._activations is None:
            path, group = self._folder / "trials.bin", self.objective.group
            self._activations = Activations(self.ids, self.runner, path, group, self.processes.part)
        return self._activations

    # -- loading -------------------------------------------------------------------------------------------------------

    def hold(self, place: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give a place its tensors, in this process alone."""
        self.runner.load(place, tensors)

    @everywhere
    def load(self, place: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give a place its tensors."""
        self.hold(place, tensors)

    @everywhere
    def free(self, place: Block) -> None:
        self.runner.unload(place)

    # -- signals -------------------------------------------------------------------------------------------------------

    @everywhere
    def start(self, edited: bool) -> None:
        """Take the signal to the front of the first block.

        Args:
            edited: whether the stem is another than the dense one.
        """
        if edited or self._first is None:
            self.activations.capture()
            self._first = None if edited else self.activations.values.clone()
        else:
            self.activations.values.copy_(self._first)

    @everywhere
    def advance(self, block: int, remember: bool = False) -> None:
        """Take the signal through a block.

        Args:
            block: a loaded one.
            remember: keep what stands in front of it, too.
        """
        activations = self.activations
        if remember:
            self._signals.append(activations.values.clone())
        for batch in activations.batches:
            hidden = activations.values[batch].to(self.runner.device)
            output = self.runner.run(block, hidden, activations.call(batch, block))
            activations.values[batch] = output.to(activations.values.device)

    @everywhere
    def forget(self) -> None:
        """Drop what stands in front of the blocks."""
        self._signals = []

    @everywhere
    def recall(self, block: int) -> None:
        """Take the signal to where it was in front of a block."""
        self.activations.values.copy_(self._signals[block])

    @property
    def remembered(self) -> bool:
        return bool(self._signals)

    def remembers(self, blocks: int) -> bool:
        """Whether what stands in front of all blocks can stay."""
        values = self.activations.values
        return values.numel() * values.itemsize * blocks <= _REMEMBERED

    # -- losses --------------------------------------------------------------------------------------------------------

    @everywhere
    def losses(self) -> list[float]:
        """The summed loss of every batch, of all processes in the first."""
        values = self.activations.values
        return self._of_batches(lambda ids, batch: cross_entropy(*self._predictions(ids, values[batch])))

    @everywhere
    def keep_dense(self) -> None:
        """Keep the signal behind the last block as that of the dense model."""
        self._dense = self._file(1, "dense.bin")[0]
        self._dense.copy_(self.activations.values)

    @property
    def has_dense(self) -> bool:
        return self._dense is not None

    @everywhere
    def divergences(self) -> list[float]:
        """The summed divergence from the dense model's predictions of every batch, of all processes in the first."""
        assert self._dense is not None
        first, second = self._dense, self.activations.values

        def part(ids: Tensor, batch: slice) -> Tensor:
            (dense, _), (edited, _) = (self._predictions(ids, hidden[batch]) for hidden in (first, second))
            return _divergence(dense, edited)

        return self._of_batches(part)

    def _of_batches(self, part: Callable[[Tensor, slice], Tensor]) -> list[float]:
        found = [float(part(self.activations.ids[batch], batch)) for batch in self.activations.batches]
        return found + [each for other in self.processes.gather(found) for each in other]

    @torch.no_grad()
    def _predictions(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective.predictions(self.runner, ids, hidden.to(self.runner.device))

    # -- gradients -----------------------------------------------------------------------------------------------------

    @everywhere
    def open_gradients(self) -> None:
        """Make room for the signals in front of all blocks."""
        self._inputs = self._file(len(self.runner.blocks) + 1, "signals.bin")
        self._backward = torch.empty_like(self.activations.values)

    @everywhere
    def note(self, block: int) -> None:
        """Keep the signal as that in front of a block, or behind the last."""
        self._inputs[block] = self.activations.values

    @everywhere
    def influence(self, block: int) -> Tensor:
        """How much the block that the signal has just passed changes it."""
        found = Influence()
        for batch in self.activations.batches:
            first = self.activations.first + batch.start
            require_finite_signal(self.activations.values[batch], f"block {block}", first)
            found.add(self._inputs[block][batch], self.activations.values[batch])
        for other in self.processes.gather(found.parts):
            found.parts += other
        return found.named()["influence"]

    @everywhere
    def backward(
        self, place: Block, wanted: Sequence[Derivative], drawing: Tensor | None, tables: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the mean loss at a place, from those behind it, which they take the place of.

        Args:
            place: a loaded one, one in front of the last one asked for.
            wanted: which derivatives.
            drawing: state of the generator that draws labels from the network's own predictions, if it does.
            tables: of the stem, the embeddings instead of all others.
        """
        group = self.objective.group
        count, samples = self.objective.count(self.ids), len(range(0, len(self.ids), group))
        later = self.processes.later(self._folder / "gradients")
        collector = Collector(self.runner, place, wanted, count, samples, tables, later)
        labels = _Labels(self, drawing, "squares" in wanted)
        for shard in self._rows("squares" in wanted):
            for batch in shard:
                if tables:
                    collector.add(self._at_tables(batch, collector, count))
                    continue
                hidden = self._inputs[-1 if place is None else place][batch]
                hidden = hidden.to(self.runner.device).requires_grad_(True)
                with torch.enable_grad(), collector.listening():
                    if place is None:
                        predicted, right = self.objective.predictions(self.runner, self.activations.ids[batch], hidden)
                        output, given = cross_entropy(predicted, labels.of(predicted, right)) / count, None
                    else:
                        containing = next(b for b in self.activations.batches if b.start <= batch.start < b.stop)
                        call = self.activations.call_for(containing, batch, place)
                        output = self.runner.compute(place, hidden, call)
                        given = self._backward[batch].to(self.runner.device)
                    sources = [hidden, *collector.parameters, *collector.heard]
                    found = torch.autograd.grad(output, sources, given, allow_unused=True)
                assert found[0] is not None
                require_finite_signal(found[0], _gradients_at(place), self.activations.first + batch.start)
                collector.add(found[1:])  # before the next line: one of them may be the old content of that memory
                self._backward[batch] = found[0].to(self._backward.device)
            collector.close_shard()
        self.processes.combine(collector.totals)
        return ({}, {}, {}) if self.processes.rank else collector.close()

    def _rows(self, singly: bool) -> list[list[slice]]:
        """The rows that go backwards together, shard by shard: single samples or whole batches."""
        if not singly:
            return self.activations.shards
        group = self.objective.group
        return [
            [slice(at, at + group) for batch in shard for at in range(batch.start, batch.stop, group)]
            for shard in self.activations.shards
        ]

    def _at_tables(self, batch: slice, collector: Collector, count: int) -> tuple[Tensor | None, ...]:
        """Gradients of the embeddings."""
        ids, runner = self.activations.ids[batch], self.runner
        with torch.enable_grad():
            first, _ = runner.captured(ids)
            output = (first * self._backward[batch].to(first)).sum()
            if runner.architecture.sizes.tied and self.objective.reads_head:  # it reads the same table
                behind = self._inputs[-1][batch].to(runner.device)
                output = output + cross_entropy(*self.objective.predictions(runner, ids, behind)) / count
            return torch.autograd.grad(output, collector.parameters, allow_unused=True)

    def _file(self, count: int, name: str) -> Tensor:
        values = self.activations.values
        return stored(self._folder / name, (count, *values.shape), values.dtype, _REMEMBERED // 4)


def _gradients_at(place: Block) -> str:
    return f"the gradients in front of {'the final norm' if place is None else f'block {place}'}"


class _Labels:
    """The right classes, or some drawn from the predictions, as one process would draw them for all windows."""

    def __init__(self, network: Network, drawing: Tensor | None, singly: bool) -> None:
        self._network, self._singly = network, singly
        self._generator = None if drawing is None else torch.Generator()
        if self._generator is not None and drawing is not None:
            self._generator.set_state(drawing)
        self._behind = False

    def of(self, predicted: Tensor, right: Tensor) -> Tensor:
        """Labels of one batch."""
        if self._generator is None:
            return right
        if not self._behind:
            self._pass(predicted.shape[-1])
        chances = predicted.detach().float().softmax(-1).cpu()
        return torch.multinomial(chances, 1, generator=self._generator)[:, 0].to(predicted.device)

    def _pass(self, classes: int) -> None:
        """Use up what the windows of the processes before take: it depends on their number alone."""
        self._behind = True
        objective, ids = self._network.objective, self._network.ids
        for batch in self._network.activations.earlier:
            step = objective.group if self._singly else batch.stop - batch.start
            for start in range(batch.start, batch.stop, step):
                rows = objective.count(ids[start : start + step])
                torch.multinomial(torch.ones(rows, classes), 1, generator=self._generator)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood."""
    return functional.cross_entropy(logits, labels, reduction="sum")


def _divergence(dense: Tensor, edited: Tensor) -> Tensor:
    first, second = (logits.log_softmax(-1) for logits in (dense, edited))
    return functional.kl_div(second, first, log_target=True, reduction="sum")
