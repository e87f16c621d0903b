"""What other processes are told of a stock model, so that each builds its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.blocks import BlockRunner
from secateur.engine.processes import Processes, Shared
from secateur.families import Architecture
from secateur.families.resizing import sizes_of
from secateur.families.stock import PER_LAYER_KEYS


def told_of(runner: BlockRunner) -> dict[str, Any]:
    """A stock model without its places' weights, in plain words and tensors."""
    architecture = runner.architecture
    told = (*PER_LAYER_KEYS, "auto_map") if architecture.per_layer else ()
    return {
        "config": {key: value for key, value in architecture.raw.items() if key not in told},
        "sizes": asdict(architecture.sizes) if architecture.per_layer else None,
        "dtype": str(runner.dtype).removeprefix("torch."),
        "rest": dict(runner.rest),
    }


def opening(make: Callable[..., Shared], source: Architecture, device: torch.device) -> Callable[..., Shared]:
    """Opens the counterpart of a shared object.

    Args:
        make: from a runner, the processes and what else was said.
        source: architecture of the model that is pruned.
        device: of this process.
    """

    def opened(
        processes: Processes,
        config: Mapping[str, Any],
        sizes: dict[str, Any] | None,
        dtype: str,
        rest: Mapping[str, Tensor],
        folder: str,
        **more: Any,
    ) -> Shared:
        architecture = Architecture(config, source.origin, None if sizes is None else sizes_of(sizes))
        runner = BlockRunner(architecture, getattr(torch, dtype), device, rest)
        return make(runner=runner, processes=processes, folder=processes.folder(Path(folder)), **more)

    return opened
