"""Scores of coupled channels against their formulas, the choice of what goes, and the closed sets behind both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.api.channels import graph, prune_module
from secateur.graph.atoms import Atoms, frozen
from secateur.graph.closures import closed_sets
from secateur.scores.channels import normalised, unit_scores


def chain() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    nn.init.normal_(module[1].weight)  # type: ignore[arg-type]
    return module, torch.randn(1, 3, 8, 8)


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max", "prod", "first"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "bn"])
def test_scores_are_those_of_the_formula(criterion: str, aggregation: str) -> None:
    module, inputs = chain()
    space = graph(module, inputs).space("0")
    tensors = dict(module.named_parameters())
    worth = torch.square if criterion == "l2" else torch.abs
    roles = ("norm",) if criterion == "bn" else ()
    found = unit_scores(space, lambda name: worth(tensors[name]), aggregation, "none", roles)  # type: ignore[arg-type]
    parts = [worth(module[1].weight), worth(module[1].bias)]  # type: ignore[arg-type]
    if criterion != "bn":
        first, bias, last = module[0].weight, module[0].bias, module[3].weight
        parts = [worth(first).sum((1, 2, 3)), worth(bias), *parts, worth(last).sum((0, 2, 3))]  # type: ignore[arg-type]
    stacked = torch.stack([part.detach().double() for part in parts])
    wanted = {
        "sum": stacked.sum(0),
        "mean": stacked.mean(0),
        "max": stacked.amax(0),
        "prod": stacked.clamp(min=1e-300).prod(0) ** (1 / len(parts)),
        "first": stacked[0],
    }[aggregation]
    assert torch.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_normalised_scores(sign: int) -> None:
    raw = torch.tensor([3.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    for normaliser, over in (("none", 1), ("sum", 12), ("mean", 3), ("max", 6), ("median", 2)):
        assert torch.allclose(normalised(sign * raw, normaliser) * over, sign * raw)  # type: ignore[arg-type]
    assert torch.allclose(normalised(raw, "standardise"), (raw - 1) / 5)
    assert torch.allclose(normalised(raw, "gaussian"), (raw - 3) / raw.std(correction=0))
    assert torch.allclose(normalised(raw, "lamp"), torch.tensor([3 / 9, 1 / 12, 2 / 11, 1.0]).double())


def test_dead_channels_go_first() -> None:
    """Channels without weights are found whatever the aggregation, and cutting them changes nothing."""
    module, inputs = chain()
    dead = [1, 4]
    with torch.no_grad():
        for tensor in (module[0].weight, module[0].bias, module[1].weight, module[1].bias):
            tensor[dead] = 0  # type: ignore[operator,index]
        module[3].weight[:, dead] = 0  # type: ignore[operator,index]
    for aggregation in ("sum", "mean", "max", "prod"):
        values = {"ratio": 0.3, "tolerance": 0.05, "options": {"aggregation": aggregation}}
        result = prune_module(module, inputs, values)
        assert result.removed == {"0": dead}
        assert result.model is not None
        assert torch.allclose(result.model(inputs), module(inputs), atol=1e-6)


def test_random_units_follow_the_seed() -> None:
    module, inputs = chain()
    values = {"ratio": 0.3, "tolerance": 0.2, "options": {"score_by": "random"}}
    first, again, other = (prune_module(module, inputs, {**values, "seed": seed}).removed for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_heads_and_dimensions_are_slabs() -> None:
    """A flat axis seen as (heads, dimensions): rows and columns go, single entries never."""
    atoms = Atoms()
    flat = atoms.fresh(6)
    heads, dims = atoms.split(flat, (2, 3))
    other = atoms.merge((heads, dims))
    atoms.tie(flat, other)
    classes = atoms.classes()
    batches = [[sorted(np.intersect1d(unit, classes.of(flat)) - flat[0]) for unit in b] for b in closed_sets(classes)]
    assert batches == [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]]


def test_slabs_of_two_views_close_over_both() -> None:
    """The same six channels as (2, 3) and as (3, 2): whatever goes must be slabs of both, so all or nothing."""
    atoms = Atoms()
    flat = atoms.fresh(6)
    atoms.split(flat, (2, 3))
    atoms.split(flat, (3, 2))
    classes = atoms.classes()
    units = [unit for batch in closed_sets(classes) for unit in batch]
    for unit in units:
        gone = np.isin(classes.of(flat), unit)
        for link in classes.links:
            slabs = np.zeros(link.shape, dtype=bool)
            for position, factor in enumerate(link.factors):
                slabs |= np.isin(factor, unit).reshape([-1 if axis == position else 1 for axis in range(2)])
            assert (slabs.ravel() == gone).all()


def test_frozen_entries_freeze_their_slabs() -> None:
    """One frozen entry of (2, 3) holds its row and its column; the rest can go."""
    atoms = Atoms()
    flat = atoms.fresh(6)
    atoms.split(flat, (2, 3))
    atoms.freeze(flat[:1])
    classes = atoms.classes()
    found = sorted(sorted(np.intersect1d(u, classes.of(flat)) - flat[0]) for b in closed_sets(classes) for u in b)
    assert found == [[1, 4], [2, 5], [3, 4, 5]]
    assert not frozen(3).any()
