"""The Python door."""

from secateur.api.channels import ModuleResult, graph
from secateur.api.comparing import compare
from secateur.api.deltas import delta_apply, delta_pack
from secateur.api.exporting import export
from secateur.api.facts import evaluate, families, inspect, load, methods
from secateur.api.outputs import PruneResult
from secateur.api.packing import pack, unpack
from secateur.api.previewing import preview
from secateur.api.pruning import prune
from secateur.api.recovering import RecoverResult, recover

__all__ = [
    "ModuleResult",
    "PruneResult",
    "RecoverResult",
    "compare",
    "delta_apply",
    "delta_pack",
    "evaluate",
    "export",
    "families",
    "graph",
    "inspect",
    "load",
    "methods",
    "pack",
    "preview",
    "prune",
    "recover",
    "unpack",
]
