"""Hard arithmetic: finite weights or a refusal that says where; damping that grows is told.

Every method on every case: ``python tests/numerics.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import models
import numerics
import secateur
from secateur.engine.activations import require_finite_signal
from secateur.engine.journal import Journal, raised_damping
from secateur.engine.solvable import solving
from secateur.errors import RequestError
from secateur.mends.obs import obs_sweep
from secateur.scores.ridge import inverse_factor, ridge_factor, take_raised

SHORT = [
    ("fasp", "all matrices are zero"),
    ("slicegpt", "all matrices are zero"),
    ("sparsegpt", "outliers a million times as large"),
    ("fasp", "outliers of 1e30"),
    ("llm_pruner", "one window of one token"),
    ("fasp", "one window of one token"),
    ("shortgpt", "one window of one token"),
    ("wanda", "one window of two tokens"),
    ("flap", "always the same token"),
    ("fasp", "computed in float16, overflowing"),
    ("fasp", "stored in float16, near its largest number"),
    ("magnitude", "a NaN in a weight"),
    ("wanda", "an infinite weight"),
]


@pytest.mark.filterwarnings("ignore")  # of numpy and torch about overflows, which is what this is about
@pytest.mark.parametrize(("method", "case"), SHORT)
def test_finite_or_refused(method: str, case: str, tmp_path: Path) -> None:
    assert numerics.outcome(method, case, tmp_path)


def test_the_window_and_the_block_are_named() -> None:
    signal = torch.zeros(3, 4, 2)
    require_finite_signal(signal, "block 7", 10)
    require_finite_signal(signal + 3e38, "block 7", 10)  # whose sum is not finite
    signal[1, 2, 0] = torch.nan
    with pytest.raises(RequestError, match="block 7 are not finite, first in calibration window 11 at token 2"):
        require_finite_signal(signal, "block 7", 10)


def test_damping_grows_until_there_is_a_factor_and_is_told() -> None:
    take_raised()
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.4], dtype=torch.float64))  # as rounding may leave it
    factor, delta = ridge_factor(gram, 1e-2)
    assert delta == pytest.approx(1e-2 * 100 * 1.6 / 3)
    assert bool(factor.isfinite().all())
    inverse_factor(torch.eye(3), 1e-2)
    assert take_raised() == [100]
    assert take_raised() == []
    with pytest.raises(ArithmeticError, match="not finite"):
        ridge_factor(torch.full((2, 2), torch.nan), 1e-2)


def test_an_inverse_without_a_factor_is_damped_further() -> None:
    """In float32, the inverse of a matrix of rank one with next to no ridge is not positive definite."""
    take_raised()
    signal = torch.linspace(1, 2, 64)[:, None] * 1e3
    weights, stays = obs_sweep(
        torch.ones(4, 64), signal @ signal.t(), lambda scores, *_: scores > scores.median(), damping=1e-9
    )
    assert bool(weights.isfinite().all())
    assert 0 < int(stays.sum()) < stays.numel()
    assert max(take_raised()) >= 10


def test_what_cannot_be_solved_names_the_block() -> None:
    with (
        pytest.raises(RequestError, match="mending block 3: its normal equations have no solution"),
        solving("mending", 3),
    ):
        ridge_factor(torch.full((2, 2), torch.nan), 1e-2)
    with pytest.raises(RequestError, match="scoring the stem"), solving("scoring", None):
        torch.linalg.cholesky(-torch.eye(2))


def test_raised_damping_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal says where, so that a resumed run says the same; a place that was done twice counts once."""
    take_raised()
    journal = Journal(tmp_path, {"what": 1})
    journal.add("cut", place=0)
    assert raised_damping(tmp_path) == {}
    for _ in range(2):
        ridge_factor(torch.diag(torch.tensor([1.0, -0.5])), 1e-2)
        journal.add("mend", block=4, sha256="")
    told = raised_damping(tmp_path)["damping_raised"]
    assert told == "in 1 normal equations, up to 1,000 times, in block 4"

    (tmp_path / "notes.txt").write_text(models.text(200))
    monkeypatch.setattr("secateur.mends.least_squares.DAMPING", 1e-2)

    def weak(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
        return ridge_factor(gram - 2 * damping * gram.diagonal().mean() * torch.eye(len(gram)), damping)

    monkeypatch.setattr("secateur.mends.least_squares.ridge_factor", weak)
    secateur.prune(
        models.save(tmp_path / "model"),
        method="fasp",
        ratio=0.15,
        data=tmp_path / "notes.txt",
        samples=1,
        length=4,
        output=tmp_path / "out",
    )
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert "up to 10 times, in blocks 0, 1, 2" in record["notes"]["damping_raised"]
    assert "damping raised" in (tmp_path / "out" / "secateur-report.md").read_text()
