"""PAGCP: its allowances, its passes, and who broke first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur import SecateurError
from secateur.api.channels import prune_module
from secateur.methods.pagcp import decay_of


class TwoTasks(nn.Module):
    """One trunk, two heads: the second reads only the last half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 24, 1)
        self.classes, self.depth = nn.Conv2d(24, 4, 1), nn.Conv2d(24, 1, 1)
        with torch.no_grad():
            self.depth.weight[:, :12] = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.first(x).relu()).relu()
        return self.classes(x).mean((2, 3)), self.depth(x).mean((1, 2, 3))


def tasks() -> tuple[nn.Module, Tensor, dict[str, object]]:
    torch.manual_seed(0)
    module, inputs = TwoTasks().eval(), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        scores, depth = module(inputs)
    labels = {"classes": scores.argmax(1), "depth": depth + 0.1}
    losses = {
        "classes": lambda out, label: functional.cross_entropy(out[0], label["classes"]),
        "depth": lambda out, label: functional.mse_loss(out[1], label["depth"]),
    }
    return module, inputs, {"method": "pagcp", "data": [(inputs, labels)], "loss": losses}


@pytest.mark.parametrize(
    ("start", "limit", "count"), [(0.05, 5.0, 12), (0.06, 6.0, 60), (0.05, 1.5, 12), (0.3, 2.0, 4)]
)
def test_allowances_multiply_to_the_limit(start: float, limit: float, count: int) -> None:
    factor = decay_of(start, limit, count)
    assert float(np.prod(1 + start * factor ** np.arange(count))) == pytest.approx(limit, rel=1e-9)


def test_one_space_may_not_use_up_more_than_the_limit() -> None:
    assert decay_of(0.5, 1.2, 6) == 0.0
    assert decay_of(0.05, 5.0, 1) == 1.0


def test_targets_are_met_and_the_first_task_to_break_is_told() -> None:
    module, inputs, values = tasks()
    for ratio in (0.3, 0.6):
        result = prune_module(module, inputs, {**values, "ratio": ratio, "tolerance": 0.04})
        assert abs(result.achieved["params"] / result.achieved["params_before"] - (1 - ratio)) <= 0.04
        assert set(result.notes["broke"].values()) <= {"classes", "depth", ""}
        assert result.notes["scale"] > 0
    assert any(result.notes["broke"].values())


def test_bisection_finds_what_trying_all_ratios_does_where_losses_rise() -> None:
    module, inputs, values = tasks()
    found = []
    for search in ("bisect", "all"):
        options = {"search": search, "scale": 4.0}
        result = prune_module(module, inputs, {**values, "ratio": 0.05, "tolerance": 0.05, "options": options})
        found.append((result.removed, result.notes["evaluations"]))
    assert found[0][0] == found[1][0]
    assert found[0][1] < found[1][1]


def test_allowances_of_the_paper_bound_the_cut() -> None:
    module, inputs, values = tasks()
    with pytest.raises(SecateurError, match="these allowances leave") as failure:
        prune_module(module, inputs, {**values, "ratio": 0.9, "options": {"scale": 0.001}})
    assert failure.value.code == "target-out-of-reach"


def test_harmless_channels_go_first() -> None:
    """Channels that no head reads raise no loss, however large they are; small ones that both read stay."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        module[0].weight[:6] *= 0.1
        module[0].bias[:6] *= 0.1
        module[2].weight[:, :6] = 0
    inputs = torch.randn(32, 3)
    labels = module(inputs).argmax(1)
    values = {"method": "pagcp", "ratio": 0.25, "tolerance": 0.06, "data": [(inputs, labels)]}
    result = prune_module(module, inputs, {**values, "options": {"scale": 0.02, "start": 0.05}})
    assert set(result.removed) == {"0"}
    assert set(result.removed["0"]) <= set(range(6))
    assert result.model is not None
    assert torch.allclose(result.model(inputs), module(inputs), atol=1e-5)


def test_labels_are_asked_for() -> None:
    module, inputs, values = tasks()
    with pytest.raises(SecateurError) as failure:
        prune_module(module, inputs, {**values, "data": [inputs], "ratio": 0.2})
    assert failure.value.code == "bad-data"
