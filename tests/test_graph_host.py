"""The host of a module: values watched during a run, tensors replaced, cuts made elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graph_nets import NETS, net
from secateur import SecateurError
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import build


@pytest.mark.parametrize("name", NETS)
def test_every_value_can_be_watched(name: str) -> None:
    """A replay gives what the operators make, in their order, and the outputs of the module."""
    module, inputs = net(name)
    host = ModuleHost(module, inputs)
    network = host.network
    everything = [value for step in network.operations for value in (*step.inputs.values(), *step.outputs)]
    outputs, found = host.run(inputs, everything)
    assert [tensor.shape for tensor in outputs] == [value.shape for value in network.outputs]
    assert {value: tuple(tensor.shape) for value, tensor in found.items()} == {v: v.shape for v in found}
    made = {value for step in network.operations for value in step.outputs}
    assert made <= set(found)
    with torch.no_grad():
        assert torch.allclose(outputs[0], module(inputs), atol=1e-6)
    assert torch.equal(found[network.outputs[0]], outputs[0])


def test_watched_values_are_those_of_the_layers() -> None:
    """Not changed by what the module does in place afterwards, on batches of another size, and normal tensors."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1)).eval()
    host, other = ModuleHost(module, torch.randn(1, 3, 4, 4)), torch.randn(5, 3, 6, 6)
    first = next(step.outputs[0] for step in host.network.operations if step.place == "0")
    outputs, found = host.run(other, [first, host.network.inputs[0], host.network.state["0.bias"]])
    with torch.no_grad():
        assert torch.equal(found[first], module[0](other))
        assert torch.equal(outputs[0], module(other))
    assert torch.equal(found[host.network.inputs[0]], other)
    assert not outputs[0].is_inference()
    assert not found[first].is_inference()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x.sigmoid() + 1


def test_another_path_is_refused() -> None:
    host = ModuleHost(Branching(), torch.ones(3))
    with pytest.raises(SecateurError, match="another path") as failure:
        host.run(-torch.ones(3), [host.network.operations[-1].outputs[0]])
    assert failure.value.exit_code == 2


@pytest.mark.parametrize("name", ["tied", "recurrent", "residual"])
def test_tensors_can_be_replaced(name: str) -> None:
    """The host it came from stays, shared tensors are replaced once, and a cut of it has the new numbers."""
    module, inputs = net(name)
    host = ModuleHost(module, inputs)
    before, after = host.run(inputs)[0][0], {n: host.tensor(n).detach() * 1.5 for n in host.network.state}
    other = host.with_tensors({n: t for n, t in after.items() if t.is_floating_point()})
    assert other.network is host.network
    assert not torch.equal(other.run(inputs)[0][0], before)
    assert torch.equal(host.run(inputs)[0][0], before)
    for first, names in host.network.aliases.items():
        assert all(other.tensor(alias) is other.tensor(first) for alias in names)
    graph = build(other.network)
    space = graph.spaces[0]
    small = ModuleHost(other.cut(graph, graph.gone({space.name: [0]})), inputs)
    entry = space.entries[0]
    stays = [i for i in range(other.tensor(entry.name).shape[entry.dim]) if i not in entry.index[0]]
    if len({e.dim for e in space.entries if e.name == entry.name}) == 1:
        assert torch.equal(
            small.tensor(entry.name), other.tensor(entry.name).index_select(entry.dim, torch.tensor(stays))
        )
    assert other.tensor(entry.name).shape == host.tensor(entry.name).shape
