"""UDFC's closed forms against brute force, planted combinations, few bits; biases that absorb what goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from graph_nets import net
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import Graph, build
from secateur.mends.absorbing import absorbed
from secateur.mends.folding import Folding, combination, quantised, rescaling


def minimised(loss: Any, start: Tensor) -> Tensor:
    """By brute optimisation."""
    found = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([found], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)

    def step() -> Tensor:
        optimiser.zero_grad()
        value = loss(found)
        value.backward()
        return value

    for _ in range(5):
        optimiser.step(step)
    return found.detach()


def test_combination_is_the_minimum() -> None:
    torch.manual_seed(0)
    folded, shifts = torch.randn(6, 9).double(), torch.randn(6, 2).double()
    stays, gone = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    found = combination(folded @ folded.t(), shifts, stays, gone, 0.3, 0.2)
    for number, unit in enumerate(gone):

        def loss(s: Tensor, unit: Tensor = unit) -> Tensor:
            filters = (folded[unit] - s @ folded[stays]).square().sum()
            return filters + 0.3 * (shifts[unit] - s @ shifts[stays]).square().sum() + 0.2 * s.square().sum()

        assert torch.allclose(found[:, number], minimised(loss, torch.zeros(4).double()), atol=1e-6)


def test_rescaling_is_the_minimum() -> None:
    torch.manual_seed(0)
    folded, shift = torch.randn(1, 9).double(), torch.randn(1).double()
    rounded = quantised(folded, 3, float(folded.abs().max()))

    def loss(s: Tensor) -> Tensor:
        return (folded - s * rounded).square().sum() + 0.4 * (shift - s * shift).square().sum()

    assert torch.allclose(rescaling(folded, rounded, shift, 0.4), minimised(loss, torch.ones(1).double()), atol=1e-6)


def test_quantised_values_are_few_and_near() -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).double()
    found = quantised(weight, 4, float(weight.abs().max()))
    assert len(found.unique()) <= 15
    assert float((found - weight).abs().max()) <= float(weight.abs().max()) / 7 / 2 + 1e-12


def planted(kind: str) -> tuple[nn.Module, Tensor, Graph, ModuleHost]:
    """Two channels that are combinations of the others, in front of readers without a bend between."""
    torch.manual_seed(0)
    normed, deep = kind == "normed", kind == "deep"
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, bias=not normed)]
    layers += [nn.BatchNorm2d(6)] if normed else [nn.Conv2d(6, 6, 3, groups=6, bias=False)] if deep else []
    layers += [nn.Flatten(), nn.Linear(6 * (16 if deep else 36), 5)] if kind == "flat" else [nn.Conv2d(6, 4, 3)]
    module = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        mix = torch.randn(2, 4).double()
        first: Any = module[0]
        if normed:
            norm: Any = module[1]
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            for row, unit in zip(mix, (4, 5), strict=True):
                first.weight[unit] = torch.tensordot(row * scale[:4], first.weight[:4], 1) / scale[unit]
                wanted = row @ (norm.bias - norm.running_mean * scale)[:4]
                norm.bias[unit] = wanted + norm.running_mean[unit] * scale[unit]
        else:
            for tensor in (first.weight, first.bias):
                tensor[4:] = torch.tensordot(mix, tensor[:4], 1)
        if deep:
            module[1].weight.copy_(module[1].weight[:1].expand(6, 1, 3, 3))  # type: ignore[operator,index]
    inputs = torch.randn(4, 3, 10 if deep else 8, 10 if deep else 8).double()
    host = ModuleHost(module, inputs)
    return module, inputs, build(host.network), host


@pytest.mark.parametrize("kind", ["plain", "normed", "flat", "deep"])
def test_planted_combinations_are_restored(kind: str) -> None:
    module, inputs, graph, host = planted(kind)
    space = next(s for s in graph.spaces if s.size == 6)
    units = {space.name: [4, 5]}
    tensors = Folding(host, graph, units, alpha2=1e-12).restore()
    small = host.with_tensors(tensors).cut(graph, graph.gone(units))
    assert torch.allclose(small(inputs), module(inputs), atol=1e-6)
    plain = host.cut(graph, graph.gone(units))
    assert float((plain(inputs) - module(inputs)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["residual", "grouped", "concatenated", "transformer", "unet", "gqa"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_udfc_on_networks(name: str, bits: int | None) -> None:
    module, inputs = net(name)
    options = {} if bits is None else {"bits": bits}
    values = {"ratio": 0.3, "tolerance": 0.2, "options": options}
    result, again = (secateur.prune(module, method="udfc", example_inputs=inputs, **values) for _ in "ab")  # type: ignore[arg-type]
    made: Any = result.model
    assert made(inputs).shape == module(inputs).shape
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.model.parameters(), strict=True))  # type: ignore[union-attr]


def test_weights_behind_norms_lie_on_a_grid_of_few_values() -> None:
    module, inputs = net("residual")
    options = {"bits": 3}
    values = {"ratio": 0.2, "tolerance": 0.2, "options": options}
    made: Any = secateur.prune(module, method="udfc", example_inputs=inputs, **values).model  # type: ignore[arg-type]
    for layer in (made.stem, made.inner):
        assert len(layer.weight.unique()) <= 7


def test_more_bits_are_nearer() -> None:
    module, inputs = net("residual")
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()  # type: ignore[union-attr]
    wanted = module(inputs)
    lost = []
    for bits in (3, 5, 8, 12):
        host = ModuleHost(module, inputs)
        tensors = Folding(host, build(host.network), {}, bits=bits).restore()
        lost.append(float((host.with_tensors(tensors).run(inputs)[0][0] - wanted).detach().abs().max()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-2


class Shifted(nn.Module):
    """A norm whose scale is zero for some channels, behind a bend, in front of readers of all kinds."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 4, 3, padding=padding, bias=False), nn.BatchNorm2d(4)
        self.third, self.grouped = nn.Conv2d(6, 4, 3, padding=padding), nn.Conv2d(6, 4, 3, padding=padding, groups=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.first(x)))
        x = torch.cat([self.second_norm(self.second(x)), self.third(x), self.grouped(x)], 1)
        return self.head(x.relu().mean((2, 3)))


def test_biases_absorb_channels_without_scale() -> None:
    """Exact without padding, for any bend, by biases and by the means of norms; plain cuts are far off."""
    torch.manual_seed(0)
    module = Shifted(0).eval()
    nn.init.normal_(module.norm.bias)
    with torch.no_grad():
        module.norm.weight[[1, 4]] = 0
    inputs = torch.randn(2, 3, 9, 9)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    space = next(s for s in graph.spaces if s.name.startswith("first"))
    units = {space.name: [1]} if space.size == 3 else {space.name: [1, 4]}
    gone = graph.gone(units)
    before = module(inputs)
    after = host.with_tensors(absorbed(host, graph, gone, None, inputs)).cut(graph, gone)(inputs)
    assert float((after - before).detach().abs().max()) < 1e-5
    assert float((host.cut(graph, gone)(inputs) - before).detach().abs().max()) > 1e-3


def test_biases_absorb_means_with_data() -> None:
    """The outputs of what reads have the means that they had."""
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(50, 5)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    gone = graph.gone({"0": [0, 3, 4]})
    batches = [inputs[:25], inputs[25:]]
    small = host.with_tensors(absorbed(host, graph, gone, batches, inputs)).cut(graph, gone)
    assert torch.allclose(small(inputs).mean(0), module(inputs).mean(0), atol=1e-6)


@pytest.mark.parametrize("mending", ["absorb", "recalibrate", "least-squares", "fold"])
def test_mends_of_any_method(mending: str) -> None:
    module, inputs = net("residual")
    torch.manual_seed(0)
    data = [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)]
    values = {"ratio": 0.3, "tolerance": 0.1, "data": data, "options": {"mending": mending}}
    mended = secateur.prune(module, method="spa", example_inputs=inputs, **values)  # type: ignore[arg-type]
    values["options"] = {}
    plain = secateur.prune(module, method="spa", example_inputs=inputs, **values)  # type: ignore[arg-type]
    assert mended.removed == plain.removed  # type: ignore[attr-defined]
    assert not torch.equal(mended.model(inputs), plain.model(inputs))  # type: ignore[misc]
