"""What deltas are pruned with: codes of indices, exact choices, DARE's and DAREx's divisors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.archives import sparse
from secateur.checkpoints.patterns import information_bits
from secateur.deltas.packing import stored_values
from secateur.deltas.rescale import analytic_q, q_grid, sub_gaussian
from secateur.deltas.search import coarse_to_fine
from secateur.deltas.selection import Selection, best_entries, kept_count, random_choice

# -- codes -------------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 400), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_code_is_exact(size: int, share: float, seed: int) -> None:
    count = round(share * size)
    indices = np.sort(np.random.default_rng(seed).choice(size, count, replace=False)).astype(np.int64)
    assert np.array_equal(sparse.unpack_bits(sparse.pack_bits(indices, size), size), indices)
    code, low = sparse.pack_gaps(indices)
    assert np.array_equal(sparse.unpack_gaps(code, count, low), indices)
    coding, code, more = sparse.pack_indices(indices, size)
    assert np.array_equal(sparse.unpack_indices(coding, code, size, count, **more), indices)
    assert len(code) <= -(-size // 8)


@pytest.mark.parametrize("share", [0.3, 0.1, 0.01, 0.001])
def test_gaps_come_close_to_the_bound(share: float) -> None:
    size = 2**20
    indices = sparse.random_indices(size, int(share * size), 3)
    code, _ = sparse.pack_gaps(indices)
    assert 8 * len(code) <= 1.03 * information_bits(size, len(indices)) + 64


def test_the_bound_counts_subsets() -> None:
    for size, count in ((10, 3), (7, 7), (5, 0), (40, 20)):
        assert information_bits(size, count) == pytest.approx(math.log2(math.comb(size, count)), abs=1e-9)


def test_masks_of_a_seed_are_the_same_everywhere() -> None:
    """Pinned: a file must give the same mask on any machine and with any version of numpy."""
    assert sparse.random_indices(20, 5, 1).tolist() == PINNED
    assert sparse.seed_for(0, "blocks.0.q.weight") == sparse.seed_for(0, "blocks.0.q.weight")
    assert sparse.seed_for(0, "blocks.0.q.weight") != sparse.seed_for(1, "blocks.0.q.weight")
    drawn = np.zeros(50)
    for seed in range(2000):
        drawn[sparse.random_indices(50, 10, seed)] += 1
    assert abs(drawn / 2000 - 0.2).max() < 0.05


PINNED = [4, 5, 8, 18, 19]


@pytest.mark.parametrize("code", [b"", b"\x01", b"\xff\xff\xff\xff"])
def test_damaged_codes_are_refused(code: bytes) -> None:
    with pytest.raises(ValueError, match=r"indices|bytes"):
        sparse.unpack_indices("gaps", np.frombuffer(code, np.uint8), 8, 6, 1)


# -- selection ---------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 5000), ratio=st.floats(0, 0.999))
def test_counts_are_exact(size: int, ratio: float) -> None:
    count = kept_count(size, ratio)
    assert abs(size - count - ratio * size) <= 0.5 + 1e-9
    assert len(random_choice(size, count, 1).indices) == count


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), ratio=st.floats(0, 0.99), seed=st.integers(0, 9))
def test_rows_differ_by_one_at_most(rows: int, columns: int, ratio: float, seed: int) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    count = kept_count(rows * columns, ratio)
    for by_row in (True, False):
        found = best_entries(scores, count, by_row)
        assert len(found.indices) == count == len(set(found.indices))
        kept = torch.zeros(rows * columns, dtype=torch.bool)
        kept[torch.from_numpy(found.indices)] = True
        if by_row:
            per_row = kept.view(rows, columns).sum(1)
            assert int(per_row.max() - per_row.min()) <= 1
            for line, mask in zip(scores, kept.view(rows, columns), strict=True):
                if mask.any() and not mask.all():
                    assert line[mask].min() >= line[~mask].max()
        elif 0 < count < rows * columns:
            assert scores.view(-1)[kept].min() >= scores.view(-1)[~kept].max()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_take_and_spread(axis: Any) -> None:
    delta = torch.randn(6, 5)
    size = 30 if axis is None else delta.shape[axis]
    selection = random_choice(size, 3, 4, axis)
    masked = selection.masked(delta)
    assert int((masked != 0).sum()) == selection.entries(delta) == {None: 3, 0: 15, 1: 18}[axis]
    assert torch.equal(masked[masked != 0], delta[masked != 0])
    assert isinstance(selection, Selection)


def test_dare_is_unbiased() -> None:
    """The mean over seeds of mask * D / share is D."""
    delta = torch.randn(8, 8, dtype=torch.float64)
    total, runs = torch.zeros_like(delta), 4000
    for seed in range(runs):
        selection = random_choice(64, kept_count(64, 0.75), seed)
        total += selection.masked(delta) / selection.share
    error = (total / runs - delta).abs() / delta.abs().clamp(min=1e-3)
    assert float(error.max()) < 6 * math.sqrt(3 / runs)  # the variance of one entry is 3 D^2


# -- q -----------------------------------------------------------------------------------------------------------------


def by_hand(parts: Tensor, share: float, eta: float, gamma: float, guard: float) -> float:
    """The published loop over q, written out."""
    rows = parts.double().tolist()
    p, grid_of_q = 1 - share, q_grid(share).tolist()
    best, chosen, over = [math.inf] * len(rows), [share] * len(rows), [False] * len(rows)
    for q in grid_of_q:
        for i, row in enumerate(rows):
            mean = eta * (1 - (1 - p) / q) * sum(row)
            spread = eta**2 * sub_gaussian(p) * sum(c * c for c in row) / (4 * q**2)
            value = abs(mean + spread + math.log(2 / (1 - gamma)))
            if value >= best[i]:
                over[i] = True
            if value <= best[i]:
                best[i], chosen[i] = value, q
        if sum(over) / len(over) >= guard:
            break
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("eta", [0.05, 0.45, 3.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_analytic_q_is_the_published_loop(share: float, eta: float, scale: float) -> None:
    for seed, guard in ((0, 0.8), (1, 1.0), (2, 0.3)):
        parts = scale * torch.randn(7, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = analytic_q(parts, share, eta, 0.95, guard)
        assert found == pytest.approx(by_hand(parts, share, eta, 0.95, guard), abs=1e-12)
        assert share - 1e-12 <= found <= 0.999 + 1e-9


def test_sub_gaussian_is_continuous() -> None:
    assert sub_gaussian(0.5) == pytest.approx(sub_gaussian(0.5 + 1e-6), abs=1e-6)
    assert sub_gaussian(0.9) == pytest.approx(0.8 / math.log(9))


def test_coarse_to_fine_finds_the_minimum() -> None:
    asked: list[float] = []

    def costs(points: Any) -> list[float]:
        asked.extend(points)
        return [(q - 0.37) ** 2 for q in points]

    best, tried = coarse_to_fine(0.01, 1.0, costs)
    assert best == pytest.approx(0.37)
    assert len(asked) == len(set(asked)) == len(tried)
    assert {0.01, 1.0} <= set(asked)


def test_float16_values_are_scaled() -> None:
    for size in (1e-9, 1e-3, 1.0, 1e6):
        values = size * torch.randn(1000, dtype=torch.float64)
        stored, exponent = stored_values(values, torch.float16)
        error = (stored.double() * 2.0**exponent - values).abs() / size
        assert torch.isfinite(stored).all()
        assert float(error.max()) < 2e-3
    assert stored_values(torch.zeros(3), torch.float16)[1] == 0
