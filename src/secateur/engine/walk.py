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
from secateur.engine.readers import Readers
from secateur.engine.taps import Enough, Taps

_SAVE_EVERY = 60.0  # seconds of work between two copies of the activations


class Walk:
    """Carries all calibration windows from block to block, and goes on where an interrupted walk was.

    Args:
        checkpoint: whose stem makes the first block's inputs.
        runner: the stock model.
        ids: [count, length] token ids.
        folder: where large signals and copies are kept.
        name: of this walk, apart from others in the same folder.
        beside: a walk of the dense model that goes along, for evidence that compares the two.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: BlockRunner,
        ids: Tensor,
        folder: Path,
        name: str,
        beside: Walk | None = None,
    ) -> None:
        self.checkpoint, self.runner, self.beside = checkpoint, runner, beside
        self._copy, self._saved = folder / f"{name}.safetensors", time.monotonic()
        runner.load(None, checkpoint.read(None))
        self.activations = Activations(ids, runner, folder / f"{name}.bin")
        self.activations.capture()
        self.readers = Readers(runner, self.activations, folder / name)
        self.block = 0

    def resume(self, limit: int) -> None:
        """Go on from the last copy of the signal, if it stands at block ``limit`` or before."""
        if self._copy.is_file():
            self.block = self.activations.restore(self._copy, limit)
        if self.beside is not None:  # both stand at the same place, or start again
            self.beside.resume(self.block)
            if self.beside.block != self.block:
                for walk in (self, self.beside):
                    walk.activations.capture()
                    walk.block = 0

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
        seen = frozenset[str]() if taps is None else taps.roles
        self._load(tensors, seen)
        if beside is not None:
            beside._load(beside.checkpoint.read(self.block), seen)
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
            walk.runner.unload(walk.block)
            if advance:
                walk.block += 1
                walk.readers.forget()
                walk.keep()

    def _load(self, tensors: Mapping[str, Tensor], seen: Collection[str]) -> None:
        self.runner.load(self.block, tensors)
        self.readers.begin(self.block, tensors, seen, self.run_batch)

    def skip(self) -> None:
        """Go past a block that will not be there."""
        if self.beside is not None:
            self.beside.run(self.beside.checkpoint.read(self.block))
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
        require_finite_signal(output, f"block {self.block}", batch.start)
        return output

    def keep(self) -> None:
        """Write a copy of the signal if the last one is old."""
        last = self.block == len(self.runner.blocks)
        if time.monotonic() - self._saved > _SAVE_EVERY and not last:
            self.activations.save(self._copy, self.block)
            self._saved = time.monotonic()

    def stem(self, wanted: Collection[str]) -> dict[str, Tensor]:
        """Evidence of what the last block gives to the final norm and the head."""
        taps = Taps(self.runner, None, wanted)
        for shard in self.activations.shards:
            for batch in shard:
                there = self.activations.there(batch)
                signal, dense = real(self.activations.values[batch].to(self.runner.device), there), None
                if self.beside is not None:
                    theirs = self.beside.activations.values[batch].to(self.runner.device)
                    dense = (self.beside.runner, real(theirs, there))
                taps.see_stem(signal, dense)
            taps.close_shard()
        return taps.evidence()

    def close(self) -> None:
        """Free the stem."""
        self.runner.unload(None)
        if self.beside is not None:
            self.beside.close()
