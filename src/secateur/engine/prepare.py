"""Everything that is decided before work: checkpoint, method, budget, device. Reads headers only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.budgets import Budget, Costs
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.folder import DTYPES
from secateur.checkpoints.hub import locate
from secateur.data.pairs import paired_texts
from secateur.data.windows import Windows, calibration_windows
from secateur.engine.latency import LatencyModel
from secateur.engine.processes import ALONE, Processes
from secateur.engine.request import PruneRequest
from secateur.errors import refuse
from secateur.methods.base import Method
from secateur.methods.registry import DEFAULT_WITH_DATA, DEFAULT_WITHOUT_DATA, make_method

LONGEST_WINDOW = 2048
LONGEST_TEXT = 512
"""Tokens at which a text is cut before it is embedded, where its model says nothing else."""


@dataclass
class Prepared:
    """A request resolved against its model."""

    request: PruneRequest
    checkpoint: Checkpoint
    method: Method
    budget: Budget
    device: torch.device
    dtype: torch.dtype
    processes: Processes = ALONE


def context_of(checkpoint: Checkpoint) -> int:
    """Positions a model was made for."""
    return int(getattr(checkpoint.architecture.config, "max_position_embeddings", LONGEST_WINDOW))


def longest_text(checkpoint: Checkpoint) -> int:
    """Tokens at which a text is cut before it is embedded."""
    said = checkpoint.embedding.longest if checkpoint.embedding is not None else None
    return min(said or LONGEST_TEXT, context_of(checkpoint))


def draw_windows(
    source: str,
    checkpoint: Checkpoint,
    samples: int,
    length: int | None,
    seed: int,
    text_field: str,
    trust_remote_code: bool,
    context: int | None = None,
) -> Windows:
    """Calibration windows of a text, of the length asked for or of the longest that a model takes.

    Of a model that makes embeddings, texts that belong together.

    Args:
        source: see :func:`secateur.data.sources.documents` and :func:`secateur.data.pairs.read_pairs`.
        checkpoint: whose tokenizer reads it.
        samples, length, seed, text_field, trust_remote_code: as asked.
        context: positions, where not those of the checkpoint alone.

    Raises:
        RequestError: windows longer than the context; as :func:`secateur.data.windows.calibration_windows` and
            :func:`secateur.data.pairs.paired_texts`.
    """
    most = context or context_of(checkpoint)
    if length and length > most:
        refuse("bad-length", f"length {length}", f"the model's context is {most}")
    folder, vocab = checkpoint.folder.path, checkpoint.architecture.sizes.vocab
    if checkpoint.embedding is not None:
        longest = length or longest_text(checkpoint)
        return paired_texts(source, folder, vocab, samples, longest, seed, trust_remote_code)
    longest = length or min(LONGEST_WINDOW, most)
    return calibration_windows(source, folder, vocab, samples, longest, seed, text_field, trust_remote_code)


def costs_of(checkpoint: Checkpoint) -> Costs:
    """Cost functions of a checkpoint, buffers and headers of its files included in the bytes."""
    itemsizes = {name: DTYPES[dtype].itemsize for name, dtype in checkpoint.dtypes.items()}
    architecture = checkpoint.architecture
    repeats_head = checkpoint.repeated_head is not None
    described = Costs(architecture, itemsizes, repeats_head=repeats_head)
    unmapped = sum(torch.Size(shape).numel() for shape in architecture.unmapped.values())
    rest = checkpoint.folder.dense_bytes - described.bytes(architecture.sizes)
    return Costs(architecture, itemsizes, rest, unmapped, repeats_head)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one; of several, each process of a host takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        refuse(
            "bad-device",
            f"device {name!r}",
            f"not usable here ({' '.join(str(error).split())[:120]})",
            "auto, cpu or cuda",
        )
    return device


def resolve_dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Data type of the forward pass: float32 on a CPU, the checkpoint's own on a GPU; float64 stays."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    stored = max((DTYPES[d] for d in checkpoint.dtypes.values()), key=lambda dtype: dtype.itemsize)
    if stored == torch.float64 or device.type != "cpu":
        return stored
    return torch.float32


def choose_method(request: PruneRequest) -> Method:
    """The method asked for, or the default; one that needs data is checked for it later."""
    name = request.method or (DEFAULT_WITH_DATA if request.data else DEFAULT_WITHOUT_DATA)
    return make_method(name, request.options).in_layout(request.layout)


def require_target(request: PruneRequest, method: Method) -> None:
    """Refuse a request that does not say how much shall go."""
    if not request.targets and not method.sized:
        refuse("no-target", "a prune without a size", "neither --ratio nor --target is given", "e.g. --ratio 0.3")


def require_format(request: PruneRequest) -> None:
    """Refuse to pack what is copied byte for byte."""
    if request.is_copy and request.format != "dense":
        hint = "secateur pack MODEL -o OUT --form sparse"
        refuse("format", f"format {request.format} of ratio 0", "nothing is cut: the folder is copied as it is", hint)


def require_layout(request: PruneRequest, checkpoint: Checkpoint) -> None:
    """Refuse to write a model whose layers differ as one whose layers do not."""
    if checkpoint.architecture.per_layer and request.layout == "native" and not request.is_copy:
        found = f"the layers of {str(checkpoint.folder.path)!r} differ already"
        refuse("layout", "the native layout", found, "--layout per-layer")


def budget_for(request: PruneRequest, checkpoint: Checkpoint, device: torch.device) -> Budget:
    """The request as a budget on a checkpoint."""
    costs = costs_of(checkpoint)
    return Budget(
        checkpoint.architecture,
        costs,
        request.targets,
        itemsize=costs.itemsize,
        quantum=request.quantum,
        largest_quantum=8 if device.type == "cpu" else 64,
        tolerance=request.tolerance,
        layout=request.layout,
        latency=LatencyModel(
            checkpoint.architecture, request.layout, resolve_dtype(request.dtype, checkpoint, device), device
        ),
    )


def prepare(
    request: PruneRequest,
    opener: Callable[[Path], Checkpoint] = Checkpoint.open,
    processes: Processes = ALONE,
) -> Prepared:
    """Resolve a request.

    Args:
        opener: opens a checkpoint's folder; one that knows more architectures than have a family file may stand here.
        processes: those that share the calibration data.

    Raises:
        RequestError: the first thing at fault.
    """
    method = choose_method(request)
    require_target(request, method)
    require_format(request)
    device = resolve_device(request.device)
    checkpoint = opener(Path(locate(request.model)))
    require_layout(request, checkpoint)
    budget = budget_for(request, checkpoint, device)
    dtype = resolve_dtype(request.dtype, checkpoint, device)
    return Prepared(request, checkpoint, method, budget, device, dtype, processes)
