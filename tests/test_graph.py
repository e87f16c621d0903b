"""The graph of coupled channels: every rule against brute force, cuts against masks, the door for modules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from graph_nets import NETS, Literal, Sliced, Transformer, net
from secateur import SecateurError
from secateur.api.channels import prune_module
from secateur.graph.exported import from_program
from secateur.graph.modules import ModuleBench, ModuleHost
from secateur.graph.spaces import ChannelSpace, Graph, build
from secateur.graph.state import tensor_at
from secateur.graph.tape import record
from secateur.graph.verify import relative_difference, verify

UNSOUND = {
    "shuffled": {"first+4"},  # groups of a channel shuffle, whose number stands in the code
    "unet": {"deep+8", "deep+8#2"},  # nothing would be left
    "transformer": {"qkv+12"},  # the default scale of attention counts the dimensions of a head
    "literal": {"qkv+12", "qkv+9"},
    "gqa": {"q+8", "v+2"},  # one number in the code is the size of queries, keys and values
    "sliced": {"first", "first#2"},
    "strange": {"third"},
}
"""Spaces that must be refused; all others must be cut right."""


def found_in(module: nn.Module, inputs: Tensor) -> Graph:
    return build(record(module, inputs))


def unit(graph: Graph, space: ChannelSpace, number: int) -> np.ndarray:
    return graph.gone({space.name: [number]})


@pytest.mark.parametrize("name", NETS)
def test_every_space_is_cut_right_or_refused(name: str) -> None:
    """All units, one by one: the cut network computes what the silenced one does, in float64."""
    module, inputs = net(name)
    graph = found_in(module, inputs)
    bench = ModuleBench(module, graph, inputs)
    verdict = verify(bench)
    assert set(verdict.refused) == UNSOUND.get(name, set())
    assert set(verdict.sound) == {space.name for space in graph.spaces} - set(verdict.refused)
    for space in map(graph.space, verdict.sound):
        for number in range(space.size):
            assert bench.compare(unit(graph, space, number), verdict.literals)[0] == "", (space.name, number)


def dead(bench: ModuleBench, keys: set[tuple[str, int]], inputs: Tensor) -> set[tuple[str, int, int]]:
    """Brute force: slices of a silenced network that can be changed at will without changing what it computes."""
    found = set()
    before = bench.copy(inputs)
    for name, dim in sorted(keys):
        tensor = tensor_at(bench.copy, name)
        for index in range(tensor.shape[dim]):
            part = tensor.select(dim, index)
            kept = part.clone()
            part.copy_(torch.randn(part.shape, dtype=part.dtype, generator=torch.Generator().manual_seed(index)) * 3)
            if relative_difference(before, bench.copy(inputs)) < 1e-12:
                found.add((name, dim, index))
            part.copy_(kept)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(set(NETS) - {"strange", "sliced"}))
def test_coupled_readers_are_exactly_those_that_brute_force_finds(name: str) -> None:
    """With the makers of a unit silenced, the readers that no longer matter are those that the graph names."""
    module, inputs = net(name)
    graph = found_in(module, inputs)
    bench = ModuleBench(module, graph, inputs)
    verdict = verify(bench)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    reads = {(e.name, e.dim) for s in graph.spaces for e in s.entries if e.roles == {"consumer"}}
    always = dead(bench, reads, inputs)  # behind a ReLU that is never open on these inputs
    for space in map(graph.space, verdict.sound):
        backup = {entry.name: tensor_at(bench.copy, entry.name).clone() for entry in space.entries}
        for entry in space.entries:
            if entry.roles != {"consumer"}:
                tensor_at(bench.copy, entry.name).index_fill_(entry.dim, torch.from_numpy(entry.index[0]), 0)
        claimed = {(e.name, e.dim, int(i)) for e in space.entries if (e.name, e.dim) in reads for i in e.index[0]}
        silent = dead(bench, reads, inputs)
        for tensor_name, value in backup.items():
            tensor_at(bench.copy, tensor_name).copy_(value)
        own = {(n, d) for n, d, _ in claimed}
        assert claimed <= silent, space.name
        assert {key for key in silent - always if key[:2] in own} == claimed - always, space.name


@pytest.mark.parametrize("name", NETS)
def test_costs_are_those_of_the_cut_module(name: str) -> None:
    """Parameters to the last one, shared ones once."""
    module, inputs = net(name)
    graph = found_in(module, inputs)
    verdict = verify(ModuleBench(module, graph, inputs))
    spaces = [graph.space(each) for each in verdict.sound if graph.space(each).size > 2]
    before = sum(p.numel() for p in module.parameters())
    assert graph.parameters() == before
    share = 1 - graph.costs.params(graph.gone({space.name: [0] for space in spaces})) / before
    options = {"statistics": "change", "score_by": "random", "ranking": "local", "floor": 0.01}
    result = prune_module(module, inputs, {"ratio": share / 2, "tolerance": 1.0, "options": options})
    assert result.model is not None
    assert sum(p.numel() for p in result.model.parameters()) == result.achieved["params"]
    after = found_in(result.model, inputs)
    assert after.parameters() == result.achieved["params"]
    assert 2 * after.costs.macs(after.gone({})) == result.achieved["flops"]


def test_multiplications_of_known_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    graph = found_in(model, torch.randn(1, 3, 8, 8))
    assert graph.costs.macs(graph.gone({})) == 8 * 64 * 3 * 9 + 8 * 36 * 9 + 8 * 36 * 5


@pytest.mark.parametrize("name", sorted(set(NETS) - {"recurrent"}))
def test_exported_program_gives_the_same_graph(name: str) -> None:
    """``torch.export`` is the other way in; a recurrent layer is unrolled there."""
    module, inputs = net(name)
    program = torch.export.export(module, (inputs,), strict=False)

    def told(graph: Graph) -> list[object]:
        parts = [[(e.name, e.dim, e.index.tolist()) for e in s.entries if e.parameter] for s in graph.spaces]
        return [(s.name, s.size, s.flags, part) for s, part in zip(graph.spaces, parts, strict=True)]

    one, other = found_in(module, inputs), build(from_program(program))
    assert told(one) == told(other)
    assert one.costs.macs(one.gone({})) == other.costs.macs(other.gone({}))


def test_graph_is_the_same_every_time() -> None:
    names = [[(s.name, s.size) for s in secateur.graph(*net("transformer")).spaces] for _ in range(2)]
    assert names[0] == names[1]


def test_unknown_operators_are_named_and_freeze_what_they_touch() -> None:
    graph = secateur.graph(*net("strange"))
    assert "special_bessel_j0" not in graph.unknown  # elementwise, as its tag says
    module = nn.Sequential(nn.Linear(3, 6), _Odd(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = secateur.graph(module, torch.randn(5, 3))
    assert dict(graph.unknown) == {"cdist_forward": ("1",)} or dict(graph.unknown) == {"cdist": ("1",)}
    assert [space.name for space in graph.spaces] == ["2"]


class _Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cdist(x, x).sum()


def test_module_stays_as_it_was() -> None:
    """Weights, attributes and mode; the result is a module of its own."""
    module, inputs = net("transformer")
    module.train()
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    attributes = {name: dict(vars(part)) for name, part in module.named_modules()}
    result = secateur.prune(module, method="spa", ratio=0.3, example_inputs=inputs)
    assert result.model is not module
    assert module.training
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())
    assert {name: vars(part) for name, part in module.named_modules()} == attributes
    assert result.model(inputs).shape == module(inputs).shape  # type: ignore[misc]
    assert abs(result.achieved["params"] / result.achieved["params_before"] - 0.7) < 0.02


def test_in_place() -> None:
    module, inputs = net("residual")
    result = secateur.prune(module, ratio=0.4, example_inputs=inputs, inplace=True, tolerance=0.1)
    assert result.model is module
    assert module.stem.out_channels == module.stem.weight.shape[0] == module.norm.num_features < 6  # type: ignore[index,union-attr]


def test_attributes_follow() -> None:
    """What a layer says of itself is true after a cut."""
    for name in NETS:
        module, inputs = net(name)
        result = prune_module(module, inputs, {"ratio": 0.2, "tolerance": 1.0})
        for part in result.model.modules():  # type: ignore[union-attr]
            if isinstance(part, nn.Linear):
                assert (part.out_features, part.in_features) == tuple(part.weight.shape)
            if isinstance(part, nn.Conv2d):
                assert part.out_channels == part.weight.shape[0]
                assert part.in_channels == part.weight.shape[1] * part.groups
            if isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
                assert part.weight.shape == part.bias.shape
            if isinstance(part, nn.LSTM):
                assert part.hidden_size == part.weight_hh_l0.shape[1]


def test_shared_weights_stay_shared() -> None:
    module, inputs = net("tied")
    result = prune_module(module, inputs, {"ratio": 0.3, "tolerance": 0.1})
    assert result.model.embed.weight is result.model.head.weight  # type: ignore[union-attr]


def test_statistics_change_only_where_allowed() -> None:
    module, inputs = net("transformer")
    kept = prune_module(module, inputs, {"ratio": 0.2, "tolerance": 0.1})
    cut = prune_module(module, inputs, {"ratio": 0.4, "tolerance": 0.1, "options": {"statistics": "change"}})
    assert "patch" not in kept.removed
    assert "layer_norm (after)" in kept.refused["patch"]
    assert "patch" in cut.removed


def test_written_norms_are_norms() -> None:
    """Cut only with ``statistics=change``, and then what a norm of the smaller size computes."""
    module, inputs = net("rms")
    kept = prune_module(module, inputs, {"ratio": 0.1, "tolerance": 0.2})
    assert secateur.graph(module, inputs).space("enter").flags == (
        "layer_norm (norms.2)",
        "rms_norm (norms.0)",
        "rms_norm (norms.1)",
    )
    assert "rms_norm (norms.3)" in kept.refused["mix"]
    assert set(kept.removed) == {"up"}
    result = prune_module(module, inputs, {"ratio": 0.4, "tolerance": 0.1, "options": {"statistics": "change"}})
    assert not result.refused
    assert {"enter", "mix"} & set(result.removed)


class Centred(nn.Module):
    """Means that are no root mean squares: over what is not squared, scaling something else, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 6) for _ in range(3))
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.first(x), self.second(x), self.third(x)
        scale = torch.rsqrt(third.pow(2).mean(-1, keepdim=True) + 1)
        parts = [first * torch.rsqrt(first.abs().mean(-1, keepdim=True) + 1), second * scale, third + scale]
        return self.head(torch.cat(parts, -1))


def test_other_means_are_none() -> None:
    torch.manual_seed(0)
    found = secateur.graph(Centred().eval(), torch.randn(2, 3))
    assert not any(flag.startswith("rms_norm") for space in found.spaces for flag in space.flags)
    verdict = verify(ModuleHost(Centred().eval(), torch.randn(2, 3)).bench(found))
    assert set(verdict.refused) == {"first", "third"}


def test_literals_in_the_code_are_refused_with_the_reason() -> None:
    for kind, space in ((Literal, "qkv+9"), (Sliced, "first")):
        torch.manual_seed(0)
        module = kind()
        refused = prune_module(module, torch.randn(2, 3, 8, 8), {"ratio": 0.1, "tolerance": 0.2}).refused
        assert "the cut module does not run" in refused[space] or "the outputs differ" in refused[space]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"ratio": 0.97}, "target-out-of-reach"),
        ({}, "no-target"),
        ({"ratio": 0.2, "target": ["flops=50%"]}, "no-target"),
        ({"target": ["kv_bytes=50%"]}, "bad-target"),
        ({"ratio": 0.2, "method": "prunenet"}, "method-on-checkpoints"),
        ({"ratio": 0.2, "options": {"score": "l3"}}, "unknown-option"),
        ({"ratio": 0.2, "layout": "native"}, "unknown-option"),
    ],
)
def test_refusals(values: Mapping[str, object], code: str) -> None:
    module, inputs = net("residual")
    with pytest.raises(SecateurError) as failure:
        secateur.prune(module, example_inputs=inputs, **values)  # type: ignore[arg-type]
    assert (failure.value.code, failure.value.exit_code) == (code, 2)


def test_module_without_inputs_says_what_is_missing() -> None:
    with pytest.raises(SecateurError, match="example_inputs"):
        secateur.prune(Transformer(), method="spa", ratio=0.3)


@pytest.mark.parametrize("ranking", ["global", "isomorphic", "local"])
@pytest.mark.parametrize("measure", ["params", "flops"])
def test_targets_are_met(ranking: str, measure: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), *(nn.Sequential(nn.ReLU(), nn.Conv2d(64, 64, 3)) for _ in range(3))]
    module = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(64, 5, 1))
    values = {"target": [f"{measure}=40%"], "options": {"ranking": ranking, "quantum": 4, "floor": 0.1}}
    result = prune_module(module, torch.randn(1, 3, 12, 12), values)
    assert abs(result.achieved[measure] / result.achieved[f"{measure}_before"] - 0.4) < 0.02
    assert all((64 - len(units)) % 4 == 0 and len(units) <= 57 for units in result.removed.values())
    if ranking == "local":
        assert len({len(units) for units in result.removed.values()}) <= 2
