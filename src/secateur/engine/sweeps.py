"""The sweeps over a checkpoint: summarise every place, then cut every place. Each keeps a journal and resumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.checkpoints import Checkpoint, OutputLayout, TensorWriter, require_finite
from secateur.checkpoints.layout import Piece
from secateur.cuts import cut_place
from secateur.engine.ahead import ahead, to_send
from secateur.engine.blocks import BlockRunner
from secateur.engine.fisher import FisherFiles
from secateur.engine.heap import give_back
from secateur.engine.journal import Journal
from secateur.engine.processes import ALONE, Processes
from secateur.engine.progress import Progress
from secateur.engine.solvable import solving
from secateur.engine.taps import Taps
from secateur.engine.walk import Walk
from secateur.families import Architecture, Block
from secateur.methods.base import Method
from secateur.plans import Plan
from secateur.spaces import BlockView


class Summaries(Mapping[str, Iterable[Tensor]]):
    """What ``score`` returned, on disk, one file per place; tensors are loaded while iterating.

    Args:
        folder: where the files are.
        names: names in each place's file, in the order of the places.
    """

    def __init__(self, folder: Path, names: list[tuple[str, list[str]]]) -> None:
        self._folder, self._names = folder, names

    def __getitem__(self, name: str) -> Iterable[Tensor]:
        if all(name not in names for _, names in self._names):
            raise KeyError(name)
        return (self._load(file, name) for file, names in self._names if name in names)

    def _load(self, file: str, name: str) -> Tensor:
        with safe_open(self._folder / file, "pt") as handle:  # not what else was noted of the place
            found: Tensor = handle.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for _, names in self._names for name in names))

    def __len__(self) -> int:
        return len(set(iter(self)))


def _summary_file(place: Block) -> str:
    return f"summary-{'stem' if place is None else place}.safetensors"


class SummarySweep:
    """Fill the work folder with the summaries of every place.

    Args:
        checkpoint: the dense model.
        method: whose ``score`` to call.
        folder: the work folder.
        journal: records every finished place.
        processes: those that share the calibration data.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: Method,
        folder: Path,
        journal: Journal,
        progress: Progress,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self.checkpoint, self.method, self.folder = checkpoint, method, folder
        self.journal, self.progress = journal, progress
        self._done = {record["place"]: record["names"] for record in journal.done("summary")}

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def _keep(self, place: Block, view: BlockView, evidence: Mapping[str, Tensor]) -> None:
        with solving("scoring", place):
            scores = self.method.score(view, evidence)
        summary = {name: tensor.contiguous().cpu() for name, tensor in scores.items()}
        if summary:
            temporary = self.folder / "summary.new"
            save_file(summary, temporary)
            temporary.replace(self.folder / _summary_file(place))
        self._done[place] = sorted(summary)
        self.journal.add("summary", place=place, names=sorted(summary))

    def summaries(self) -> Summaries:
        order = [place for place in self.architecture.places if self._done.get(place)]
        return Summaries(self.folder, [(_summary_file(place), self._done[place]) for place in order])

    def from_weights(self) -> None:
        """One pass over the weights a data-free score reads."""
        if self.method.roles == ():
            return
        self.progress.start("score", len(self.architecture.places))
        missing = [place for place in self.architecture.places if place not in self._done]
        for place, view in ahead(lambda place: view_of(self.checkpoint, place, self.method.roles), missing):
            self._keep(place, view, {})
            self.progress.step(len(self._done))

    def from_data(self, ids: Tensor, runner: BlockRunner, fisher: FisherFiles | None = None) -> None:
        """One dense forward pass, block by block; gathers what the method's ``evidence`` names."""
        method, blocks = self.method, len(self.architecture.sizes.blocks)
        if not method.evidence or all(place in self._done for place in self.architecture.places):
            return
        self.progress.start("gather", blocks)
        walk = Walk(self.checkpoint, runner, ids, self.folder, "activations", processes=self._processes)
        walk.resume(next((b for b in range(blocks) if b not in self._done), blocks))
        read = to_send(self.checkpoint.read, runner.device)
        for block, tensors in ahead(read, range(walk.block, blocks)):
            taps = None if block in self._done else Taps(runner, block, method.evidence)
            walk.run(tensors, taps)
            if taps is not None:
                evidence = {**taps.evidence(), **({} if fisher is None else fisher.of(block))}
                self._keep(block, BlockView(self.architecture, block, tensors), evidence)
            self.progress.step(block + 1)
        if None not in self._done:
            self._keep(None, BlockView(self.architecture, None, {}), walk.stem(self.method.evidence))
        walk.close()


def view_of(checkpoint: Checkpoint, place: Block, roles: tuple[str, ...] | None) -> BlockView:
    """The tensors of a place, of some roles only."""
    architecture = checkpoint.architecture
    names = [t.name for t in architecture.tensors_of(place) if roles is None or t.role in roles]
    return BlockView(architecture, place, checkpoint.read(place, names))


_HINT = "the cut made them, or its data type cannot hold them: try another method"


def _finite(piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
    """What is written of a piece; never NaN or infinity."""
    packed: Tensor = piece.packed.pack(tensors)
    require_finite(piece.header.name, packed, _HINT)
    return packed


def cut_sweep(
    checkpoint: Checkpoint,
    target: Architecture,
    plan: Plan,
    layout: OutputLayout,
    writer: TensorWriter,
    journal: Journal,
    progress: Progress,
    device: torch.device,
) -> dict[str, str]:
    """Cut and write every place.

    Returns:
        SHA-256 of every tensor written, by its name in the output.
    """
    digests: dict[str, str] = {}
    for record in journal.done("cut"):
        digests.update(record["tensors"])
    # what an interrupted run claims is believed only if the file says the same
    intact = {name for name, digest in digests.items() if writer.digest(name) == digest}
    progress.start("cut", len(layout.pieces))
    missing = [p for p, pieces in layout.pieces.items() if not all(piece.header.name in intact for piece in pieces)]
    for number, (place, read) in enumerate(ahead(checkpoint.read, missing), len(layout.pieces) - len(missing) + 1):
        dense = {name: tensor.to(device) for name, tensor in read.items()}
        tensors = cut_place(checkpoint.architecture, target, place, dense, plan)
        written = writer.write_all({p.header.name: partial(_finite, p, tensors) for p in layout.pieces[place]})
        digests.update(written)
        journal.add("cut", place=place, tensors=written)
        give_back()
        progress.step(number)
    copied = {}
    for source, header in layout.copies:
        if header.name not in intact:
            (_, tensor), *_ = checkpoint.folder.read([source])
            copied[header.name] = writer.write(header.name, tensor)
    if copied:
        journal.add("cut", place="copies", tensors=copied)
    return {**digests, **copied}
