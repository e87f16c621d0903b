"""Trials: the whole network with some tensors edited, on the calibration text: its loss and its gradients.

What the loss is follows from the data (:mod:`secateur.engine.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.checkpoints import Checkpoint
from secateur.data.windows import Windows
from secateur.engine.activations import Activations, require_finite_signal, stored
from secateur.engine.blocks import BlockRunner
from secateur.engine.collector import Collector
from secateur.engine.journal import Journal
from secateur.engine.objectives import objective_of
from secateur.errors import InternalError, refuse
from secateur.evidence import Influence
from secateur.families import Block
from secateur.methods.base import Derivative, Gradients
from secateur.plans.plan import place_of

_RESIDENT = 2 * 2**30  # bytes of weights that stay loaded from one trial to the next
_REMEMBERED = 2**31  # bytes of signals in front of the blocks that stay

Edited = Mapping[str, Tensor]


class CalibrationTrials:
    """Runs the stock model block by block with edited tensors; weights of small models stay loaded.

    Args:
        checkpoint: the dense model.
        data: the calibration windows, and what the loss on them is.
        dtype, device: of the computation.
        folder: where large signals are kept.
        journal: losses are recorded, so that an interrupted run does not compute them again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Windows,
        dtype: torch.dtype,
        device: torch.device,
        folder: Path,
        journal: Journal,
    ) -> None:
        self._checkpoint, self._ids, self._folder, self._journal = checkpoint, data.ids, folder, journal
        self._objective = objective_of(checkpoint, data)
        self._runner = BlockRunner(checkpoint.architecture, dtype, device, checkpoint.rest())
        self._resident = checkpoint.params * dtype.itemsize <= _RESIDENT
        self._weights: dict[Block, dict[str, Tensor]] = {}
        self._loaded: dict[Block, dict[str, Tensor]] = {}
        self._recorded = [float(record["loss"]) for record in journal.done("trial")]
        self._count = 0
        self._base: Edited = {}
        self._signals: list[Tensor] = []
        self._dense: Tensor | None = None  # signal behind the last block of the dense model
        self._activations: Activations | None = None
        self._first: Tensor | None = None

    @property
    def count(self) -> int:
        """Losses asked for so far."""
        return self._count

    # -- loading ---------------------------------------------------------------------------------------------------

    def _read(self, place: Block) -> dict[str, Tensor]:
        if not self._resident:
            return self._checkpoint.read(place)
        if place not in self._weights:
            self._weights[place] = self._checkpoint.read(place)
        return self._weights[place]

    def _load(self, place: Block, edits: Edited) -> None:
        """Bring the modules of a place in line with the edits of it."""
        dense = self._read(place)
        mine = {name: edits[name] for name in edits if name in dense}  # no other is loaded
        before = self._loaded.get(place)
        same = before is not None and before.keys() == mine.keys() and all(before[n] is mine[n] for n in mine)
        if not same:
            self._runner.load(place, {**dense, **mine})
            self._loaded[place] = mine

    def _free(self, place: Block) -> None:
        if not self._resident:
            self._runner.unload(place)
            self._loaded.pop(place, None)

    def _start(self, edits: Edited) -> Activations:
        """Signals in front of the first block."""
        self._load(None, edits)
        edited = any(map(_before_blocks, edits))
        if self._activations is None:
            self._activations = Activations(self._ids, self._runner, self._folder / "trials.bin", self._objective.group)
        if edited or self._first is None:
            self._activations.capture()
            self._first = None if edited else self._activations.values.clone()
        else:
            self._activations.values.copy_(self._first)
        return self._activations

    # -- losses ----------------------------------------------------------------------------------------------------

    def loss(self, edits: Edited | None = None) -> float:
        """Mean negative log-likelihood per prediction with ``edits`` in place, in nats.

        Args:
            edits: canonical tensors in dense shape, by name.
        """
        return self._recorded_or(lambda: self._loss(edits or {}, False))

    def settle(self, edits: Edited | None = None) -> float:
        """The loss with ``edits``, from which the next trials start: they run from the first block that differs."""
        self._base, self._signals = dict(edits or {}), []
        return self._recorded_or(lambda: self._loss(self._base, True))

    def divergence(self, edits: Edited | None = None) -> float:
        """Mean divergence KL(dense || edited) per prediction, in nats.

        Args:
            edits: canonical tensors of blocks in dense shape, by name.
        """
        return self._recorded_or(lambda: self._divergence(edits or {}))

    def _recorded_or(self, compute: Callable[[], float]) -> float:
        self._count += 1
        if self._count <= len(self._recorded):
            return self._recorded[self._count - 1]
        value = compute()
        self._journal.add("trial", loss=value)
        return value

    def _loss(self, edits: Edited, remember: bool) -> float:
        values = self._forward(edits, remember).values
        return self._mean(lambda ids, batch: _cross_entropy(*self._predictions(ids, values[batch])))

    def _divergence(self, edits: Edited) -> float:
        if any(name.startswith("stem.") for name in edits):
            raise InternalError("divergence", "the divergence of an edited stem", "the dense head is not at hand")
        if self._dense is None:
            dense = self._forward({}, False)
            self._dense = self._signals_file(dense, 1, "dense.bin")[0]
            self._dense.copy_(dense.values)
        first, second = self._dense, self._forward(edits, False).values

        def part(ids: Tensor, batch: slice) -> Tensor:
            (dense, _), (edited, _) = (self._predictions(ids, hidden[batch]) for hidden in (first, second))
            return _divergence(dense, edited)

        return self._mean(part)

    @torch.no_grad()
    def _predictions(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._objective.predictions(self._runner, ids, hidden.to(self._runner.device))

    def _mean(self, part: Callable[[Tensor, slice], Tensor]) -> float:
        """Mean per prediction of a sum over those of a batch; infinite where it is no number."""
        assert self._activations is not None
        total = sum(float(part(self._ids[batch], batch)) for batch in self._activations.batches)
        mean = total / self._objective.count(self._ids)
        return mean if math.isfinite(mean) else math.inf

    def _forward(self, edits: Edited, remember: bool) -> Activations:
        """The signal behind the last block."""
        blocks = len(self._runner.blocks)
        changed = {n for n in {*edits, *self._base} if edits.get(n) is not self._base.get(n)}
        places = {place_of(name) for name in changed}
        start = next((b for b in range(blocks) if f"blocks.{b}" in places), blocks - 1)
        if not self._signals or any(map(_before_blocks, changed)) or self._activations is None:
            start, activations = 0, self._start(edits)
        else:
            activations = self._activations
            self._load(None, edits)
            activations.values.copy_(self._signals[start])
        remember = remember and activations.values.numel() * activations.values.itemsize * blocks <= _REMEMBERED
        for block in range(start, blocks):
            if remember:
                self._signals.append(activations.values.clone())
            self._advance(activations, block, edits)
        return activations

    def _advance(self, activations: Activations, block: int, edits: Edited) -> None:
        self._load(block, edits)
        for batch in activations.batches:
            hidden = activations.values[batch].to(self._runner.device)
            output = self._runner.run(block, hidden, activations.call(batch, block))
            activations.values[batch] = output.to(activations.values.device)
        self._free(block)

    # -- gradients -------------------------------------------------------------------------------------------------

    def gradients(
        self,
        edits: Edited | None = None,
        wanted: tuple[Derivative, ...] = ("mean",),
        generator: torch.Generator | None = None,
    ) -> Iterator[Gradients]:
        """Gradients of the mean loss, place by place from the head to the first block, by recomputing each block.

        Never more than one block's gradients are held. Those of the token embedding come last, where they are wanted.

        Args:
            edits: canonical tensors in dense shape, by name.
            wanted: which fields to fill.
            generator: draws the labels from the network's own predictions instead of taking the text's; not those
                of the tables.
        """
        edits = edits or {}
        runner, blocks = self._runner, len(self._runner.blocks)
        activations = self._start(edits)
        inputs = self._signals_file(activations, blocks + 1, "signals.bin")
        influences = []
        for block in range(blocks):
            inputs[block] = activations.values
            self._advance(activations, block, edits)
            influence = Influence()
            for batch in activations.batches:
                require_finite_signal(activations.values[batch], f"block {block}", batch.start)
                influence.add(inputs[block][batch], activations.values[batch])
            influences.append(influence.named()["influence"])
        inputs[blocks] = activations.values
        count, group = self._objective.count(self._ids), self._objective.group
        samples = [slice(i, i + group) for i in range(0, len(self._ids), group)]
        rows = samples if "squares" in wanted else activations.batches
        backward = torch.empty_like(activations.values)
        for place in (None, *reversed(range(blocks))):
            self._load(place, edits)
            collector = Collector(runner, place, wanted, count, len(samples))
            signals = inputs[blocks if place is None else place]
            for batch in rows:
                hidden = signals[batch].to(runner.device).requires_grad_(True)
                with torch.enable_grad(), collector.listening():
                    if place is None:
                        predicted, right = self._objective.predictions(runner, self._ids[batch], hidden)
                        labels = right if generator is None else _drawn(predicted, generator)
                        output = _cross_entropy(predicted, labels) / count
                        given = None
                    else:
                        containing = next(b for b in activations.batches if b.start <= batch.start < b.stop)
                        call = activations.call_for(containing, batch, place)
                        output, given = runner.compute(place, hidden, call), backward[batch].to(runner.device)
                    sources = [hidden, *collector.parameters, *collector.heard]
                    found = torch.autograd.grad(output, sources, given, allow_unused=True)
                assert found[0] is not None
                require_finite_signal(found[0], _gradients_at(place), batch.start)
                collector.add(found[1:])  # before the next line: one of them may be the old content of that memory
                backward[batch] = found[0].to(backward.device)
            influence_of = torch.zeros(0) if place is None else influences[place]
            yield Gradients(place, *collector.close(), influence_of)
            if place is not None:
                self._free(place)
        if "tables" in wanted:
            self._load(None, edits)
            collector = Collector(runner, None, wanted, count, len(samples), tables=True)
            for batch in rows:
                ids = self._ids[batch]
                with torch.enable_grad():
                    first, _ = runner.captured(ids)
                    output = (first * backward[batch].to(first)).sum()
                    if runner.architecture.sizes.tied and self._objective.reads_head:  # it reads the same table
                        behind = inputs[blocks][batch].to(runner.device)
                        output = output + _cross_entropy(*self._objective.predictions(runner, ids, behind)) / count
                    collector.add(torch.autograd.grad(output, collector.parameters, allow_unused=True))
            yield Gradients(None, *collector.close(), torch.zeros(0))

    def _signals_file(self, activations: Activations, count: int, name: str) -> Tensor:
        values = activations.values
        return stored(self._folder / name, (count, *values.shape), values.dtype, _REMEMBERED // 4)

    # -- the network -----------------------------------------------------------------------------------------------

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The whole stock model, loaded and frozen, for methods that learn gates on it.

        Raises:
            RequestError: it does not fit in memory, or does not predict tokens.
        """
        if not self._objective.reads_head:
            found = "it makes embeddings, and gates are learned on the loss of the next token"
            refuse("objective", "learning on this model", found, "a method or mode that learns no gates")
        if not self._resident and self._runner.device.type == "cpu":
            found = f"its weights take more than {_RESIDENT / 2**30:.0f} GiB, and gates are learned on the whole model"
            refuse("too-large", "learning on this model", found, "--device cuda, or a method without learning")
        for place in self._checkpoint.architecture.places:
            self._load(place, {})
        yield self._runner.model


def _gradients_at(place: Block) -> str:
    return f"the gradients in front of {'the final norm' if place is None else f'block {place}'}"


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the predictions themselves."""
    chances = logits.detach().float().softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)


def _before_blocks(name: str) -> bool:
    """Whether a tensor shapes the first block's input."""
    return name.startswith(("stem.embedding", "stem.positions"))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _divergence(dense: Tensor, edited: Tensor) -> Tensor:
    first, second = (logits.log_softmax(-1) for logits in (dense, edited))
    return functional.kl_div(second, first, log_target=True, reduction="sum")
