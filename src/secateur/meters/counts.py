"""Sizes counted from a written folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from secateur.checkpoints import Checkpoint
from secateur.cuts.factors import Factors
from secateur.engine.prepare import costs_of
from secateur.families.roles import MATRICES, NORMS, TABLES
from secateur.plans import FactorFiles

Counts = dict[str, int]
PARTS: Final = ("embedding", "attention", "FFN", "norms", "shortcuts", "head", "other")
"""Parts of a decoder; ``other`` is what the family file does not describe."""


def count(checkpoint: Checkpoint) -> Counts:
    """Parameters and bytes of the files, FLOPs and key/value cache per token of the sizes they hold."""
    costs, sizes = costs_of(checkpoint), checkpoint.architecture.sizes
    return {
        "params": checkpoint.params,
        "bytes": checkpoint.folder.bytes,
        "flops_per_token": costs.flops(sizes),
        "kv_bytes_per_token": costs.kv_bytes(sizes),
    }


def nonzero(checkpoint: Checkpoint) -> int:
    """Parameters that are not zero, counted from the files, place by place."""
    zeros = 0
    for place in checkpoint.architecture.places:
        zeros += sum(int((tensor == 0).sum()) for tensor in checkpoint.read(place).values())
    return checkpoint.params - zeros


def factored(achieved: Counts, folder: Path) -> Counts:
    """Counts before and after, and those with some matrices as the factors in a folder instead of multiplied out."""
    files = FactorFiles(folder)
    found = {f"factored_{key}": achieved[key] for key in ("params", "bytes")}
    for name in Factors.matrices(files):
        each = Factors.of(files, name)
        found["factored_params"] += each.parameters - each.mask.numel()
        found["factored_bytes"] += each.bytes - each.mask.numel() * each.values.element_size()
    before = {f"factored_{key}_before": achieved[f"{key}_before"] for key in ("params", "bytes")}
    return {**achieved, **found, **before}


def remaining(achieved: Counts) -> int:
    """Parameters that are left, given counts before and after: without the zeros that stand in place of what went.

    Zeros that the source had count as left. Matrices that are kept as factors count as these.
    """
    if "factored_params" in achieved:
        return achieved["factored_params"]
    if "nonzero" not in achieved:
        return achieved["params"]
    zeros_before = achieved["params_before"] - achieved["nonzero_before"]
    return min(achieved["params"], achieved["nonzero"] + zeros_before)


def share_removed(achieved: Counts) -> float:
    """Share of all parameters that is gone, of counts before and after."""
    return 1 - remaining(achieved) / achieved["params_before"]


def count_parts(checkpoint: Checkpoint) -> Counts:
    """Parameters of each of the ``PARTS``; their sum is the model's. A tied head counts as embedding."""
    architecture = checkpoint.architecture
    found = dict.fromkeys(PARTS, 0)
    for place in architecture.places:
        for tensor in (tensor for tensor in architecture.tensors_of(place) if not tensor.is_index):
            found[part_of(tensor.role)] += torch.Size(architecture.shapes[tensor.name]).numel()
    found["other"] += sum(torch.Size(shape).numel() for shape in architecture.unmapped.values())
    return found


def part_of(role: str) -> str:
    """The part that a role belongs to, by the axes of its matrix."""
    if role in NORMS:
        return "norms"
    if role in TABLES or role == "head":
        return "embedding" if role in TABLES else "head"
    axes = set(MATRICES[role])
    if axes & {"heads", "kv", "query_heads"} or role.startswith("latent"):
        return "attention"
    return "shortcuts" if "triangle" in axes else "FFN"
