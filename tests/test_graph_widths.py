"""Widths at initialisation: the convex problem against closed forms and brute force, and what PreCrop makes of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graph_nets import NETS, net
from secateur.api.channels import graph, prune_module
from secateur.budgets.widths import Sums, Widths, allocate
from secateur.graph.spaces import Graph


def widths_of(module: nn.Module, inputs: Tensor) -> tuple[Graph, Widths]:
    found = graph(module, inputs)
    return found, Widths(found, found.spaces)


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("name", sorted(set(NETS) - {"strange", "unet"}))
def test_costs_are_those_of_the_graph(name: str, measure: str) -> None:
    """With any share of one space gone, and with some of all: products of factors included.

    In the U-Net, channels are seen as two products at once, and the shares of such spaces are an approximation.
    """
    found, widths = widths_of(*net(name))
    cost = widths.cost(measure)
    spaces = found.spaces
    for chosen in (*([space] for space in spaces), [space for space in spaces if "+" not in space.name]):
        units = {space.name: list(range(space.size // 2)) for space in chosen if space.size > 1}
        x = np.log([1 - len(units.get(space.name, ())) / space.size for space in spaces])
        exact = getattr(found.costs, measure)(found.gone(units))
        assert cost(x) == pytest.approx(exact, rel=1e-9), units


def test_slopes_are_derivatives() -> None:
    generator = np.random.default_rng(0)
    cost = Sums(generator.random(7), generator.integers(0, 3, (7, 4)).astype(float))
    x, step = -generator.random(4), 1e-6
    slope, curvature = cost.slopes(x)
    for i, unit in enumerate(np.eye(4) * step):
        assert slope[i] == pytest.approx((cost(x + unit) - cost(x - unit)) / (2 * step), rel=1e-5)
        other = (cost.slopes(x + unit)[0] - cost.slopes(x - unit)[0]) / (2 * step)
        assert curvature[i] == pytest.approx(other, rel=1e-5)


def separate(costs: list[float]) -> Sums:
    """Layers whose densities are free of each other."""
    return Sums(np.array(costs), np.eye(len(costs)))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_water_level_of_independent_layers(share: float) -> None:
    """The paper's closed form: every layer that is not whole gets the same budget."""
    costs = [1.0, 2.0, 4.0, 30.0, 100.0]
    budget = share * sum(costs)
    found = allocate(np.ones(5), separate(costs), budget, np.full(5, 1e-6))
    low, high = 0.0, 200.0
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(c, level) for c in costs) < budget else (low, level)
    assert found == pytest.approx([min(1, level / c) for c in costs], rel=1e-5)
    assert separate(costs)(np.log(found)) == pytest.approx(budget, rel=1e-6)


def test_neighbours_of_a_chain_share_evenly() -> None:
    """What a width costs on both of its sides is the same for all widths below their caps, and less for whole ones."""
    sizes = [3.0, 40.0, 60.0, 80.0, 10.0]
    layers = [sizes[i] * sizes[i + 1] for i in range(4)]
    powers = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=float)
    found = allocate(np.full(3, 2.0), Sums(np.array(layers), powers), 0.2 * sum(layers), np.full(3, 1e-6))
    each = layers * np.exp(powers @ np.log(found))
    both = each[:-1] + each[1:]
    whole = found > 1 - 1e-6
    assert whole.any()
    assert both[~whole] == pytest.approx(both[~whole].max(), rel=1e-4)
    assert (both[whole] < both[~whole].max()).all()


def test_no_whole_widths_within_the_budget_are_worth_more() -> None:
    """Brute force over all sizes of a chain; the shares bound it, and rounding them comes within a unit of each."""
    sizes = np.array([6, 8, 7])
    layers = np.array([3.0 * 6, 6 * 8, 8 * 7, 7 * 4])
    powers = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=float)
    cost, worth = Sums(layers, powers), np.full(3, 2.0)
    budget = 0.45 * float(layers.sum())
    found = allocate(worth, cost, budget, 1 / sizes)
    best, most = None, -np.inf
    for counts in itertools.product(*(range(1, size + 1) for size in sizes)):
        x = np.log(np.array(counts) / sizes)
        if cost(x) <= budget and worth @ x > most:
            best, most = np.array(counts), float(worth @ x)
    assert best is not None
    assert float(worth @ np.log(found)) >= most - 1e-6
    assert (np.abs(found * sizes - best) <= 1.5).all()


def test_floors_and_generous_budgets() -> None:
    costs, least = separate([1.0, 2.0]), np.array([0.5, 0.5])
    assert allocate(np.ones(2), costs, 10.0, least) == pytest.approx([1, 1])
    assert allocate(np.ones(2), costs, 0.1, least) == pytest.approx([0.5, 0.5])
    assert len(allocate(np.ones(0), Sums(np.ones(1), np.zeros((1, 0))), 0.5, np.ones(0))) == 0


class Branches(nn.Module):
    """Blocks on a stream of fixed width with inner widths of their own: their costs are independent."""

    def __init__(self, inner: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, width, bias=False) for width in inner)
        self.up = nn.ModuleList(nn.Linear(width, 6, bias=False) for width in inner)

    def forward(self, x: Tensor) -> Tensor:
        for down, up in zip(self.down, self.up, strict=True):
            x = x + up(down(x).relu())
        return x


def test_precrop_gives_blocks_the_same_budget() -> None:
    """The closed form on a module: the inner widths, equal costs below the cap, are those of the water level."""
    inner = (10, 20, 80, 160)
    torch.manual_seed(0)
    module = Branches(inner).eval()
    values = {"method": "precrop", "ratio": 0.5, "options": {"floor": 0.01}}
    result = prune_module(module, torch.randn(2, 6), values)
    left = [width - len(result.removed.get(f"down.{i}", ())) for i, width in enumerate(inner)]
    assert left[:2] == [10, 20]
    assert abs(left[2] - left[3]) <= 1
    assert sum(left) == sum(inner) // 2


def test_precrop_keeps_target_quantum_and_seed() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 5, 1)).eval()
    inputs = torch.randn(1, 3, 9, 9)
    values = {"method": "precrop", "target": ["flops=50%"], "tolerance": 0.05, "options": {"quantum": 8}}
    first, again, other = (prune_module(module, inputs, {**values, "seed": seed}) for seed in (0, 0, 1))
    assert first.removed == again.removed != other.removed
    assert {name: len(units) for name, units in first.removed.items()} == {
        name: len(units) for name, units in other.removed.items()
    }
    assert all(len(units) % 8 == 0 for units in first.removed.values())
    assert abs(first.achieved["flops"] / first.achieved["flops_before"] - 0.5) <= 0.05


def test_rescaled_weights_have_the_variance_of_the_new_width() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 5)).eval()
    options = {"rescale": True}
    values = {"method": "precrop", "ratio": 0.75, "options": options}
    small = prune_module(module, torch.randn(2, 20), values).model
    plain = prune_module(module, torch.randn(2, 20), {**values, "options": {}}).model
    assert small is not None
    assert plain is not None
    for index in (2, 4):
        reads, shape = small[index], plain[index].weight.shape  # type: ignore[index]
        assert reads.weight.shape == shape
        factor = (400 / reads.in_features) ** 0.5  # type: ignore[union-attr,operator]
        assert torch.allclose(reads.weight, plain[index].weight * factor)  # type: ignore[index,union-attr,operator,arg-type]
    assert torch.equal(small[0].weight, plain[0].weight)  # type: ignore[index,union-attr,arg-type]
