"""The reload check: a save is finished only after plain transformers finds in the folder what the engine computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint, Folder, TensorWriter
from secateur.checkpoints.loading import load_model
from secateur.cuts import cut_place
from secateur.engine.blocks import BlockRunner, given_by
from secateur.engine.prepare import context_of
from secateur.errors import InternalError
from secateur.families import Architecture
from secateur.families.stock import typed
from secateur.plans import Plan

WHOLE_MODEL = 2**30
"""Bytes of weight files up to which the whole model is loaded for the check."""
_TOKENS = 16


def verify_output(
    source: Checkpoint, target: Architecture, plan: Plan, folder: Path, writer: TensorWriter, digests: dict[str, str]
) -> str:
    """Check a written folder.

    The stock configuration and class agree with every key, shape and data type; tensors hash as written; the first and
    the last block, cut again from the source, give through stock layers what the blocks in the file give; and, where
    the file is small enough to hold, plain ``from_pretrained`` gives the same logits.

    Returns:
        The transformers version that was used.

    Raises:
        InternalError: whatever disagrees, by name.
    """
    import transformers

    for name, digest in writer.digests().items():
        if digest != digests.get(name):
            raise InternalError("reload-check", f"hash of {name}", "the file does not hold what was written")
    written = Checkpoint(Folder(folder), source.architecture.origin)
    if written.problems:
        problem = written.problems[0]
        raise InternalError("reload-check", problem.asked, problem.found)
    if written.architecture.sizes != plan.after:
        raise InternalError(
            "reload-check", f"sizes {plan.after}", f"the configuration gives {written.architecture.sizes}"
        )
    dtype = _probe_type(written)
    runner = BlockRunner(written.architecture, dtype, torch.device("cpu"), written.rest())
    runner.load(None, written.read(None))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(plan.after.vocab, (1, min(_TOKENS, context_of(written))), generator=generator)
    _, calls = runner.capture(ids)
    runner.unload(None)  # of a large model, never more than the stem or one block is held
    hidden = torch.randn(1, ids.shape[1], plan.after.residual, generator=generator).to(dtype)
    for new, old in {(0, plan.blocks[0]), (len(plan.blocks) - 1, plan.blocks[-1])}:
        cut = cut_place(source.architecture, target, old, source.read(old), plan)
        cut = {plan.survivors.new_name(name) or name: tensor for name, tensor in cut.items()}
        expected = runner.replay(new, cut, hidden, calls[new])
        del cut
        _require_close(f"block {new}", expected, runner.replay(new, written.read(new), hidden, calls[new]))
    if written.folder.bytes <= WHOLE_MODEL:
        _check_whole(written, runner, ids, dtype)
    return str(transformers.__version__)


def _probe_type(checkpoint: Checkpoint) -> torch.dtype:
    return torch.float64 if "F64" in checkpoint.dtypes.values() else torch.float32


def _require_close(what: str, expected: Tensor, found: Tensor) -> None:
    error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error < 1e-4:
        raise InternalError("reload-check", f"output of {what}", f"relative difference {error:.3g} after reloading")


def _check_whole(written: Checkpoint, runner: BlockRunner, ids: Tensor, dtype: torch.dtype) -> None:
    model, info = load_model(written.folder, **typed(dtype), output_loading_info=True, local_files_only=True)
    travelling = {header.name for header in written.passthrough}
    wrong: dict[str, Any] = {
        "missing": set(info["missing_keys"]),
        "unexpected": set(info["unexpected_keys"]) - travelling,
        "mismatched": set(info["mismatched_keys"]),
    }
    for kind, names in wrong.items():
        if names:
            raise InternalError("reload-check", "loading with plain transformers", f"{kind} keys: {sorted(names)[:3]}")
    runner.load(None, written.read(None))
    hidden, calls = runner.capture(ids)
    for block in range(len(runner.blocks)):
        hidden = runner.replay(block, written.read(block), hidden, calls[block])
    with torch.no_grad():
        found = given_by(model.eval()(input_ids=ids, use_cache=False))
    _require_close("the whole model", runner.outputs(ids, hidden), found)
