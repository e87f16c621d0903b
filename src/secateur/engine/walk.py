"""A walk: the calibration signal on its way through the model, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.engine.activations import Activations, real, require_finite_signal
from secateur.engine.blocks import BlockRunner
from secateur.engine.processes import ALONE, Processes, Shared, everywhere
from secateur.engine.readers import Readers
from secateur.engine.taps import Enough, Taps
from secateur.engine.telling import told_of
from secateur.families import Block

_SAVE_EVERY = 60.0  # seconds of work between two copies of the activations


class Walk(Shared):
    """Carries all calibration windows from block to block, and goes on where an interrupted walk was.

    Args:
        checkpoint: whose stem makes the first block's inputs.
        runner: the stock model.
        ids: [count, length] token ids.
        folder: where large signals and copies are kept.
        name: of this walk, apart from others in the same folder.
        beside: a walk of the dense model that goes along, for evidence that compares the two.
        processes: those that share the windows.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: BlockRunner,
        ids: Tensor,
        folder: Path,
        name: str,
        beside: Walk | None = None,
        processes: Processes = ALONE,
    ) -> None:
        stem = checkpoint.read(None)
        given = {"stem": stem, "ids": ids, "folder": str(folder), "name": name, "beside": beside}
        self.processes = processes
        self.number = processes.opened(self, "walk", {**told_of(runner), **given})
        self.checkpoint: Checkpoint | None = checkpoint
        self._begin(stem, runner, ids, folder, name, beside)

    @classmethod
    def joined(
        cls,
        runner: BlockRunner,
        stem: Mapping[str, Tensor],
        ids: Tensor,
        folder: Path,
        name: str,
        beside: Walk | None,
        processes: Processes,
    ) -> Walk:
        """The counterpart of a walk that another process leads."""
        walk = cls.__new__(cls)
        walk.processes, walk.checkpoint = processes, None
        walk._begin(stem, runner, ids, folder, name, beside)
        return walk

    def _begin(
        self, stem: Mapping[str, Tensor], runner: BlockRunner, ids: Tensor, folder: Path, name: str, beside: Walk | None
    ) -> None:
        self.runner, self.beside = runner, beside
        self._copy, self._saved = folder / f"{name}.safetensors", time.monotonic()
        runner.load(None, stem)
        self.activations = Activations(ids, runner, folder / f"{name}.bin", part=self.processes.part)
        self.activations.capture()
        self.readers = Readers(runner, self.activations, folder / name)
        self.block = 0
        self._given: Taps | None = None

    def resume(self, limit: int) -> None:
        """Go on from the last copy of the signal, if it stands at block ``limit`` or before.

        The walk of the dense model, and those of all processes, stand at the same place, or start again.
        """
        walks = [self] if self.beside is None else [self, self.beside]
        found = {block for walk in walks for block in walk._restored(limit)}
        self.block = found.pop() if len(found) == 1 else 0
        for walk in walks:
            walk.block = self.block
            if found:
                walk._captured()

    @everywhere
    def _restored(self, limit: int) -> list[int]:
        """Where the copies of all processes stand, in the first of them."""
        block = self.activations.restore(self._copy, limit)
        return [block, *self.processes.gather(block)]

    @everywhere
    def _captured(self) -> None:
        self.activations.capture()

    def run(
        self, tensors: Mapping[str, Tensor], taps: Taps | None = None, advance: bool = True, keep: bool = True
    ) -> None:
        """Run the present block with ``tensors`` on all windows; where the signal stays, as far as is looked at.

        Args:
            tensors: canonical tensors of the block.
            taps: gathered from.
            advance: whether the signal moves on to the next block, or stays.
            keep: whether another run of this block, which stays, can do with what this one computes.
        """
        beside = self.beside if advance or (taps is not None and taps.pairs.wanted) else None
        theirs = None if beside is None else beside._read(self.block)
        self._given = taps
        self._run(self.block, tensors, theirs, None if taps is None else taps.wanted, advance, keep)
        for walk in (self,) if beside is None else (self, beside):
            if advance:
                walk.block += 1
                walk.keep()

    def _read(self, block: Block) -> dict[str, Tensor]:
        assert self.checkpoint is not None
        return self.checkpoint.read(block)

    @everywhere
    def _run(
        self,
        block: int,
        tensors: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor] | None,
        wanted: Collection[str] | None,
        advance: bool,
        keep: bool,
    ) -> None:
        """The same, in every process, each with its windows; what is gathered comes together in the first.

        Args:
            block: the present one.
            tensors: its canonical tensors.
            theirs: those of the dense model, if its walk goes along.
            wanted: evidence.
            advance, keep: as of ``run``.
        """
        taps, self._given = self._given, None
        if taps is None and wanted is not None:
            taps = self._taps(block, wanted)
        beside = self.beside if theirs is not None else None
        seen = frozenset[str]() if taps is None else taps.roles
        self._load(block, tensors, seen)
        if beside is not None and theirs is not None:
            beside._load(block, theirs, seen)
        keep = keep and not advance
        stops = not advance and beside is None and taps is not None and taps.of_modules
        for shard in self.activations.shards:
            for batch in shard:
                there = None if taps is None else self.activations.there(batch)
                if stops and taps is not None:
                    with suppress(Enough), self.readers.open(batch, keep=keep), taps.open(True, there):
                        self.run_batch(batch)
                    continue
                outputs: list[tuple[Walk, Tensor]] = []
                if beside is not None:
                    with (
                        beside.readers.open(batch, keep=keep),
                        nullcontext() if taps is None else taps.pairs.see(beside.runner, dense=True),
                    ):
                        outputs.append((beside, beside.run_batch(batch)))
                with ExitStack() as stack:
                    stack.enter_context(self.readers.open(batch, keep=keep))
                    if taps is not None:
                        stack.enter_context(taps.open(there=there))
                        stack.enter_context(taps.pairs.see(self.runner, dense=False))
                    outputs.append((self, self.run_batch(batch)))
                if taps is not None:
                    taps.compare(self.activations.values[batch].to(self.runner.device), outputs[-1][1], there)
                    if beside is not None:
                        taps.pairs.add(there)
                for walk, output in outputs if advance else ():
                    walk.activations.values[batch] = output.to(walk.activations.values.device)
            if taps is not None:
                taps.close_shard()
        for walk in (self,) if beside is None else (self, beside):
            walk.runner.unload(block)
            if advance:
                walk.readers.forget()
        if taps is not None:
            self._together(taps)

    def _taps(self, block: Block, wanted: Collection[str]) -> Taps:
        """Taps of a process behind others."""
        later = self.processes.later(self._copy)
        assert later is not None
        return Taps(self.runner, block, wanted, (self.activations.sampled_before, later))

    def _together(self, taps: Taps) -> None:
        """Let the first process have what all have gathered."""
        self.processes.combine(taps.totals)
        taps.join(self.processes.gather(taps.parts() if self.processes.rank else None))

    def _load(self, block: int, tensors: Mapping[str, Tensor], seen: Collection[str]) -> None:
        self.block = block
        self.runner.load(block, tensors)
        self.readers.begin(block, tensors, seen, self.run_batch)

    def skip(self) -> None:
        """Go past a block that will not be there."""
        if self.beside is not None:
            self.beside.run(self.beside._read(self.block))
        self.block += 1

    def leave(self, tensors: Mapping[str, Tensor], looked_at: bool) -> None:
        """Go on behind the present block; behind the last one only if somebody looks at what it gives."""
        if looked_at or self.block + 1 < len(self.runner.blocks):
            self.run(tensors)
        else:
            self.block += 1

    def run_batch(self, batch: slice) -> Tensor:
        """Run the loaded block on some windows."""
        runner, activations = self.runner, self.activations
        hidden = activations.values[batch].to(runner.device)
        output = runner.run(self.block, hidden, activations.call(batch, self.block))
        require_finite_signal(output, f"block {self.block}", activations.first + batch.start)
        return output

    def keep(self) -> None:
        """Write a copy of the signal if the last one is old."""
        last = self.block == len(self.runner.blocks)
        if time.monotonic() - self._saved > _SAVE_EVERY and not last:
            self._save(self.block)
            self._saved = time.monotonic()

    @everywhere
    def _save(self, block: int) -> None:
        self.activations.save(self._copy, block)

    @everywhere
    def stem(self, wanted: Collection[str]) -> dict[str, Tensor]:
        """Evidence of what the last block gives to the final norm and the head."""
        taps = self._taps(None, wanted) if self.processes.rank else Taps(self.runner, None, wanted)
        for shard in self.activations.shards:
            for batch in shard:
                there = self.activations.there(batch)
                signal, dense = real(self.activations.values[batch].to(self.runner.device), there), None
                if self.beside is not None:
                    theirs = self.beside.activations.values[batch].to(self.runner.device)
                    dense = (self.beside.runner, real(theirs, there))
                taps.see_stem(signal, dense)
            taps.close_shard()
        self._together(taps)
        return {} if self.processes.rank else taps.evidence()

    def close(self) -> None:
        """Free the stem."""
        self._closed()
        if self.beside is not None:
            self.beside.close()

    @everywhere
    def _closed(self) -> None:
        self.runner.unload(None)
