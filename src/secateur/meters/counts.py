"""Sizes counted from a written folder."""

from __future__ import annotations

from secateur.checkpoints import Checkpoint
from secateur.engine.prepare import costs_of

Counts = dict[str, int]


def count(checkpoint: Checkpoint) -> Counts:
    """Parameters and bytes of the files, FLOPs and key/value cache per token of the sizes they hold."""
    costs, sizes = costs_of(checkpoint), checkpoint.architecture.sizes
    return {
        "params": checkpoint.params,
        "bytes": checkpoint.folder.bytes,
        "flops_per_token": costs.flops(sizes),
        "kv_bytes_per_token": costs.kv_bytes(sizes),
    }
