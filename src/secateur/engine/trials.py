"""Trials: the whole network with some tensors edited, on the calibration text: its loss and its gradients.

What the loss is follows from the data (:mod:`secateur.engine.objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.checkpoints import Checkpoint
from secateur.data.windows import Windows
from secateur.engine.blocks import BlockRunner
from secateur.engine.journal import Journal
from secateur.engine.network import Network
from secateur.engine.objectives import objective_of
from secateur.engine.processes import ALONE, Processes
from secateur.errors import InternalError, refuse
from secateur.families import Block
from secateur.methods.base import Derivative, Gradients
from secateur.plans.plan import place_of

_RESIDENT = 2 * 2**30  # bytes of weights that stay loaded from one trial to the next

Edited = Mapping[str, Tensor]


class CalibrationTrials:
    """Runs the stock model block by block with edited tensors; weights of small models stay loaded.

    Args:
        checkpoint: the dense model.
        data: the calibration windows, and what the loss on them is.
        dtype, device: of the computation.
        folder: where large signals are kept.
        journal: losses are recorded, so that an interrupted run does not compute them again.
        processes: those that share the windows.

    Raises:
        RequestError: nothing is predicted in the windows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Windows,
        dtype: torch.dtype,
        device: torch.device,
        folder: Path,
        journal: Journal,
        processes: Processes = ALONE,
    ) -> None:
        self._checkpoint, self._journal = checkpoint, journal
        self._objective = objective_of(checkpoint, data)
        self._predicted = self._objective.count(data.ids)
        if not self._predicted:
            found = f"windows of {data.ids.shape[1]} token, in which there is no next one to predict"
            refuse("short-text", "the loss on the calibration text", found, "a larger --length")
        self._runner = BlockRunner(checkpoint.architecture, dtype, device, checkpoint.rest())
        self._network = Network(self._runner, data.ids, self._objective, folder, processes)
        self._resident = checkpoint.params * dtype.itemsize <= _RESIDENT
        self._weights: dict[Block, dict[str, Tensor]] = {}
        self._loaded: dict[Block, dict[str, Tensor]] = {}
        self._recorded = [float(record["loss"]) for record in journal.done("trial")]
        self._count = 0
        self._base: Edited = {}
        self._started = False

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
            self._network.load(place, {**dense, **mine})
            self._loaded[place] = mine

    def _free(self, place: Block) -> None:
        if not self._resident:
            self._network.free(place)
            self._loaded.pop(place, None)

    def _start(self, edits: Edited) -> None:
        """Signals in front of the first block."""
        self._load(None, edits)
        self._network.start(any(map(_before_blocks, edits)))
        self._started = True

    # -- losses ----------------------------------------------------------------------------------------------------

    def loss(self, edits: Edited | None = None) -> float:
        """Mean negative log-likelihood per prediction with ``edits`` in place, in nats.

        Args:
            edits: canonical tensors in dense shape, by name.
        """
        return self._recorded_or(lambda: self._loss(edits or {}, False))

    def settle(self, edits: Edited | None = None) -> float:
        """The loss with ``edits``, from which the next trials start: they run from the first block that differs."""
        self._base = dict(edits or {})
        self._network.forget()
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
        self._forward(edits, remember)
        return self._mean(self._network.losses())

    def _divergence(self, edits: Edited) -> float:
        if any(name.startswith("stem.") for name in edits):
            raise InternalError("divergence", "the divergence of an edited stem", "the dense head is not at hand")
        if not self._network.has_dense:
            self._forward({}, False)
            self._network.keep_dense()
        self._forward(edits, False)
        return self._mean(self._network.divergences())

    def _mean(self, parts: Sequence[float]) -> float:
        """Mean per prediction of what the batches sum to; infinite where it is no number."""
        mean = sum(parts) / self._predicted
        return mean if math.isfinite(mean) else math.inf

    def _forward(self, edits: Edited, remember: bool) -> None:
        """Take the signal behind the last block."""
        network, blocks = self._network, len(self._runner.blocks)
        changed = {n for n in {*edits, *self._base} if edits.get(n) is not self._base.get(n)}
        places = {place_of(name) for name in changed}
        start = next((b for b in range(blocks) if f"blocks.{b}" in places), blocks - 1)
        if not network.remembered or any(map(_before_blocks, changed)) or not self._started:
            start = 0
            self._start(edits)
        else:
            self._load(None, edits)
            network.recall(start)
        remember = remember and network.remembers(blocks)
        for block in range(start, blocks):
            self._advance(block, edits, remember)

    def _advance(self, block: int, edits: Edited, remember: bool = False) -> None:
        self._load(block, edits)
        self._network.advance(block, remember)
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
        edits, network, blocks = edits or {}, self._network, len(self._runner.blocks)
        drawing = None if generator is None else generator.get_state()
        self._start(edits)
        network.open_gradients()
        influences = []
        for block in range(blocks):
            network.note(block)
            self._advance(block, edits)
            influences.append(network.influence(block))
        network.note(blocks)
        for place in (None, *reversed(range(blocks))):
            self._load(place, edits)
            found = network.backward(place, wanted, drawing if place is None else None)
            yield Gradients(place, *found, torch.zeros(0) if place is None else influences[place])
            if place is not None:
                self._free(place)
        if "tables" in wanted:
            self._load(None, edits)
            yield Gradients(None, *network.backward(None, wanted, None, tables=True), torch.zeros(0))

    # -- the network -----------------------------------------------------------------------------------------------

    @contextmanager
    def network(self) -> Iterator[nn.Module]:
        """The whole stock model, loaded and frozen, for methods that learn gates on it, in this process.

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
            self._network.hold(place, self._read(place))
        self._loaded.clear()  # the others do not have them
        yield self._runner.model


def _before_blocks(name: str) -> bool:
    """Whether a tensor shapes the first block's input."""
    return name.startswith(("stem.embedding", "stem.positions"))
