"""Criteria of spa that look at slopes, flows and signals, against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from graph_nets import Residual, net
from secateur import SecateurError
from secateur.evidence.batches import Example, samples
from secateur.evidence.flow import synaptic_flow
from secateur.evidence.gradients import Slope
from secateur.evidence.losses import cross_entropy
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import build
from secateur.methods.channels import ChannelStudy
from secateur.methods.spa import Spa, worths

DATA = ["taylor", "gate", "snip", "grasp", "hessian", "activation"]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double().eval()


def examples(count: int = 2, rows: int = 4) -> list[Example]:
    torch.manual_seed(1)
    return [Example(torch.randn(rows, 5).double(), torch.randint(3, (rows,))) for _ in range(count)]


def study_of(module: nn.Module, inputs: Tensor, batches: list[Example] | None = None) -> ChannelStudy:
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    losses = {"loss": cross_entropy}
    return ChannelStudy(graph, graph.spaces, host, torch.Generator().manual_seed(0), inputs, batches, losses)


def small_study(**more: Any) -> ChannelStudy:
    return study_of(small(), torch.randn(2, 5).double(), examples(**more))


def loss_at(study: ChannelStudy, values: dict[str, Tensor], example: Example) -> float:
    host = study.host.with_tensors(values)
    return float(cross_entropy(host.run(example.inputs)[0], example.labels))


def slopes_at(study: ChannelStudy, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return Slope(study.host.with_tensors(values), study.loss).mean(study.data())


def test_slopes_are_finite_differences() -> None:
    study = small_study()
    slope = Slope(study.host, study.loss).mean(study.data())["2.weight"]
    value = study.tensor("2.weight").detach()
    for place in ((0, 0), (3, 5), (5, 6)):
        step = torch.zeros_like(value)
        step[place] = 1e-5
        sides = [
            sum(loss_at(study, {"2.weight": value + sign * step}, e) for e in study.data()) / 2 for sign in (1, -1)
        ]
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(slope[place]), rel=1e-5, abs=1e-9)


def test_grasp_is_the_change_of_the_slopes_length() -> None:
    """w (H g) = w d(|g|^2 / 2)/dw, by finite differences of the slopes over all batches."""
    study = small_study()
    found = worths(study, "grasp")

    def half(values: dict[str, Tensor]) -> float:
        return sum(float(g.square().sum()) for g in slopes_at(study, values).values()) / 2

    for name, place in (("0.weight", (2, 3)), ("2.weight", (1, 1)), ("4.bias", (2,))):
        value = study.tensor(name).detach()
        step = torch.zeros_like(value)
        step[place] = 1e-5
        slope = (half({name: value + step}) - half({name: value - step})) / 2e-5
        assert float(value[place]) * slope == pytest.approx(float(found[name][place]), rel=1e-4, abs=1e-10)


def test_hessian_is_the_mean_over_samples() -> None:
    study = small_study()
    found = worths(study, "hessian")["2.weight"]
    weight = study.tensor("2.weight").detach()
    total = torch.zeros_like(weight)
    for example in study.data():
        for row in range(4):
            one = Example(example.inputs[row : row + 1], example.labels[row : row + 1])  # type: ignore[index]
            total += Slope(study.host, study.loss).of(one)["2.weight"].square()
    assert torch.allclose(found, weight.square() * total / 8 / 2)
    assert len(list(samples(study.data()))) == 8


def test_gauss_newton_is_the_hessian_of_a_fitted_model() -> None:
    """Where labels follow the model's own probabilities, E[g^2] is the diagonal of the second derivative."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4)).double()
    x = torch.randn(1, 3).double()
    study = study_of(module, x, [])
    slope = Slope(study.host, study.loss)
    chance = module(x).softmax(-1)[0]
    fisher = sum(chance[k] * slope.of(Example(x, torch.tensor([k])))["0.weight"].square() for k in range(4))
    wanted = torch.outer(chance * (1 - chance), x[0].square())
    assert torch.allclose(torch.as_tensor(fisher), wanted)


def test_snip_is_the_slope_of_a_mask() -> None:
    study = small_study()
    module: Any = study.host.module  # type: ignore[attr-defined]
    mask = torch.ones_like(module[2].weight, requires_grad=True)
    total = torch.zeros(())
    for example in study.data():
        x = module[1](module[0](example.inputs))
        x = module[4](module[3](functional.linear(x, module[2].weight * mask, module[2].bias)))
        total = total + cross_entropy(x, example.labels) / 2
    (wanted,) = torch.autograd.grad(total, mask)
    assert torch.allclose(worths(study, "snip")["2.weight"], wanted.abs())


def test_gates_are_slopes_of_gates_and_follow_ablation() -> None:
    study = small_study(count=1, rows=40)
    found = Spa(score_by="gate", normaliser="none").score(study)
    (whole,) = study.data()
    weight = study.tensor("4.weight").detach()
    for unit in range(6):
        total = 0.0
        for example in samples([whole]):
            sides = []
            for step in (1e-5, -1e-5):
                gated = weight.clone()
                gated[:, unit] *= 1 + step
                sides.append(loss_at(study, {"4.weight": gated}, example))
            total += ((sides[0] - sides[1]) / 2e-5) ** 2 / 40
        assert float(found["2"][unit]) == pytest.approx(total, rel=1e-4)
    order = []
    for space, units in (("0", 7), ("2", 6)):
        for unit in range(units):
            silent = study.silenced({space: [unit]})
            squares = [(loss_at(silent, {}, one) - loss_at(study, {}, one)) ** 2 for one in samples(study.data())]
            order.append((sum(squares), float(found[space][unit])))
    ranks = torch.tensor(order).argsort(0).argsort(0).double()
    assert float(torch.corrcoef(ranks.T)[0, 1]) > 0.8


def test_synaptic_flow_is_conserved() -> None:
    """Without biases every layer carries the same flow, and every unit gives what it gets; norms and sums included."""
    module, inputs = net("residual")
    host = ModuleHost(module, inputs)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_mean.normal_()  # type: ignore[union-attr]
    found = synaptic_flow(host, inputs)
    total = found["head.weight"].sum()
    assert torch.allclose(found["stem.weight"].sum(), total)
    assert torch.allclose(found["norm.weight"].sum(), total)
    assert torch.allclose(found["inner.weight"].sum(), found["outer.weight"].sum())
    assert torch.allclose(found["inner.weight"].sum((1, 2, 3)), found["inner_norm.weight"])
    assert torch.allclose(found["inner_norm.weight"], found["outer.weight"].sum((0, 2, 3)))
    assert not found["stem.bias"].any()


def test_synaptic_flow_through_attention() -> None:
    found = synaptic_flow(ModuleHost(*net("transformer")), net("transformer")[1])
    assert float(found["up.weight"].sum()) == pytest.approx(float(found["down.weight"].sum()))


def test_fpgm_finds_what_others_can_stand_in_for() -> None:
    """Four filters near each other and one far away of the same size: the norm cannot tell, the distance can."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    base = torch.randn(3, 3, 3)
    with torch.no_grad():
        for unit in range(5):
            near = base + 0.01 * torch.randn(3, 3, 3)
            filter_ = -near if unit == 2 else near
            module[0].weight[unit] = filter_ / filter_.norm()  # type: ignore[operator,index,union-attr]
    study = study_of(module, torch.randn(1, 3, 8, 8))
    scores = Spa(score_by="fpgm").score(study)["0"]
    assert int(scores.argmax()) == 2
    rows = module[0].weight.detach().double().flatten(1)
    wanted = torch.stack([torch.stack([(a - b).norm() for b in rows]).sum() for a in rows])
    assert torch.allclose(scores, wanted / wanted.mean())


@pytest.mark.parametrize("signal", ["mean", "variance"])
def test_activation_is_the_size_of_what_is_read(signal: Any) -> None:
    module, inputs = net("residual")
    batches = [Example(torch.randn(3, 3, 8, 8)), Example(torch.randn(3, 3, 8, 8))]
    study = study_of(module, inputs, batches)
    found = Spa(score_by="activation", signal=signal, normaliser="none").score(study)["inner"]
    assert isinstance(module, Residual)
    with torch.no_grad():
        x = torch.cat([b.inputs for b in batches])  # type: ignore[misc]
        x = module.inner_norm(module.inner(module.norm(module.stem(x)).relu())).relu().transpose(0, 1).flatten(1)
    wanted = x.abs().mean(1) if signal == "mean" else x.var(1, correction=0)
    assert torch.allclose(found, wanted.double(), atol=1e-5)


@pytest.mark.parametrize("criterion", [*DATA, "synflow", "fpgm"])
@pytest.mark.parametrize("name", ["residual", "grouped", "transformer", "concatenated"])
def test_every_criterion_on_networks(criterion: str, name: str) -> None:
    module, inputs = net(name)
    outputs = module(inputs)
    data = [(inputs, torch.zeros((len(inputs), *outputs.shape[2:]), dtype=torch.long))]
    options = {"score_by": criterion, "steps": 2}
    found = [
        secateur.prune(
            module,
            method="spa",
            ratio=0.3,
            data=data,
            example_inputs=inputs,
            tolerance=0.2,
            options=options,  # type: ignore[arg-type]
        )
        for _ in range(2)
    ]
    assert found[0].removed == found[1].removed  # type: ignore[attr-defined]
    assert found[0].removed  # type: ignore[attr-defined]
    assert found[0].model(inputs).shape == outputs.shape  # type: ignore[misc]


@pytest.mark.parametrize("criterion", DATA)
def test_criteria_with_data_say_so(criterion: str) -> None:
    module, inputs = net("residual")
    with pytest.raises(SecateurError, match="data"):
        secateur.prune(module, method="spa", ratio=0.2, example_inputs=inputs, options={"score_by": criterion})


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_steps_score_what_is_left(schedule: str) -> None:
    """Two units that stand in for each other: one shot takes both, steps take one of them."""
    module, inputs = net("residual")
    options = {"score_by": "synflow", "steps": 10, "schedule": schedule, "normaliser": "none"}
    values = {"target": ["params=50%"], "tolerance": 0.1, "options": options}
    result = secateur.prune(module, method="spa", example_inputs=inputs, **values)  # type: ignore[arg-type]
    assert abs(result.achieved["params"] / result.achieved["params_before"] - 0.5) < 0.1
    assert [Spa(steps=4, schedule=schedule).way(k, _half()) for k in (0, 4)] == pytest.approx([0, 1])  # type: ignore[arg-type]


def _half() -> Any:
    from secateur.budgets.targets import Target

    return Target("params", fraction=0.5)
