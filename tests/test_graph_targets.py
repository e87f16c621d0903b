"""Targets of networks: bytes and activation exact, latencies measured, all in the words of language models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur
from conftest import Checkpoints
from graph_nets import NETS, Deep, Layers, net
from secateur import SecateurError
from secateur.api.channels import ModuleResult, graph, prune_module
from secateur.budgets import blocks as left_out
from secateur.budgets import timed
from secateur.budgets.blocks import Amounts
from secateur.budgets.channels import Units, choose
from secateur.budgets.targets import parse_target
from secateur.budgets.timed import Timed
from secateur.graph.blocks import Depth
from secateur.graph.memory import lifetimes
from secateur.graph.modules import ModuleHost
from secateur.graph.tape import record

ANY = {"ratio": 0.3, "tolerance": 1.0, "options": {"statistics": "change", "score_by": "random"}}


def written(module: nn.Module) -> int:
    """Bytes of a module's state dict, shared tensors once."""
    tensors = {(t.data_ptr(), t.shape): t for t in module.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("name", NETS)
def test_bytes_are_those_of_the_state_dict(name: str) -> None:
    module, inputs = net(name)
    module.register_buffer("scratch", torch.zeros(50), persistent=False)
    found = graph(module, inputs)
    assert found.memory.saved(found.gone({})) == written(module)
    result = prune_module(module, inputs, ANY)
    assert result.model is not None
    assert result.achieved["bytes"] == written(result.model)
    assert result.achieved["bytes_before"] == written(module)


@pytest.mark.parametrize("name", NETS)
def test_activation_is_that_of_the_cut_module(name: str) -> None:
    module, inputs = net(name)
    result = prune_module(module, inputs, ANY)
    assert result.model is not None
    after = graph(result.model, inputs)
    assert after.memory.activation(after.gone({})) == result.achieved["activation"]
    assert result.achieved["activation"] <= result.achieved["activation_before"]


class Chain(nn.Module):
    """A wide tensor that is needed again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.back = nn.Linear(4, 20), nn.Linear(20, 3), nn.Linear(3, 20)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)  # 80 bytes beside 16 of the input
        narrow = self.narrow(wide)  # 12
        view = narrow.view(1, 3).relu_()  # none
        back = self.back(view)  # 80
        return (wide + back).sum(-1)  # 80, then 4


def test_activation_by_hand() -> None:
    """Views and in-place operators take nothing; a tensor lives until its last reader, views included."""
    module, inputs = Chain().eval(), torch.randn(1, 4)
    found = graph(module, inputs)
    assert found.memory.activation(found.gone({})) == 4 * (20 + 20 + 20)
    network = record(module, inputs)
    assert list(lifetimes(network).values()) == [(0, 1), (1, 6), (2, 5), (5, 6), (6, 7), (7, 8)]
    half = found.gone({"wide": list(range(10))})
    assert found.memory.activation(half) == 4 * (10 + 10 + 10)


def test_sizes_of_elements_count() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).half().eval()
    found = graph(module, torch.randn(1, 4).half())
    assert found.memory.saved(found.gone({})) == 2 * (24 + 6 + 12 + 2)
    assert found.memory.activation(found.gone({})) == 2 * (4 + 6)


def wide() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 32, 3),
        nn.Conv2d(32, 4, 1),
    ]
    return nn.Sequential(*layers).eval(), torch.randn(1, 3, 12, 12)


@pytest.mark.parametrize("ranking", ["global", "isomorphic", "local"])
@pytest.mark.parametrize("measure", ["bytes", "activation"])
def test_targets_are_met(measure: str, ranking: str) -> None:
    module, inputs = wide()
    values = {"target": [f"{measure}=55%"], "options": {"ranking": ranking, "quantum": 2}}
    result = prune_module(module, inputs, values)
    assert abs(result.achieved[measure] / result.achieved[f"{measure}_before"] - 0.55) < 0.02
    absolute = int(0.7 * result.achieved[f"{measure}_before"])
    again = prune_module(module, inputs, {"target": [f"{measure}={absolute}"]})
    assert abs(again.achieved[measure] - absolute) < 0.02 * result.achieved[f"{measure}_before"]


@pytest.mark.parametrize("quantum", [1, 4, 8])
@pytest.mark.parametrize("floor", [0.05, 0.5])
@pytest.mark.parametrize("ranking", ["global", "isomorphic", "local"])
def test_floor_and_quantum_hold_in_every_space(ranking: str, floor: float, quantum: int) -> None:
    module, inputs = wide()
    options = {"ranking": ranking, "floor": floor, "quantum": quantum}
    result = prune_module(module, inputs, {"target": ["bytes=40%"], "tolerance": 1.0, "options": options})
    sizes = {space.name: space.size for space in graph(module, inputs).spaces}
    for name, units in result.removed.items():
        left = sizes[name] - len(units)
        assert left % quantum == 0
        assert left >= floor * sizes[name]


def faked(
    monkeypatch: pytest.MonkeyPatch, latency: Callable[[int], float]
) -> Callable[[str, float], tuple[Units, Timed]]:
    """Choices on a module whose latency is a function of how many units go."""
    module, inputs = wide()
    found = graph(module, inputs)
    scores = {space.name: torch.arange(space.size) / space.size for space in found.spaces}
    monkeypatch.setattr(timed, "relative_latency", lambda _, small: latency(small()))

    def ask(target: str, way: float) -> tuple[Units, Timed]:
        pick = Timed(
            lambda scores, target, way: choose(found, scores, target, way=way),
            lambda units: lambda: sum(map(len, units.values())),
            0.02,
        )
        return pick(scores, parse_target(target), way), pick

    return ask


@pytest.mark.parametrize("asked", [0.9, 0.6, 0.4])
def test_latency_is_searched_among_few_candidates(monkeypatch: pytest.MonkeyPatch, asked: float) -> None:
    """Part of the time does not depend on the channels: the FLOPs must go down further than the latency."""
    ask = faked(monkeypatch, lambda gone: 0.3 + 0.7 * (1 - gone / 144) ** 2)
    units, pick = ask(f"latency={asked}x", 1.0)
    assert pick.latency is not None
    assert abs(pick.latency - asked) <= 0.05
    assert len(pick.measured) <= 8
    halfway, pick = ask(f"latency={asked}x", 0.5)
    assert pick.latency is not None
    assert abs(pick.latency - (1 + asked) / 2) <= 0.05
    assert sum(map(len, halfway.values())) < sum(map(len, units.values()))


def test_latency_that_cannot_be_reached_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = faked(monkeypatch, lambda gone: 0.7 + 0.3 * (1 - gone / 144))
    with pytest.raises(SecateurError, match="the nearest that was measured is") as failure:
        ask("latency=0.3x", 1.0)
    assert failure.value.code == "target-out-of-reach"


def test_latency_of_a_real_module_is_told() -> None:
    """Whatever this machine measures, it is told; accuracy of a clock is nothing for a test."""
    module, inputs = wide()
    result = prune_module(module, inputs, {"target": ["latency=70%"], "tolerance": 1.0})
    assert result.achieved["latency_before"] == 1
    assert 0 < result.achieved["latency"] < 1.5
    assert result.model is not None
    assert result.model(inputs).shape == module(inputs).shape


@pytest.mark.parametrize("target", ["kv_bytes=50%", "block_params=50%", "latency=3", "speed=2x", "bytes=0"])
def test_measures_that_networks_do_not_have(target: str) -> None:
    module, inputs = wide()
    with pytest.raises(SecateurError) as failure:
        secateur.prune(module, example_inputs=inputs, target=[target])
    assert (failure.value.code, failure.value.exit_code) == ("bad-target", 2)


def test_language_models_are_not_measured_in_activation(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="not measured in it") as failure:
        secateur.prune(checkpoint("llama"), output=tmp_path / "small", method="magnitude", target=["activation=50%"])
    assert failure.value.code == "bad-target"


def test_a_target_out_of_reach_says_what_is_in_the_way() -> None:
    module = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3), nn.LayerNorm(3)
    )
    with pytest.raises(SecateurError, match="operators without a rule: _weight_norm") as caught:
        secateur.prune(module, ratio=0.5, example_inputs=torch.randn(2, 6))
    assert caught.value.code == "target-out-of-reach"
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(SecateurError, match="1 of the spaces left alone because a statistic over it would change"):
        secateur.prune(module, ratio=0.5, example_inputs=torch.randn(2, 6))


def deep() -> tuple[nn.Module, Tensor]:
    """Blocks with batch norms; one holds a parameter that nobody reads and a buffer that is not saved."""
    torch.manual_seed(0)
    module = Deep().eval()
    module[1][1].register_parameter("spare", nn.Parameter(torch.zeros(7)))  # type: ignore[index,operator]
    module[2][1].register_buffer("scratch", torch.zeros(50), persistent=False)  # type: ignore[index,operator]
    return module, torch.randn(2, 3, 8, 8)


def layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Layers().eval(), torch.randn(2, 6, 5)


@pytest.mark.parametrize("make", [deep, layers])
def test_without_blocks_bytes_and_activation_are_those_of_the_module_that_remains(
    make: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    """Counters of batch norms included; each block alone, some, and all."""
    module, inputs = make()
    host = ModuleHost(module, inputs)
    amounts = Amounts(Depth(graph(module, inputs)), host)
    blocks = amounts.depth.blocks
    for gone in ((), *((block,) for block in blocks), blocks[::2], blocks):
        small = host.bypassed(amounts.depth, gone).module
        again = graph(small, inputs)
        assert amounts("bytes", gone) == written(small)
        assert amounts("activation", gone) == again.memory.activation(again.gone({}))


def without(module: nn.Module, inputs: Tensor, target: str, **options: object) -> ModuleResult:
    seed, tolerance = options.pop("seed", 0), options.pop("tolerance", 0.1)
    values = {"target": [target], "tolerance": tolerance, "seed": seed, "options": {"criterion": "l1", **options}}
    return prune_module(module, inputs, {"method": "layers_lottery", **values})


@pytest.mark.parametrize("per_cost", [False, True])
@pytest.mark.parametrize("measure", ["params", "flops", "bytes"])
@pytest.mark.parametrize("make", [deep, layers])
def test_blocks_meet_targets_and_tell_every_measure(
    make: Callable[[], tuple[nn.Module, Tensor]], measure: str, per_cost: bool
) -> None:
    module, inputs = make()
    result = without(module, inputs, f"{measure}=70%", per_cost=per_cost)
    told = result.achieved
    assert abs(told[measure] / told[f"{measure}_before"] - 0.7) <= 0.1
    assert result.model is not None
    for suffix, each in (("", result.model), ("_before", module)):
        found = graph(each, inputs)
        assert told[f"params{suffix}"] == sum(parameter.numel() for parameter in each.parameters())
        assert told[f"flops{suffix}"] == 2 * found.costs.macs(found.gone({}))
        assert told[f"bytes{suffix}"] == written(each)
        assert told[f"activation{suffix}"] == found.memory.activation(found.gone({}))
    assert len(told) == 8


@pytest.mark.parametrize("seed", range(5))
def test_a_peak_of_memory_falls_with_the_last_of_several_blocks(seed: int) -> None:
    """That of this network is in every block of the first stage: they go together, and no other goes for nothing."""
    module, inputs = deep()
    result = without(module, inputs, "activation=67%", criterion="random", keep=0, seed=seed)
    assert set(result.removed) == {"1.0", "1.1", "1.2"}
    assert abs(result.achieved["activation"] / result.achieved["activation_before"] - 0.67) <= 0.1
    with pytest.raises(SecateurError, match=r"come to 1\.000 of the activation, and 2 more are kept for their stages"):
        without(module, inputs, "activation=67%", criterion="random", keep=1, seed=seed)


def by_convolutions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Modules take 0.2 of their time whatever they hold, and the rest in convolutions; what was timed."""
    timings: list[float] = []

    def runner(host: ModuleHost, *_: object) -> Callable[[], int]:
        return lambda: sum(isinstance(part, nn.Conv2d) for part in host.module.modules())

    def clocked(whole: Callable[[], int], small: Callable[[], int]) -> float:
        timings.append(0.2 + 0.8 * small() / whole())
        return timings[-1]

    monkeypatch.setattr(ModuleHost, "runner", runner)
    monkeypatch.setattr(left_out, "relative_latency", clocked)
    return timings


@pytest.mark.parametrize(("asked", "rounds", "gone"), [(1.0, 0, 0), (0.85, 2, 1), (0.8, 2, 2), (0.65, 4, 3)])
def test_blocks_go_until_a_latency_is_passed(
    monkeypatch: pytest.MonkeyPatch, asked: float, rounds: int, gone: int
) -> None:
    """Each of five blocks holds two of fourteen convolutions; the nearer of the last two is taken."""
    timings = by_convolutions(monkeypatch)
    module, inputs = deep()
    result = without(module, inputs, f"latency={asked}x", keep=0, tolerance=0.0)
    assert (len(timings), len(result.removed)) == (rounds, gone)
    assert result.achieved["latency"] == round(1 - 0.8 * gone / 7, 4)
    assert result.achieved["latency_before"] == 1
    plain = prune_module(module, inputs, {"method": "layers_lottery", "ratio": 0.0, "options": {"criterion": "l1"}})
    assert set(result.achieved) - set(plain.achieved) == {"latency", "latency_before"}


def test_for_a_latency_scores_are_divided_by_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    by_convolutions(monkeypatch)
    """Blocks of the first stage have larger numbers, and more than twice the FLOPs."""
    module, inputs = deep()
    with torch.no_grad():
        for parameter in module[1].parameters():  # type: ignore[index,union-attr]
            parameter.mul_(1.8)
    depth = Depth(graph(module, inputs))
    tensors = module.state_dict()
    worth = {b.name: float(sum(tensors[name].abs().sum() for name in b.parameters)) for b in depth.blocks}
    cost = {block.name: block.macs for block in depth.blocks}
    names: list[str] = list(worth)
    first = [next(iter(without(module, inputs, "latency=0.88x", per_cost=each).removed)) for each in (False, True)]
    assert first == [min(names, key=lambda n: worth[n]), min(names, key=lambda n: worth[n] / cost[n])]
    assert first[0] != first[1]


def test_a_latency_that_blocks_cannot_reach_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    by_convolutions(monkeypatch)
    with pytest.raises(SecateurError, match=r"come to 0\.657 of the latency, and 2 more are kept") as failure:
        without(*deep(), "latency=0.3x", keep=1)
    assert failure.value.code == "target-out-of-reach"
    assert "quiet machine" in str(failure.value.hint)


def test_latency_of_a_real_module_without_blocks_is_told() -> None:
    result = without(*deep(), "latency=80%", tolerance=1.0)
    assert 0 < result.achieved["latency"] < 1.5


def test_what_keeps_blocks_from_going_is_said() -> None:
    with pytest.raises(SecateurError, match="1 of the blocks left alone because a multiplication of it stands in"):
        without(*net("transformer"), "bytes=10%")
    with pytest.raises(SecateurError, match="nothing is added to what it was computed from"):
        without(*wide(), "bytes=50%")
