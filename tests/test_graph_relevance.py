"""Relevance: conserved, in proportion to contributions by hand, and what it prunes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from graph_nets import net
from secateur import SecateurError
from secateur.evidence.batches import Example
from secateur.evidence.relevance import relevance
from secateur.graph.modules import ModuleHost


def found(module: nn.Module, x: Tensor, labels: Tensor, rule: Any) -> dict[str, Tensor]:
    return relevance(ModuleHost(module, x), [Example(x, labels)], rule)


class Layers(nn.Module):
    """Convolutions with norms, all kinds of pooling, a shortcut, no biases that would take anything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.inner, self.outer = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 1, bias=False)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.pool(x + self.outer(self.inner(x).relu()).relu())
        return self.head(nn.functional.avg_pool2d(x.relu(), 2).mean((2, 3)))


@pytest.mark.parametrize("rule", ["alpha1beta0", "epsilon"])
def test_relevance_is_conserved(rule: str) -> None:
    torch.manual_seed(0)
    module, x, labels = Layers().double().eval(), torch.rand(5, 3, 8, 8).double(), torch.randint(4, (5,))
    got = found(module, x, labels, rule)
    total = float(module(x)[torch.arange(5), labels].sum().detach())
    assert float(got["head.weight"].sum()) == pytest.approx(total)
    assert float(got["stem.weight"].sum()) == pytest.approx(total, rel=1e-4)
    assert float(got["inner.weight"].sum()) == pytest.approx(float(got["outer.weight"].sum()), rel=1e-4)


@pytest.mark.parametrize("rule", ["alpha1beta0", "epsilon"])
def test_relevance_by_hand(rule: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), torch.randn(1, 4).double()
    hidden = module[1](module[0](x))[0]
    weight = module[2].weight[1]
    logit = module(x)[0, 1]
    shares = hidden * weight
    if rule == "alpha1beta0":
        shares = shares.clamp(min=0)
    wanted = shares / shares.sum() * logit
    assert torch.allclose(found(module, x, torch.tensor([1]), rule)["0.weight"], wanted.detach(), atol=1e-6)


def test_norms_are_part_of_the_layer_before() -> None:
    """Folding a batch norm into its convolution changes nothing."""
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    norm: Any = normed[1]
    norm.running_mean.normal_()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    folded = nn.Sequential(nn.utils.fuse_conv_bn_eval(normed[0], norm), *normed[2:])  # type: ignore[arg-type]
    x, labels = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 2])
    one, other = (found(m, x, labels, "alpha1beta0")["0.weight"] for m in (normed, folded))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["residual", "concatenated", "grouped", "transformer", "gated"])
def test_networks_of_all_kinds(name: str) -> None:
    module, inputs = net(name)
    if module(inputs).ndim > 2:
        module = nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    data = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
    values = {"ratio": 0.2, "tolerance": 0.2, "options": {"steps": 2}}
    results = [
        secateur.prune(module, method="lrp_pruning", data=data, example_inputs=inputs, **values)
        for _ in "ab"  # type: ignore[arg-type]
    ]
    assert results[0].removed == results[1].removed  # type: ignore[attr-defined]
    assert results[0].model(inputs).shape == module(inputs).shape  # type: ignore[misc]


def test_units_that_serve_another_class_go_first() -> None:
    """Two paths, one for each class; with samples of one class the other path goes."""
    module = nn.Sequential(nn.Linear(2, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 0]] * 3 + [[0, 1.0]] * 3))  # type: ignore[operator]
        module[2].weight.copy_(torch.tensor([[1.0] * 3 + [0] * 3, [0] * 3 + [1.0] * 3]))  # type: ignore[operator]
    data = [(torch.rand(8, 2) + 0.5, torch.zeros(8, dtype=torch.long))]
    result = secateur.prune(
        module, method="lrp_pruning", ratio=0.5, data=data, example_inputs=torch.randn(1, 2), options={"steps": 3}
    )
    assert result.removed == {"0": [3, 4, 5]}  # type: ignore[attr-defined]


def test_outputs_that_are_no_classes_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(SecateurError, match="class"):
        secateur.prune(module, method="lrp_pruning", ratio=0.3, data=[(x, torch.zeros(2).long())], example_inputs=x)
