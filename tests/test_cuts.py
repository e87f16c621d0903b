"""Cuts of a LayerNorm stream, exact in the stock classes, and the maps behind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import masking
import models
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint, Folder
from secateur.cuts import cut_place
from secateur.cuts.stream import StreamBasis, hyperplane
from secateur.families import resized
from secateur.plans import Plan


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random orthonormal columns."""
    noise = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


@pytest.mark.parametrize("directions", ["mean-free", "any"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_layer_norm_stream_is_exact_at_full_width(family: str, directions: str, checkpoint: Checkpoints) -> None:
    """D - 1 directions need the spare dimension and fill the stock model's width: no size changes, all tensors do."""
    folder = checkpoint(family, torch.float64)
    source = Checkpoint(Folder(folder))
    sizes = source.architecture.sizes
    width = sizes.residual
    basis = (
        hyperplane(width) @ orthonormal(width - 1, width - 1)
        if directions == "mean-free"
        else orthonormal(width, width - 1)
    )
    plan = Plan(sizes, sizes.untied(), bases={"residual": basis})
    target = resized(source.architecture, plan.after)
    state: dict[str, Tensor] = {}
    for place in source.architecture.places:
        tensors = cut_place(source.architecture, target, place, source.read(place), plan)
        state.update({packed.name: packed.pack(tensors) for packed in target.packed_of(place)})
    cut = models.stock(family, torch.float64, tie_word_embeddings=False)
    cut.load_state_dict(state, strict=True)
    dense = models.load(folder, dtype=torch.float64)
    ids = models.token_ids()
    expected = masking.logits(masking.mask(dense, models.ALL[family].where, plan), ids)
    assert masking.difference(expected, masking.logits(cut, ids)) < 1e-10
    # without the mean nothing is lost; with it, one direction is
    changed = masking.difference(expected, masking.logits(models.load(folder), ids))
    assert changed > 1e-3 if directions == "any" else changed < 1e-10


@given(width=st.integers(3, 24), data=st.data())
def test_maps_commute_with_layer_norm(width: int, data: st.DataObject) -> None:
    """LN(s R x) / s restored is LN(P x), for any directions, at the width the basis asks for."""
    count = data.draw(st.integers(1, width - 1))
    basis = StreamBasis(orthonormal(width, count, data.draw(st.integers(0, 99))), mean_free=True)
    signal = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = signal @ basis.directions @ basis.directions.t()
    expected = functional.layer_norm(projected, (width,), eps=1e-5)
    weight = torch.full((basis.width,), 1 / basis.scale, dtype=torch.float64)
    narrow = functional.layer_norm(signal @ (basis.scale * basis.reduce).t(), (basis.width,), weight, eps=1e-5)
    assert basis.width == count + 1
    torch.testing.assert_close(narrow @ basis.restore.t(), expected, rtol=1e-8, atol=1e-9)


@given(width=st.integers(1, 24), data=st.data())
def test_maps_commute_with_rms_norm(width: int, data: st.DataObject) -> None:
    """RMS(s R x) / s restored is RMS(P x)."""
    count = data.draw(st.integers(1, width))
    basis = StreamBasis(orthonormal(width, count, data.draw(st.integers(0, 99))), mean_free=False)
    signal = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = signal @ basis.directions @ basis.directions.t()
    expected = functional.rms_norm(projected, (width,), eps=1e-5)
    weight = torch.full((count,), 1 / basis.scale, dtype=torch.float64)
    narrow = functional.rms_norm(signal @ (basis.scale * basis.reduce).t(), (count,), weight, eps=1e-5)
    torch.testing.assert_close(narrow @ basis.restore.t(), expected, rtol=1e-8, atol=1e-9)


@given(size=st.integers(2, 40))
def test_hyperplane(size: int) -> None:
    """Orthonormal, and orthogonal to the vector of ones."""
    basis = hyperplane(size)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(size - 1, dtype=torch.float64))
    assert basis.sum(0).abs().max() < 1e-12
