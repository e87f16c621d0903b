"""``preview``: what a prune would do, from headers only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.api.onnx_models import is_onnx, preview_onnx
from secateur.api.outputs import require_output, require_text
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.hub import locate
from secateur.engine.foresight import Foresight, Rates
from secateur.engine.packing import foreseen_bytes
from secateur.engine.prepare import (
    LONGEST_WINDOW,
    budget_for,
    choose_method,
    context_of,
    require_format,
    require_layout,
    require_target,
    resolve_device,
    resolve_dtype,
)
from secateur.engine.progress import Progress, Silent
from secateur.engine.request import PruneRequest, make_request
from secateur.errors import RequestError
from secateur.families import Architecture
from secateur.families.loading import loads_in
from secateur.inference import read_checkpoint
from secateur.methods.base import ZEROS, Method, worth
from secateur.methods.elementwise import WeightOptions
from secateur.spaces import KINDS
from secateur.spaces.weights import all_matrices


def preview(
    model: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What ``prune`` with the same arguments would do; reads headers only and lists every problem at once.

    Returns:
        ``problems`` (errors as dictionaries), and, as far as they can be told, ``method``, ``output_kind``, ``sizes``,
        ``foreseen`` (whether the run will come to these sizes; else they are those of an even cut, and what gives how
        much is known only at the run), ``achieved`` (as of prune), ``untied`` (parameters that untying the head adds),
        ``kept_tied`` (those it would add, where a narrowed model keeps one table), ``peak_bytes`` and ``seconds``
        (estimates for this machine as it is now; None where they do not follow from the model's sizes), ``layout``,
        ``loads_in``.
    """
    if is_onnx(model) and recipe is None:
        return preview_onnx(str(model), options)
    problems: list[dict[str, str]] = []  # not the errors: their tracebacks hold whole models, and this list
    found: dict[str, Any] = {"problems": problems}

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            problems.append(error.as_dict())

    request: PruneRequest | None = None
    method: Method | None = None
    checkpoint: Checkpoint | None = None
    name = None if model is None else str(model)
    with collecting():
        request = make_request({**options, "model": name}, None if recipe is None else Path(recipe))
        name = request.model
    if request is not None:
        with collecting():
            method = choose_method(request)
        with collecting():
            require_text(request)
        if request.output is not None:
            with collecting():
                require_output(request, "a prune")
        if request.data not in (None, "-") and request.data.startswith(("/", ".")) and not Path(request.data).exists():
            missing = RequestError("no-data", f"data {request.data!r}", "there is no such file or folder")
            problems.append(missing.as_dict())
    if name is not None:
        with collecting():
            checkpoint = read_checkpoint(Path(locate(name)), (progress or Silent()).note)
            problems.extend(problem.as_dict() for problem in checkpoint.problems)
    if request is not None and method is not None and checkpoint is not None and not checkpoint.problems:
        with collecting():
            found.update(_foresee(request, method, checkpoint))
    return found


def _foresee(request: PruneRequest, method: Method, checkpoint: Checkpoint) -> dict[str, Any]:
    require_target(request, method)
    require_format(request)
    require_layout(request, checkpoint)
    budget = budget_for(request, checkpoint, resolve_device(request.device))
    costs, dense = budget.costs, budget.sizes
    after = dense if request.is_copy else method.sizes(budget)
    length = request.length or min(LONGEST_WINDOW, context_of(checkpoint))
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, checkpoint, device)
    ahead = Foresight(checkpoint, method, costs, after, request.samples, length, dtype, device)
    head = costs.params(dense.untied()) - costs.params(dense)
    achieved = {
        "params": costs.params(after),
        "params_before": costs.params(dense),
        "bytes": costs.bytes(after),
        "bytes_before": checkpoint.folder.bytes,
        "flops_per_token": costs.flops(after),
        "flops_per_token_before": costs.flops(dense),
        "kv_bytes_per_token": costs.kv_bytes(after),
        "kv_bytes_per_token_before": costs.kv_bytes(dense),
    }
    if method.output in ZEROS:
        zeros = 0 if request.is_copy else method.zeros(budget)
        achieved |= {"nonzero": costs.params(after) - zeros, "nonzero_before": costs.params(dense)}
        if request.format != "dense":
            achieved["bytes"] -= _packed_savings(checkpoint, method, budget.behind(after).architecture, zeros)
    achieved |= {} if request.is_copy else method.foreseen(budget)
    sizes = {kind: {"before": dense.size(kind), "after": after.size(kind)} for kind in KINDS if dense.size(kind)}
    loads = loads_in(checkpoint.architecture.family, dense, after, request.layout)
    return {
        "method": method.name,
        "needs_data": method.data != "none",
        "output_kind": worth(method.output, request.layout, request.format),
        "sizes": sizes,
        "foreseen": request.is_copy or method.foresees(budget),
        "achieved": achieved,
        "untied": head if dense.tied and not after.tied else 0,
        "kept_tied": head if after.tied and after.residual != dense.residual else 0,
        "gap": budget.gap,
        "peak_bytes": ahead.peak_bytes,
        "seconds": None if request.is_copy else _seconds(ahead, checkpoint, request),
        "layout": request.layout,
        "loads_in": {"transformers": "verified at the save", **loads},
    }


def _seconds(ahead: Foresight, checkpoint: Checkpoint, request: PruneRequest) -> float | None:
    """Seconds of the run on this machine, measured for a moment where the output will be."""
    folder = Path(request.output or ".").absolute().parent
    place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    names = (checkpoint.folder.path / name for name in checkpoint.folder.files)
    largest = max(names, key=lambda path: path.stat().st_size)
    found = ahead.seconds(lambda: Rates.of(largest, place))
    return None if found is None else round(found, 1)


def _packed_savings(checkpoint: Checkpoint, method: Method, after: Architecture, zeros: int) -> int:
    """Bytes that packing saves, the zeros spread evenly over the matrices in which the method sets them."""
    weights = method if isinstance(method, WeightOptions) else None
    # fewer experts have the first numbers
    matrices = [matrix.name for matrix in all_matrices(after, weights.part if weights else "all")]
    pattern = (weights.shape.kept, weights.shape.of) if weights and weights.shape.fixed else None
    return checkpoint.folder.dense_bytes - foreseen_bytes(checkpoint, zeros, matrices, pattern)
