"""First and second moments of signals, gathered shard by shard."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.evidence.totals import Later, Total

_CHUNK = 4096  # rows of one float32 product; sums over chunks are float64
_TILE = 512  # columns of a product of a signal with itself that are multiplied at once


class Moments:
    """Sums over tokens of a signal x: of x x^T or of its diagonal, of x, and their number.

    Products are float32 (float64 for float64 signals), sums float64. Gathered one logical shard at a time:
    ``close_shard`` adds a shard's sums to the totals, so the order of the float64 additions does not depend on how many
    processes share the shards.

    Args:
        width: dimensions of the signal.
        device: where to sum.
        gram: whether all products are summed, or the squares alone.
        later: see :class:`Total`.
    """

    def __init__(self, width: int, device: torch.device, gram: bool = True, later: Later | None = None) -> None:
        self._second = Total((width, width) if gram else (width,), device, later=later)
        self._first = Total((width,), device, later=later)
        self._count = Total((1,), torch.device("cpu"), later=later)
        self._gram = gram

    @property
    def totals(self) -> list[Total]:
        return [self._second, self._first, self._count]

    @property
    def second(self) -> Tensor:
        """Sum of all products, or of the squares."""
        if self._gram:
            _mirror(self._second.value)
        return self._second.value

    @property
    def first(self) -> Tensor:
        return self._first.value

    @property
    def count(self) -> int:
        """Tokens of all closed shards."""
        return int(self._count.value)

    def add(self, signal: Tensor) -> None:
        """Add a signal of shape [..., width]."""
        rows = signal.detach().reshape(-1, signal.shape[-1])
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        for chunk in torch.split(rows, _CHUNK):
            if self._gram:
                _add_products(self._second.running, chunk)
            else:
                self._second.running += chunk.square().sum(0, dtype=torch.float64)
            self._first.running += chunk.sum(0, dtype=torch.float64)
        self._count.running += len(rows)

    def close_shard(self) -> None:
        """Add the running shard to the totals and start the next."""
        for total in self.totals:
            total.close_shard()

    def named(self, name: str) -> dict[str, Tensor]:
        """The totals: ``NAME.gram`` [n, n] or ``NAME.squares`` [n], ``NAME.sum`` [n] and ``NAME.count`` [1]."""
        kind = "gram" if self._gram else "squares"
        return {f"{name}.{kind}": self.second, f"{name}.sum": self.first, f"{name}.count": self._count.value}


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add X^T X of [m, n]; tiles below the diagonal are left out, which saves close to half of the work."""
    width = rows.shape[1]
    if width <= _TILE:
        total += rows.t() @ rows
        return
    half = width // 2
    one, other = rows[:, :half], rows[:, half:]
    _add_products(total[:half, :half], one)
    _add_products(total[half:, half:], other)
    total[:half, half:] += one.t() @ other


def _mirror(total: Tensor) -> None:
    """Copy the tiles above the diagonal to those that :func:`_add_products` left out."""
    width = len(total)
    if width <= _TILE:
        return
    half = width // 2
    _mirror(total[:half, :half])
    _mirror(total[half:, half:])
    total[half:, :half] = total[:half, half:].t()


class CrossMoments:
    """Sums over tokens of y x^T of two signals, as :class:`Moments` sums those of one.

    Args:
        rows, columns: dimensions of y and of x.
        device: where to sum.
        later: see :class:`Total`.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, later: Later | None = None) -> None:
        self._sum = Total((rows, columns), device, later=later)

    @property
    def totals(self) -> list[Total]:
        return [self._sum]

    @property
    def total(self) -> Tensor:
        return self._sum.value

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add signals of shapes [..., rows] and [..., columns]."""
        both = [signal.detach().reshape(-1, signal.shape[-1]) for signal in (one, other)]
        wide = torch.float64 if both[0].dtype == torch.float64 else torch.float32
        for left, right in zip(*(torch.split(signal.to(wide), _CHUNK) for signal in both), strict=True):
            self._sum.running += left.t() @ right

    def close_shard(self) -> None:
        """Add the running shard to the total and start the next."""
        self._sum.close_shard()


class Influence:
    """How much a block changes what runs through it: block influence and its relatives, means over tokens.

    The cosine is taken token by token, never of the first token of a window, which carries massive activations
    (ShortGPT, arXiv:2403.03853, eq. 1), unless there is no other.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        """Of every batch its three sums and its count, [4] float64: added in their order, whoever took them."""

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add the signals [windows, tokens, width] in front of and behind a block."""
        first = int(before.shape[1] > 1)
        one, other = (signal[:, first:].double().flatten(0, 1) for signal in (before, after))
        norm = one.norm(dim=1).clamp(min=1e-30)
        cosine = ((one * other).sum(1) / (norm * other.norm(dim=1).clamp(min=1e-30))).clamp(-1, 1)
        angle, change = torch.arccos(cosine) / torch.pi, (other - one).norm(dim=1) / norm
        count = torch.tensor(len(one), dtype=torch.float64)
        self.parts.append(torch.stack([*(each.sum().cpu() for each in (1 - cosine, angle, change)), count]))

    def named(self) -> dict[str, Tensor]:
        """``influence``: [1 - cosine, angle / pi, relative change], each a mean over tokens."""
        sums = torch.zeros(4, dtype=torch.float64)
        for part in self.parts:
            sums += part
        return {"influence": sums[:3] / sums[3].clamp(min=1)}
