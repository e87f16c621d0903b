"""Residual blocks: found where there are some, left out exactly, and what a method of blocks decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur
from graph_nets import Deep, Layers, net
from secateur import SecateurError
from secateur.api.channels import prune_module
from secateur.budgets.blocks import Amounts
from secateur.evidence.batches import Example
from secateur.evidence.losses import losses_of
from secateur.graph.blocks import Depth
from secateur.graph.bypass import Bypass, bypass
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import build
from secateur.methods.blocks import BlockStudy
from secateur.methods.layers_lottery import LayersLottery
from secateur.scores.similarity import linear_cka


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Deep().eval(), torch.randn(2, 3, 8, 8)


def layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Layers().eval(), torch.randn(2, 6, 5)


def depth_of(module: nn.Module, inputs: Tensor) -> tuple[Depth, ModuleHost]:
    host = ModuleHost(module, inputs)
    return Depth(build(host.network)), host


FOUND = {
    deep: ["1.0", "1.1", "1.2", "2.1", "2.2"],
    layers: [f"{i}.{part}" for i in (1, 2, 3) for part in ("attention", "mlp")],
}


@pytest.mark.parametrize("make", FOUND)
def test_blocks_are_found_and_left_out_exactly(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """Each alone and all together; parameters and multiplications are those of the module that remains."""
    module, inputs = make()
    depth, host = depth_of(module, inputs)
    assert [block.name for block in depth.blocks] == FOUND[make]
    bench = host.bench(depth.graph)
    for blocks in (*([block] for block in depth.blocks), depth.blocks, depth.blocks[::2]):
        assert bench.unsound(depth, blocks) == ""
        before = {key: value.clone() for key, value in module.state_dict().items()}
        small = type(module)().eval()
        small.load_state_dict(module.state_dict())
        bypass(small, depth, inputs, blocks)
        params, macs = depth.remaining(blocks)
        again = build(ModuleHost(small, inputs).network)
        assert params == sum(p.numel() for p in small.parameters())
        assert macs == again.costs.macs(again.gone({}))
        shortcuts = {block.out: block.shortcut for block in blocks}
        assert torch.allclose(host.run(inputs, instead=shortcuts)[0][0], small(inputs), atol=1e-6)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_blocks_are_identities_where_they_can_be() -> None:
    """Behind a ReLU a second one does nothing; behind anything else it stays."""
    module, inputs = deep()
    depth, _ = depth_of(module, inputs)
    bypass(module, depth, inputs, depth.blocks)
    assert isinstance(module[1], nn.Sequential)
    assert [type(module[1][i]) for i in range(3)] == [nn.ReLU, nn.Identity, nn.Identity]
    module, inputs = layers()
    depth, _ = depth_of(module, inputs)
    bypass(module, depth, inputs, depth.blocks[:1])
    assert isinstance(module[1].before, nn.Identity)  # type: ignore[union-attr]
    assert isinstance(module[1].attention, Bypass)  # type: ignore[union-attr]
    assert isinstance(module[1].mlp, nn.Sequential)  # type: ignore[union-attr]


class Nested(nn.Module):
    """A block in the branch of another, and one whose branch is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.outer, self.inner = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.outer(x).relu()
        x = x + (y + self.inner(y).relu())
        seen = self.shared(x).relu()
        return self.head(torch.cat([x + seen, seen], -1))


def test_what_is_read_elsewhere_stays_and_blocks_may_lie_in_others() -> None:
    torch.manual_seed(0)
    module, inputs = Nested().eval(), torch.randn(2, 3)
    depth, host = depth_of(module, inputs)
    assert [(block.name, block.params) for block in depth.blocks] == [("inner", 42), ("outer", 84)]
    assert depth.blocks[0].inside(depth.blocks[1])
    assert depth.remaining(depth.blocks) == depth.remaining(depth.blocks[1:])
    bench = host.bench(depth.graph)
    assert [bench.unsound(depth, each) for each in ([depth.blocks[0]], [depth.blocks[1]], depth.blocks)] == [""] * 3


def test_code_that_multiplies_outside_of_submodules_is_refused() -> None:
    """The attention of this network stands in the code of the network itself."""
    module, inputs = net("transformer")
    depth, host = depth_of(module, inputs)
    bench = host.bench(depth.graph)
    reasons = [bench.unsound(depth, [block]) for block in depth.blocks]
    assert len(reasons) == 2
    assert "stands in the code of" in reasons[0]
    assert reasons[1] == ""
    result = prune_module(module, inputs, {"method": "layers_lottery", "ratio": 0.3, "tolerance": 0.3, **_l1(keep=0)})
    assert set(result.refused) == {depth.blocks[0].name}
    assert set(result.removed) == {depth.blocks[1].name}


def test_networks_without_shortcuts_have_no_blocks() -> None:
    for name in ("concatenated", "padded", "grouped", "recurrent", "strange"):
        assert depth_of(*net(name))[0].blocks == (), name


def _l1(**more: object) -> dict[str, object]:
    return {"options": {"criterion": "l1", **more}}


def labelled(inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(inputs, torch.randint(4, inputs.shape[:1], generator=generator)) for _ in range(2)]


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow", "l1", "cka", "kl", "random"])
def test_every_criterion_decides_and_repeats(criterion: str) -> None:
    module, inputs = deep()
    values = {"method": "layers_lottery", "target": ["flops=75%"], "tolerance": 0.1, "data": labelled(inputs)}
    options = {"criterion": criterion}
    first, again = (prune_module(module, inputs, {**values, "options": options}) for _ in range(2))
    assert first.removed == again.removed
    assert first.removed
    assert first.model is not None
    kept = dict(first.model.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in module.named_parameters() if name in kept)
    assert abs(first.achieved["flops"] / first.achieved["flops_before"] - 0.75) <= 0.1


def test_blocks_that_do_nothing_go_first() -> None:
    """With a silent last convolution, the network is the same without the block; KL and CKA see that."""
    module, inputs = deep()
    dead = module[1][1]  # type: ignore[index]
    with torch.no_grad():
        dead.second.weight.zero_()  # type: ignore[union-attr]
        dead.second.bias.zero_()  # type: ignore[union-attr]
    for criterion in ("kl", "cka"):
        values = {"method": "layers_lottery", "ratio": 0.2, "tolerance": 0.15, "data": [torch.randn(16, 3, 8, 8)]}
        result = prune_module(module, inputs, {**values, "options": {"criterion": criterion}})
        assert result.model is not None
        assert next(iter(result.removed)) == "1.1"
        if len(result.removed) == 1:
            assert torch.allclose(result.model(inputs), module(inputs), atol=1e-6)


def test_blocks_of_every_stage_stay() -> None:
    module, inputs = deep()
    with pytest.raises(SecateurError, match="whole blocks come to") as failure:
        secateur.prune(module, method="layers_lottery", target=["flops=20%"], example_inputs=inputs, **_l1())  # type: ignore[arg-type]
    assert failure.value.exit_code == 2
    values = {"method": "layers_lottery", "target": ["flops=30%"], "tolerance": 0.2}
    assert not {"1.0", "1.1", "1.2"} <= set(prune_module(module, inputs, {**values, **_l1(keep=1)}).removed)
    assert {"1.0", "1.1", "1.2"} <= set(prune_module(module, inputs, {**values, **_l1(keep=0)}).removed)


def test_data_is_asked_for() -> None:
    module, inputs = deep()
    with pytest.raises(SecateurError) as failure:
        secateur.prune(module, method="layers_lottery", ratio=0.2, example_inputs=inputs)
    assert failure.value.code == "no-data"


def test_nothing_to_remove_gives_an_equal_copy() -> None:
    module, inputs = deep()
    result = prune_module(module, inputs, {"method": "layers_lottery", "ratio": 0.0, **_l1()})
    assert result.model is not None
    assert result.model is not module
    assert result.removed == {}
    assert torch.equal(result.model(inputs), module(inputs))


def test_live_norms_leave_the_module_as_it_was() -> None:
    """Statistics of the batch decide, and those of the module stay."""
    module, inputs = deep()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    values = {"method": "layers_lottery", "target": ["flops=75%"], "tolerance": 0.1, "data": labelled(inputs)}
    prune_module(module, inputs, {**values, "options": {"criterion": "grasp", "norms": "batch"}})
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_grasp_of_a_block_is_what_its_removal_does_to_the_gradient() -> None:
    """To first order, shrinking a block's weights changes half the squared gradient by its score."""
    module, inputs = deep()
    module, inputs = module.double(), inputs.double()
    batches = labelled(inputs)
    depth, host = depth_of(module, inputs)
    examples = [Example(*each) for each in batches]
    study = BlockStudy(Amounts(depth, host), depth.blocks, torch.Generator(), inputs, examples, losses_of(None))
    found = LayersLottery(criterion="grasp").score(study)
    parameters = dict(module.named_parameters())

    def flow(scale: float) -> float:
        with torch.no_grad():
            for name in depth.blocks[1].parameters:
                parameters[name].mul_(scale)
        loss = torch.stack([functional.cross_entropy(module(x), y) for x, y in batches]).mean()
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for name in depth.blocks[1].parameters:
                parameters[name].div_(scale)
        return 0.5 * float(sum(slope.square().sum() for slope in slopes))

    assert found[1] == pytest.approx((flow(1 + 1e-5) - flow(1 - 1e-5)) / 2e-5, rel=1e-4)


def test_cka_sees_past_rotations_and_scales() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    turned = x @ torch.linalg.qr(torch.randn(6, 6)).Q * 3 + 1
    assert linear_cka(x, turned) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.randn(20, 6)) < 0.7
    wide = torch.randn(20, 50)
    assert linear_cka(wide, wide[:, torch.randperm(50)]) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, torch.zeros(20, 3)) == 0.0
