"""The training loop: AdamW over shuffled windows, resumable to the byte.

Nothing in it is drawn from a running generator: the order of the windows is a function of seed and step, dropout is
off. A checkpoint is therefore the parameters, the optimiser's moments and the number of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from secateur.engine.journal import Journal
from secateur.engine.progress import Progress
from secateur.errors import refuse
from secateur.training.anchored import AdamR
from secateur.training.objective import Objective, cross_entropy
from secateur.training.options import Training
from secateur.training.snapshots import Snapshots

_PASS_TOKENS: Final = 2048  # of one forward pass; a larger batch is summed over several


@dataclass(frozen=True)
class Length:
    """How long to train: until the steps are done or the time is up, whichever comes first."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over."""
        parts = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(parts))


@dataclass(frozen=True)
class Outcome:
    """What a training did.

    Attributes:
        curve: points with ``steps``, ``rate``, ``loss`` (mean since the last point), ``cross_entropy`` (the same) and
            ``validation`` (cross entropy on held-back windows), in nats per token.
        best: step whose weights were kept.
        seconds: of training, those of interrupted runs included.
    """

    curve: list[dict[str, Any]]
    best: int
    steps: int
    tokens: int
    seconds: float
    trainable: int


def rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Learning rate at a share of the run, relative to the highest."""
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    left = (1 - progress) / (1 - warmup)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def batch_rows(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """Rows of the windows of a step: every window once per epoch, each epoch in an order of its own."""
    first = step * batch
    epochs = range(first // count, (first + batch - 1) // count + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    return order[first % count : first % count + batch]


@contextmanager
def _fast_zeros(device: torch.device) -> Iterator[None]:
    """Treat denormal numbers as zero on a CPU, where they are many times slower; gradients are full of them."""
    changed = device.type == "cpu" and torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if changed:
            torch.set_flush_denormal(False)


class Trainer:
    """Trains the parameters of a model that ask for gradients.

    Args:
        model: on its device, in evaluation mode (no dropout).
        objective: the loss; its own parameters train along.
        train, held_back: windows [rows, T]; without held-back ones the last weights are kept.
        options: rates, batch, points of the curve.
        length: when to stop.
        seed: of the order of the windows.
        work: folder for checkpoints.
        journal: remembers them.
        compute: data type of the forward pass; a half one is used through autocast.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        train: Tensor,
        held_back: Tensor,
        options: Training,
        length: Length,
        seed: int,
        work: Path,
        journal: Journal,
        progress: Progress,
        compute: torch.dtype,
    ) -> None:
        self.model, self.objective, self.options, self.length, self.seed = model, objective, options, length, seed
        self.train_ids, self.held_back, self.progress = train, held_back, progress
        self.device = next(model.parameters()).device
        self.half = compute if compute in (torch.bfloat16, torch.float16) else None
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trainable = sum(p.numel() for p in own.values())
        self.params = {**own, **{f"objective.{name}": p for name, p in objective.named_parameters()}}
        self.optimizer = self._optimizer(list(own.values()), list(objective.parameters()))
        self.snapshots = Snapshots(work, journal, self.params, self.optimizer)

    def _optimizer(self, own: list[nn.Parameter], maps: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, or AdamR anchored where the model stands now; what the objective trains along is anchored nowhere."""
        options = self.options
        if options.anchor is not None:
            groups: list[dict[str, Any]] = [{"params": own}, {"params": maps, "strength": 0.0}]
            return AdamR([g for g in groups if g["params"]], 0.0, options.anchor_strength or 0.0, options.anchor)
        params = [*own, *maps]
        return torch.optim.AdamW(
            [
                {"params": [p for p in params if p.ndim > 1], "weight_decay": options.weight_decay},
                {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=0.0,
        )

    def run(self) -> Outcome:
        """Train to the end, from where an interrupted run stood; the kept weights are in the model afterwards."""
        with _fast_zeros(self.device):
            return self._run()

    def _run(self) -> Outcome:
        curve = self.snapshots.resume()
        if not curve:
            curve = [self._point(0, 0.0, None, 0.0, False, [])]
        step, before, started = curve[-1]["steps"], curve[-1]["seconds"], time.monotonic()
        self.progress.start("train", self.length.steps or 100)
        sums, since = np.zeros(2), 0
        while not curve[-1]["last"]:
            share = self.length.progress(step, before + time.monotonic() - started)
            rate = (self.options.learning_rate or 0.0) * rate_factor(share, self.options.schedule, self.options.warmup)
            sums += self._step(step, rate)
            step, since = step + 1, since + 1
            seconds = before + time.monotonic() - started
            over = self.length.progress(step, seconds) >= 1
            self.progress.step(step if self.length.steps else int(100 * self.length.progress(step, seconds)))
            if over or step % self.options.every == 0:
                curve.append(self._point(step, rate, (sums / since).tolist(), seconds, over, curve))
                sums, since = np.zeros(2), 0
        best = self.snapshots.best_of(curve, self.options.keep)
        self.snapshots.restore(best)
        shown = ("steps", "rate", "loss", "cross_entropy", "validation")
        points = [{key: point[key] for key in shown} for point in curve]
        tokens = step * self.options.batch * (self.train_ids.shape[1] - 1)
        return Outcome(points, best["steps"], step, tokens, curve[-1]["seconds"], self.trainable)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None)

    def _step(self, step: int, rate: float) -> np.ndarray:
        """One update; returns loss and cross entropy."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = batch_rows(step, self.options.batch, len(self.train_ids), self.seed)
        total = np.zeros(2)
        for ids in self._passes(self.train_ids[rows]):
            share = len(ids) / len(rows)
            with self._autocast():
                loss, entropy = self.objective(self.model, ids)
            (share * loss).backward()
            total += share * np.array([loss.item(), entropy.item()])
        if not np.isfinite(total).all():
            hint = f"lower it: --set learning_rate={(self.options.learning_rate or 0) / 4:g}"
            refuse("diverged", f"training at rate {rate:g}", f"the loss is {total[0]} at step {step + 1}", hint)
        nn.utils.clip_grad_norm_(self.params.values(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _passes(self, ids: Tensor) -> Iterator[Tensor]:
        """Windows in portions of bounded size, on the device."""
        for portion in torch.split(ids, max(1, _PASS_TOKENS // ids.shape[1])):
            yield portion.to(self.device)

    @torch.no_grad()
    def _validate(self) -> float | None:
        if not len(self.held_back):
            return None
        total = 0.0
        for ids in self._passes(self.held_back):
            with self._autocast():
                logits = self.model(input_ids=ids, use_cache=False).logits
            total += len(ids) * cross_entropy(logits, ids).item()
        return total / len(self.held_back)

    def _point(
        self, step: int, rate: float, means: list[float] | None, seconds: float, last: bool, curve: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Measure, checkpoint, tell."""
        loss, entropy = means or (None, None)
        point = {"steps": step, "rate": rate, "loss": loss, "cross_entropy": entropy, "validation": self._validate()}
        told = ", ".join(f"{k} {v:.4f}" for k, v in point.items() if k not in ("steps", "rate") and v is not None)
        self.progress.note(f"step {step}: {told}")
        return self.snapshots.save({**point, "seconds": seconds, "last": last}, curve, self.options.keep)
