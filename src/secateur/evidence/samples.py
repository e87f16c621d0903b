"""A few thousand raw signals of a place, for what no moment can say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.evidence.totals import Later

LIMIT = 2048


class Samples:
    """Evenly spaced rows of a signal, at least ``limit`` of them and fewer than twice as many once there are enough.

    Whenever twice the limit is reached, every second row goes and the stride doubles, so what stays are the rows whose
    number, counted from the first row of all, is a multiple of the stride. The first token of a window, which carries
    massive activations, is passed over.

    Args:
        limit: rows that are enough.
        start: number of the first row that is added, if signals have windows and if they have none; None where it is
            not known yet, so that all rows stay.
        later: copies the rows of a shard to where they wait, where all stay.
    """

    def __init__(self, limit: int = LIMIT, start: tuple[int, int] | None = (0, 0), later: Later | None = None) -> None:
        self._limit, self._stride, self._starts, self._later = limit, 1, start, later
        self._start = 0
        self._seen = 0
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, signal: Tensor) -> None:
        """Add a signal of shape [windows, tokens, width], or [..., width] without windows."""
        if self._starts is not None and not self._seen:
            self._start = self._starts[signal.ndim != 3]
        if signal.ndim == 3 and signal.shape[1] > 1:
            signal = signal[:, 1:]
        rows = signal.detach().reshape(-1, signal.shape[-1])
        first = -(self._start + self._seen) % self._stride
        self._seen += len(rows)
        taken = rows[first :: self._stride].cpu()
        self._rows.append((taken if taken.dtype == torch.float64 else taken.float()).clone())
        self._count += len(taken)
        while self._starts is not None and self._count >= 2 * self._limit:
            self._rows = [_thinned(torch.cat(self._rows), self._start, self._stride, 2 * self._stride)]
            self._count, self._stride = len(self._rows[0]), 2 * self._stride

    def close_shard(self) -> None:
        """Rows are kept in their order; where all of them stay, those of a shard move to where they wait."""
        if self._starts is None and self._later is not None and self._rows:
            self._rows = [self._later(torch.cat(self._rows))]

    def part(self) -> list[Tensor]:
        """What another process needs to know of these rows: how many were seen, and what stays of them."""
        return [torch.tensor([self._seen, self._stride]), *self._rows]

    def join(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Go on with the rows of the processes behind this one, in their order."""
        found, start = [(self._start, self._stride, self._rows)], self._start + self._seen
        for head, *rows in parts:
            seen, stride = head.tolist()
            found.append((start, stride, list(rows)))
            start, self._seen = start + seen, self._seen + seen
        self._stride = max(stride for _, stride, _ in found)
        while -(-self._seen // self._stride) >= 2 * self._limit:
            self._stride *= 2
        self._rows = [_thinned(torch.cat(rows), at, stride, self._stride) for at, stride, rows in found if rows]
        self._count = sum(map(len, self._rows))

    def named(self, name: str) -> dict[str, Tensor]:
        """``NAME.samples``: [rows, width]."""
        return {f"{name}.samples": torch.cat(self._rows)} if self._rows else {}


def _thinned(rows: Tensor, start: int, before: int, stride: int) -> Tensor:
    """Of rows whose numbers are the multiples of ``before`` from ``start`` on, those of multiples of ``stride``."""
    first = -(-start // before)  # of the rows that are there, in units of ``before``
    step = stride // before
    return rows[-first % step :: step].clone()
