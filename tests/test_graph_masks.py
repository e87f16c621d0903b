"""MaskSparsity: votes and levels, and the penalty that touches what it is told to and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from graph_nets import net
from secateur import SecateurError
from secateur.api.channels import graph, prune_module
from secateur.budgets.nested import between
from secateur.methods.masksparsity import voted
from secateur.training.penalty import MaskedPenalty


class Meeting(nn.Module):
    """Two norms whose outputs are added, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.norm2 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.outer, self.norm3 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (x + self.norm3(self.outer(self.norm2(self.inner(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def meeting() -> tuple[Meeting, Tensor]:
    torch.manual_seed(0)
    module = Meeting().eval()
    with torch.no_grad():
        module.norm1.weight.copy_(torch.tensor([0.001, 0.5, 0.002, 0.9, 0.003, 0.8]))
        module.norm2.weight.copy_(torch.tensor([1, 0.004, 0.6, -0.001, 0.7, 0.8, 0.9, -0.9]))
        module.norm3.weight.copy_(torch.tensor([-0.001, 0.5, 0.7, 0.002, 0.6, 0.8]))
        for norm in (module.norm1, module.norm2, module.norm3):
            norm.bias.normal_()
    return module, torch.randn(5, 3, 4, 4)


def test_votes_are_as_conservative_as_the_most_lenient_member_allows() -> None:
    yes, no = True, False
    assert voted(torch.tensor([[yes, no, yes], [yes, no, no]])) == [
        0
    ]  # both, and that is as many as the second asks for
    assert voted(torch.tensor([[yes, yes, no, no], [no, no, yes, yes]])) == [
        0,
        1,
        2,
    ]  # one is enough; one channel stays
    assert voted(torch.tensor([[no, no], [yes, yes]])) == []  # the first asks for none
    assert voted(torch.tensor([[no, yes, no]])) == [1]


def test_levels_of_the_paper_name_the_channels() -> None:
    module, inputs = meeting()
    wanted, found = {"first": [0, 2, 3, 4], "inner": [1, 3]}, graph(module, inputs)
    left = found.costs.params(found.gone(wanted))
    values = {"method": "masksparsity", "target": [f"params={left}"], "options": {"level": 0.01}}
    result = prune_module(module, inputs, values)
    assert result.removed == wanted
    assert result.notes["level"] == 0.01
    with pytest.raises(SecateurError, match="this mask leaves"):
        prune_module(module, inputs, {**values, "target": ["params=10%"]})


@pytest.mark.parametrize("mask", ["threshold", "energy"])
def test_targets_are_met(mask: str) -> None:
    module, inputs = net("residual")
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.01, 1)
    values = {"method": "masksparsity", "ratio": 0.4, "tolerance": 0.1, "options": {"mask": mask, "floor": 0.1}}
    result = prune_module(module, inputs, values)
    assert abs(result.achieved["params"] / result.achieved["params_before"] - 0.6) <= 0.1
    assert result.notes["level"] > 0


def test_networks_without_norms_are_refused() -> None:
    module, inputs = net("grouped")
    with pytest.raises(SecateurError) as failure:
        secateur.prune(module, method="masksparsity", ratio=0.2, example_inputs=inputs)
    assert failure.value.code == "no-norms"


def test_two_sets_as_one_order() -> None:
    module, inputs = meeting()
    spaces = [graph(module, inputs).space(name) for name in ("first", "inner")]
    order = {space.name: torch.arange(space.size, dtype=torch.float64).flip(0) - 3 for space in spaces}
    found = between(spaces, {"first": [0], "inner": [7]}, {"first": [0, 5]}, order)
    ranked = sorted((float(value), name, i) for name, each in found.items() for i, value in enumerate(each))
    assert [(name, i) for _, name, i in ranked[:2]] == [("first", 0), ("first", 5)]


def trained(penalised: bool, kind: str = "l1") -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A few steps on one batch, and the gradients of every step before the optimiser saw them."""
    module, inputs = meeting()
    found = graph(module, inputs)
    module.train()
    penalty = MaskedPenalty.of_norms(module, found, {"inner": [0, 4], "first": [5]}, 0.5, kind)
    optimizer = torch.optim.SGD(penalty.groups(module, 1e-3), lr=0.05)
    labels, seen = torch.tensor([0, 1, 2, 3, 0]), []
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(module(inputs), labels).backward()
        before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
        if penalised:
            penalty.add(0.05)
        after = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
        seen.append({name: (after[name] != before[name]) for name in before})
        optimizer.step()
    return module.eval(), seen


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth-l1"])
def test_only_masked_scales_get_gradients(kind: str) -> None:
    module, changed = trained(True, kind)
    masked = {"norm2.weight": [0, 4], "norm1.weight": [5], "norm3.weight": [5]}
    for step in changed:
        for name, where in step.items():
            assert set(torch.nonzero(where)[:, 0].tolist()) <= set(masked.get(name, ())), name
    plain = dict(trained(False)[0].named_parameters())
    for name, chosen in masked.items():
        scales = dict(module.named_parameters())[name].abs()
        assert (scales[chosen] < plain[name].abs()[chosen]).all()


def test_other_gradients_keep_their_bits() -> None:
    module, inputs = meeting()
    penalty = MaskedPenalty.of_norms(module, graph(module, inputs), {"inner": [2]}, 0.1)
    functional.cross_entropy(module(inputs), torch.tensor([0, 1, 2, 3, 0])).backward()
    module.norm2.weight.grad[0] = -0.0
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
    penalty.add()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        left, right = (each.clone().view(torch.int32) for each in (before[name], parameter.grad))
        differs = torch.nonzero((left != right).flatten()).flatten().tolist()
        assert differs == ([2] if name == "norm2.weight" else [])


def test_smooth_l1_ends_at_nought() -> None:
    module, _ = trained(True, "smooth-l1")
    assert isinstance(module, Meeting)
    assert float(module.norm2.weight.detach()[[0, 4]].abs().max()) < 0.05


def test_masks_must_fit() -> None:
    module, _ = meeting()
    parameters = dict(module.named_parameters())
    with pytest.raises(ValueError, match="fits no parameter"):
        MaskedPenalty(parameters, {"norm1.weight": torch.ones(3, dtype=torch.bool)})
    penalty = MaskedPenalty(parameters, {"norm1.weight": torch.ones(6, dtype=torch.bool)}, kind="smooth-l1")
    module.norm1.weight.grad = torch.zeros(6)
    with pytest.raises(ValueError, match="learning rate"):
        penalty.add()
