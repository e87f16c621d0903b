"""What a process does that does not lead: it waits for orders and has its share of the calibration data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.engine.blocks import BlockRunner
from secateur.engine.network import Network
from secateur.engine.objectives import objective_told
from secateur.engine.processes import Processes, Shared
from secateur.engine.team import Team
from secateur.engine.telling import opening
from secateur.engine.walk import Walk
from secateur.families import Architecture


def assist(team: Team, architecture: Architecture, device: torch.device) -> dict[str, Any]:
    """Do what the first process orders, until it ends; returns what came out.

    Args:
        team: the processes.
        architecture: of the model that is pruned.
        device: of this process.
    """
    kinds: dict[str, Callable[..., Shared]] = {"walk": Walk.joined, "network": _network}
    openers = {name: opening(make, architecture, device) for name, make in kinds.items()}
    return team.serve(openers, device, digest_of(architecture))


def digest_of(architecture: Architecture) -> str:
    """What tells one model's shapes from another's, wherever its files are."""
    content = [architecture.raw, asdict(architecture.sizes)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _network(
    runner: BlockRunner, ids: Tensor, objective: Mapping[str, Any] | None, folder: Path, processes: Processes
) -> Network:
    return Network(runner, ids, objective_told(objective), folder, processes)
