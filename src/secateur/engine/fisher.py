"""Fisher matrices of what the branches of every block give: how much the loss feels an error there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.engine.journal import Journal
from secateur.methods.base import Trials
from secateur.plans.plan import file_digest

FISHER = "fisher"


class FisherFiles:
    """One file per block, made by one forward and one backward pass with labels drawn from the network itself.

    Args:
        folder: where they are.
        journal: records the finished blocks.
        device: where they are used.
    """

    def __init__(self, folder: Path, journal: Journal, device: torch.device) -> None:
        self._folder, self._journal, self._device = folder, journal, device

    def _path(self, block: int) -> Path:
        return self._folder / f"fisher-{block}.safetensors"

    def gather(self, trials: Callable[[], Trials], blocks: int, seed: int) -> None:
        """Make the files that are not there."""
        done = {record["block"]: record["sha256"] for record in self._journal.done(FISHER)}
        if all(self._path(b).is_file() and file_digest(self._path(b)) == done.get(b) for b in range(blocks)):
            return
        generator = torch.Generator().manual_seed(seed)
        for found in trials().gradients(wanted=("signals",), generator=generator):
            if found.place is not None:
                signals = {name: tensor.float().cpu().contiguous() for name, tensor in found.signals.items()}
                save_file(signals, self._path(found.place))
                self._journal.add(FISHER, block=found.place, sha256=file_digest(self._path(found.place)))

    def of(self, block: int) -> dict[str, Tensor]:
        """``fisher.attention`` and ``fisher.ffn`` of a block, [D, D] float64, as far as it has them."""
        found = load_file(self._path(block))
        return {f"{FISHER}.{name}": tensor.double().to(self._device) for name, tensor in found.items()}
