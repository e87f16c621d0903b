"""A walk: the calibration signal on its way through the model, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.engine.activations import Activations
from secateur.engine.blocks import BlockRunner
from secateur.engine.taps import Taps
from secateur.errors import refuse

_SAVE_EVERY = 60.0  # seconds of work between two copies of the activations


class Walk:
    """Carries all calibration windows from block to block, and goes on where an interrupted walk was.

    Args:
        checkpoint: whose stem makes the first block's inputs.
        runner: the stock model.
        ids: [count, length] token ids.
        folder: where large signals and copies are kept.
        name: of this walk, apart from others in the same folder.
    """

    def __init__(self, checkpoint: Checkpoint, runner: BlockRunner, ids: Tensor, folder: Path, name: str) -> None:
        self.checkpoint, self.runner = checkpoint, runner
        self._copy, self._saved = folder / f"{name}.safetensors", time.monotonic()
        runner.load(None, checkpoint.read(None))
        self.activations = Activations(ids, runner, folder / f"{name}.bin")
        self.activations.capture()
        self.block = 0

    def resume(self, limit: int) -> None:
        """Go on from the last copy of the signal, if it stands at block ``limit`` or before."""
        if self._copy.is_file():
            self.block = self.activations.restore(self._copy, limit)

    def run(self, tensors: Mapping[str, Tensor], taps: Taps | None = None, advance: bool = True) -> None:
        """Run the present block with ``tensors`` on all windows.

        Args:
            tensors: canonical tensors of the block.
            taps: gathered from.
            advance: whether the signal moves on to the next block, or stays.
        """
        runner, block, activations = self.runner, self.block, self.activations
        runner.load(block, tensors)
        for shard in activations.shards:
            for batch in shard:
                hidden = activations.values[batch].to(runner.device)
                call = activations.call(batch, block)
                if taps is None:
                    output = runner.run(block, hidden, call)
                else:
                    with taps.open():
                        output = runner.run(block, hidden, call)
                    taps.compare(hidden, output)
                if not torch.isfinite(output.sum()) and not torch.isfinite(output).all():
                    where = f"calibration windows {batch.start} to {batch.stop - 1}"
                    found = f"values of block {block} are not finite in {where}"
                    refuse("not-finite", "the forward pass", found, "try --dtype float32, or look at the checkpoint")
                if advance:
                    activations.values[batch] = output.to(activations.values.device)
            if taps is not None:
                taps.close_shard()
        runner.unload(block)
        if advance:
            self.block += 1
            self._keep()

    def _keep(self) -> None:
        last = self.block == len(self.runner.blocks)
        if time.monotonic() - self._saved > _SAVE_EVERY and not last:
            self.activations.save(self._copy, self.block)
            self._saved = time.monotonic()

    def stem(self) -> dict[str, Tensor]:
        """Gram of the last block's output, which the final norm reads."""
        taps = Taps(self.runner, None, {"stream"})
        for shard in self.activations.shards:
            for batch in shard:
                taps.see_stream(self.activations.values[batch].to(self.runner.device))
            taps.close_shard()
        return taps.evidence()

    def close(self) -> None:
        """Free the stem."""
        self.runner.unload(None)
