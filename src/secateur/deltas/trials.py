"""What the fine-tune's matrices read, and what candidates of q do to its predictions: block by block from the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from secateur.archives.sparse import seed_for
from secateur.deltas.options import DeltaMethod
from secateur.deltas.rescale import Rescale
from secateur.deltas.selection import Selection, Signal
from secateur.deltas.sources import Signals, Tuned, assemble, wide
from secateur.engine.blocks import BlockRunner, Call
from secateur.engine.progress import Progress
from secateur.engine.taps import Taps
from secateur.engine.walk import Walk
from secateur.families import Block
from secateur.training.objective import cross_entropy

Objective = Literal["output", "loss"]
TOP: Final = 5
"""Logits of the fine-tune that are compared at every token."""
_BATCH_TOKENS: Final = 2048


@dataclass(frozen=True)
class Candidate:
    """One way to prune the delta: a seed of the masks and a rule for q."""

    seed: int
    rescale: Rescale


@dataclass(frozen=True)
class Pruner:
    """Selections and their q, the same in a trial and in the file.

    Args:
        tuned: whose delta is pruned.
        method: what is kept.
        ratio: share that goes.
        signals: of the fine-tune's matrices, where the method or the rule asks for them.
    """

    tuned: Tuned
    method: DeltaMethod
    ratio: float
    signals: Signals

    def select(self, name: str, pieces: Mapping[str, Tensor], seed: int) -> Selection:
        """What is kept of a piece."""
        signal = self.tuned.signal(name, pieces, self.signals) if self.method.asks_signals else None
        return self.method.select(pieces[name], signal, self.ratio, seed_for(seed, name))

    def q(self, name: str, pieces: Mapping[str, Tensor], selection: Selection, rescale: Rescale) -> float:
        """What its kept values are divided by."""
        signal = self.tuned.signal(name, pieces, self.signals)
        return rescale.q(name, pieces[name], None if signal is None else signal.mean, selection.share)


def gather(tuned: Tuned, ids: Tensor, dtype: torch.dtype, device: torch.device, work: Path, told: Progress) -> Signals:
    """Means and mean squares of what the pruned matrices of a fine-tune read, in one forward pass.

    Args:
        ids: windows [count, length].
        work: folder for large signals.
    """
    checkpoint = tuned.checkpoint
    runner = BlockRunner(tuned.architecture, dtype, device, checkpoint.rest())
    walk, found = Walk(checkpoint, runner, ids, work, "signals"), dict[str, Signal]()
    wanted = {f"{role}.moments" for role in tuned.asked_roles()}
    blocks = len(tuned.architecture.sizes.blocks)
    told.start("gather", blocks)
    while walk.block < blocks:
        block, taps = walk.block, Taps(runner, walk.block, wanted)
        walk.run(tuned.read(block), taps)
        seen = taps.evidence()
        for name in (key.removesuffix(".squares") for key in seen if key.endswith(".squares")):
            count = seen[f"{name}.count"].clamp(min=1)
            signal = Signal((seen[f"{name}.sum"].cpu() / count), (seen[f"{name}.squares"].cpu() / count))
            found[f"blocks.{block}.{name}.weight"] = signal
        told.step(block + 1)
    walk.close()
    return found


def try_candidates(
    pruner: Pruner,
    candidates: Sequence[Candidate],
    ids: Tensor,
    objective: Objective,
    dtype: torch.dtype,
    device: torch.device,
    told: Progress,
) -> list[float]:
    """What every candidate costs, a mean over tokens: the squared change of the largest logits, or the loss.

    All candidates go through the model together, so that a block is read once; what is held is one block and the
    signals of the candidates.
    """
    tuned = pruner.tuned
    runner = BlockRunner(tuned.architecture, dtype, device, tuned.checkpoint.rest())
    runner.load(None, tuned.checkpoint.read(None))
    batches = torch.split(ids, max(1, _BATCH_TOKENS // ids.shape[1]))
    captured = [runner.capture(batch) for batch in batches]
    calls: list[list[Call]] = [call for _, call in captured]
    states = [[hidden for hidden, _ in captured] for _ in range(len(candidates) + 1)]
    blocks = len(runner.blocks)
    told.start("search", blocks)
    for block in range(blocks):
        for state, tensors in zip(states, _variants(pruner, candidates, block), strict=True):
            runner.load(block, tensors)
            for at, call in enumerate(calls):
                state[at] = runner.run(block, state[at], call[block])
            runner.unload(block)
        told.step(block + 1)
    costs = [0.0] * len(candidates)
    for at, batch in enumerate(batches):
        logits = runner.outputs(batch, states[0][at]).float()
        best, where = logits.topk(min(TOP, logits.shape[-1]))
        for index, state in enumerate(states[1:]):
            other = runner.outputs(batch, state[at]).float()
            if objective == "loss":
                cost = cross_entropy(other, batch.to(other.device))
            else:
                cost = (other.gather(-1, where) - best).square().mean()
            costs[index] += float(cost) * len(batch) / len(ids)
    runner.unload(None)
    return costs


def _variants(pruner: Pruner, candidates: Sequence[Candidate], block: Block) -> Iterable[dict[str, Tensor]]:
    """Tensors of one block of the fine-tune as it is, then with the delta of every candidate."""
    tuned = pruner.tuned
    full, base = tuned.read(block), tuned.base.read(block)
    yield full
    pieces = tuned.pieces(block, base, full)
    masked: dict[int, dict[str, tuple[Selection, Tensor]]] = {}
    for seed in {candidate.seed for candidate in candidates}:
        selections = {name: pruner.select(name, pieces, seed) for name in pieces}
        masked[seed] = {name: (found, found.masked(pieces[name])) for name, found in selections.items()}
    for candidate in candidates:
        scaled = {
            name: delta / pruner.q(name, pieces, selection, candidate.rescale)
            for name, (selection, delta) in masked[candidate.seed].items()
        }
        deltas = assemble(tuned.architecture, block, scaled, tuned.adapters)
        yield {**full, **{name: base[name].to(wide(base[name].dtype)) + delta for name, delta in deltas.items()}}
