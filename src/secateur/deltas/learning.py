"""A q for every matrix by gradient descent: q = (1 - p) + |theta|, so that the fine-tune's largest logits stay."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.deltas.sources import assemble, wide
from secateur.deltas.trials import TOP, Pruner
from secateur.engine.blocks import BlockRunner
from secateur.engine.progress import Progress
from secateur.errors import refuse
from secateur.families import Block
from secateur.meters.memory import available_bytes
from secateur.training.loop import batch_rows

_STEPS: Final = 200
_RATE: Final = 1e-2
_BATCH: Final = 8
_LENGTH: Final = 128  # tokens of a window
_EVERY: Final = 10  # steps between points of the curve
_PATIENCE: Final = 5  # points without a better one
_COPIES: Final = 5  # of the model in float32: base, masked deltas, their sum, its gradient, activations


def learn_q(
    pruner: Pruner, ids: Tensor, dtype: torch.dtype, device: torch.device, seed: int, told: Progress
) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """The q of every piece, and the mean cost of every ten steps.

    The squared change of the fine-tune's five largest logits is minimised by Adam, the rate falling to nought by a
    cosine; it ends early when five points of the curve brought nothing better. The q of the best point are kept.

    Args:
        ids: windows [count, length].
        seed: of the file's masks, and of the order of the windows.

    Raises:
        RequestError: the model does not fit into memory as often as this needs it.
    """
    needed = _COPIES * pruner.tuned.checkpoint.params * 4
    if device.type == "cpu" and needed > available_bytes():
        found = f"it holds the model {_COPIES} times, {needed / 2**30:.1f} GiB"
        refuse("memory", "q=learned", found, "--set q=search, which works block by block")
    model = _Whole(pruner, dtype, device, seed)
    windows = ids[:, :_LENGTH].to(device)
    with torch.no_grad():
        targets = [model.full(rows).float().topk(min(TOP, model.vocabulary)) for rows in torch.split(windows, _BATCH)]
    best, where = torch.cat([top.values for top in targets]), torch.cat([top.indices for top in targets])
    thetas = nn.ParameterList([nn.Parameter(torch.tensor(1e-4, device=device)) for _ in model.names])
    optimizer = torch.optim.Adam(thetas.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    curve: list[tuple[int, float]] = []
    kept, least, worse, total = model.divisors(thetas), float("inf"), 0, 0.0
    told.start("learn", _STEPS)
    for step in range(1, _STEPS + 1):
        before = [q.detach() for q in model.divisors(thetas)]
        rows = torch.from_numpy(batch_rows(step - 1, min(_BATCH, len(windows)), len(windows), seed)).to(device)
        logits = model.pruned(windows[rows], model.divisors(thetas)).float()
        loss = (logits.gather(-1, where[rows]) - best[rows]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += float(loss.detach())
        if step % _EVERY == 0:
            curve.append((step, total / _EVERY))
            worse = 0 if total < least else worse + 1
            if total < least:
                least, kept = total, before
            total = 0.0
            if worse >= _PATIENCE:
                break
        told.step(step)
    return {name: float(q) for name, q in zip(model.names, kept, strict=True)}, curve


class _Whole:
    """The whole model in memory, with the masked delta beside it."""

    def __init__(self, pruner: Pruner, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._tuned = tuned = pruner.tuned
        self._dtype, self._device = dtype, device
        self._runner = BlockRunner(tuned.architecture, dtype, device, tuned.checkpoint.rest())
        self.vocabulary = tuned.architecture.sizes.vocab
        self._base: dict[Block, dict[str, Tensor]] = {}
        self._masked: dict[Block, dict[str, Tensor]] = {}
        self.names: list[str] = []
        self._shares: list[float] = []
        for place in tuned.architecture.places:
            full = tuned.read(place)
            self._runner.load(place, full)
            if place is None:
                continue
            base = tuned.base.read(place)
            pieces = tuned.pieces(place, base, full)
            selections = {name: pruner.select(name, pieces, seed) for name in pieces}
            self._masked[place] = {n: s.masked(pieces[n]).to(device) for n, s in selections.items()}
            touched = assemble(tuned.architecture, place, self._masked[place], tuned.adapters)
            self._base[place] = {n: (base[n] if n in touched else t).to(device) for n, t in full.items()}
            self.names += list(selections)
            self._shares += [selection.share for selection in selections.values()]

    def divisors(self, thetas: nn.ParameterList) -> list[Tensor]:
        """The q of every piece."""
        return [share + theta.abs() for share, theta in zip(self._shares, thetas, strict=True)]

    def full(self, ids: Tensor) -> Tensor:
        """Logits of the fine-tune."""
        found: Tensor = self._runner.model(input_ids=ids, use_cache=False).logits
        return found

    def pruned(self, ids: Tensor, divisors: list[Tensor]) -> Tensor:
        """Logits with the masked delta divided by these."""
        by_name, given = dict(zip(self.names, divisors, strict=True)), {}
        architecture = self._tuned.architecture
        for place, masked in self._masked.items():
            scaled = {name: delta / by_name[name].to(delta.dtype) for name, delta in masked.items()}
            deltas = assemble(architecture, place, scaled, self._tuned.adapters)
            base = self._base[place]
            tensors = {**base, **{n: base[n].to(wide(base[n].dtype)) + delta for n, delta in deltas.items()}}
            for packed in architecture.packed_of(place):
                if any(name in deltas for name in packed.canonical):
                    given[packed.name] = packed.pack(tensors).to(self._dtype)
        found: Tensor = functional_call(self._runner.model, given, kwargs={"input_ids": ids, "use_cache": False}).logits
        return found
