"""LAMP and global magnitudes of coupled channels: the rules of their pages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.api.channels import graph, prune_module
from secateur.graph.modules import ModuleHost
from secateur.methods.channels import ChannelStudy
from secateur.methods.coupled import GlobalMpOfChannels, LampOfChannels
from secateur.methods.registry import make_graph_method, make_method, method_class, module_methods


def chain() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).eval(), torch.randn(2, 4)


def study(module: nn.Module, inputs: torch.Tensor) -> ChannelStudy:
    found = graph(module, inputs)
    return ChannelStudy(found, found.spaces, ModuleHost(module, inputs), torch.Generator(), inputs)


def test_one_name_means_one_rule_for_weights_and_for_channels() -> None:
    assert {"lamp", "global_mp"} <= set(module_methods())
    assert isinstance(make_graph_method("lamp", {}), LampOfChannels)
    assert isinstance(make_graph_method("global_mp", {}), GlobalMpOfChannels)
    for name in ("lamp", "global_mp"):
        assert make_method(name, {}).title == make_graph_method(name, {}).title
        assert method_class(name).group != "graph"


def test_the_largest_channel_of_every_space_has_the_score_one() -> None:
    """And the others the share of theirs in what is not smaller, in the order of their squared weights."""
    module, inputs = chain()
    for name, scores in LampOfChannels().score(study(module, inputs)).items():
        space = graph(module, inputs).space(name)
        squares = torch.zeros(space.size, dtype=torch.float64)
        entries = [entry for entry in space.entries if entry.parameter]
        for entry in entries:
            value = dict(module.named_parameters())[entry.name].detach().double().square()
            squares += (
                value.movedim(entry.dim, 0).flatten(1).sum(1) / len(entries) if value.ndim > 1 else value / len(entries)
            )
        wanted = [float(x / squares[squares >= x].sum()) for x in squares]
        assert scores.tolist() == pytest.approx(wanted, rel=1e-5)
        assert float(scores.max()) == pytest.approx(1, rel=1e-12)


def test_scaling_a_space_changes_no_score_of_lamp() -> None:
    module, inputs = chain()
    before = LampOfChannels().score(study(module, inputs))["0"]
    with torch.no_grad():
        for tensor in (module[0].weight, module[0].bias, module[2].weight):
            tensor.mul_(100)  # type: ignore[operator]
    assert torch.allclose(before, LampOfChannels().score(study(module, inputs))["0"], rtol=1e-6)


def test_a_space_of_small_weights_keeps_its_minimum() -> None:
    """Without one it falls to a single channel; with it as many channels stay as hold that share of all parameters."""
    module, inputs = chain()
    with torch.no_grad():
        for tensor in (module[0].weight, module[0].bias, module[2].weight):
            tensor.mul_(1e-3)  # type: ignore[operator]
    values = {"method": "global_mp", "ratio": 0.5, "tolerance": 0.05}
    options = {"floor": 0.001}
    left = {}
    for minimum in (0.0, 20.0):
        result = prune_module(module, inputs, {**values, "options": {**options, "minimum": minimum}})
        left[minimum] = 16 - len(result.removed["0"])
    assert left[0.0] <= 2
    assert left[20.0] == 6  # 29 of the 827 parameters lie in each


def test_impossible_minima_are_refused() -> None:
    module, inputs = chain()
    with pytest.raises(SecateurError) as failure:
        secateur.prune(
            module, method="global_mp", ratio=0.8, example_inputs=inputs, options={"minimum": 40.0}, tolerance=0.2
        )
    assert failure.value.code == "target-out-of-reach"
