"""Layer maps: the mean is kept, bounds hold, the order is that of the scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.budgets.layer_maps import scaled, shrunk, sigmoid_map, softmax_map

_scores = st.lists(st.floats(0, 1), min_size=2, max_size=40).map(lambda s: torch.tensor(s, dtype=torch.float64))
_mean = st.floats(0.01, 0.79)


def _ordered(scores: Tensor, shares: Tensor) -> bool:
    """Whether shares never fall while scores rise."""
    return bool((shares[scores.sort(stable=True).indices].diff() >= -1e-9).all())


@given(_scores, _mean, st.floats(0.01, 10))
def test_softmax_keeps_the_mean_under_its_cap(scores: Tensor, mean: float, temperature: float) -> None:
    shares = softmax_map(scores, temperature, mean, 0.8)
    assert shares.mean() == pytest.approx(mean, abs=1e-9)
    assert shares.min() >= 0
    assert shares.max() <= 0.8
    assert _ordered(-scores, shares)
    free = shares[shares < 0.8 - 1e-9]  # the rest is in proportion to the softmax still
    wanted = torch.exp(-scores / temperature)[shares < 0.8 - 1e-9]
    assert torch.allclose(free / free.sum(), wanted / wanted.sum(), atol=1e-6)


def test_softmax_without_a_cap_in_sight_is_the_closed_form() -> None:
    scores = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    assert torch.allclose(softmax_map(scores, 0.3, 0.2), 0.6 * torch.softmax(-scores / 0.3, 0))
    assert torch.allclose(softmax_map(scores, 1e9, 0.2), torch.full((3,), 0.2, dtype=torch.float64))


@given(_scores, _mean, st.floats(0, 30))
def test_sigmoid_keeps_the_mean_and_at_most_everything(scores: Tensor, mean: float, slope: float) -> None:
    shares = sigmoid_map(scores, slope, mean)
    assert shares.mean() == pytest.approx(mean)
    assert shares.min() > 0
    assert shares.max() <= 1 + 1e-12
    assert _ordered(scores, shares)


@given(_scores, st.floats(0.02, 0.4), st.floats(1.01, 1.9))
def test_every_share_grows_with_the_mean(scores: Tensor, mean: float, factor: float) -> None:
    for shares in (
        lambda m: softmax_map(scores, 0.1, m, 0.8),
        lambda m: sigmoid_map(scores, 13.1, m),
        lambda m: shrunk(scores + 0.1, m),
        lambda m: scaled(scores + 0.1, m),
    ):
        assert (shares(factor * mean) >= shares(mean) - 1e-9).all()
