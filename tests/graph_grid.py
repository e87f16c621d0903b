"""The grid of methods for modules: every behaviour of a prune as plain functions over one cell (method, options, net).

A new method joins with one line in ``METHODS`` (and is covered with its defaults without it); a new network with one
line in ``NETS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur
from graph_nets import Deep, Grouped, Layers, Plain, UNet
from secateur.api.channels import ModuleResult
from secateur.errors import RequestError
from secateur.graph.blocks import Depth
from secateur.graph.edit import kept
from secateur.graph.modules import ModuleHost
from secateur.graph.spaces import Graph, build
from secateur.graph.state import tensor_at
from secateur.methods.registry import make_graph_method, module_methods

Options = dict[str, Any]
BOUND = 1e-9
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (4, 3, 8, 8)),
    "residual": (Deep, (4, 3, 8, 8)),
    "grouped": (Grouped, (4, 3, 8, 8)),
    "unet": (UNet, (4, 3, 8, 8)),
    "vit": (Layers, (4, 6, 5)),
}
"""Networks, and the sizes of their inputs."""


@dataclass(frozen=True)
class Row:
    """How the grid runs a method: ``options`` in CI, ``more`` in the full grid too; ``refused``: errors by network."""

    options: tuple[Options, ...] = ({},)
    more: tuple[Options, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


_NO_BLOCKS = dict.fromkeys(("plain", "grouped", "unet"), "target-out-of-reach")
_NO_NORMS = dict.fromkeys(("grouped", "vit"), "no-norms")
METHODS: dict[str, Row] = {
    "spa": Row(({}, {"score_by": "random"}), ({"score_by": "l2"}, {"score_by": "bn"}, {"ranking": "local"})),
    "precrop": Row(more=({"units": "last"}, {"rescale": True})),
    "layers_lottery": Row(
        ({"keep": 0},), tuple({"criterion": c, "keep": 0} for c in ("snip", "synflow", "l1", "cka", "kl")), _NO_BLOCKS
    ),
    "pagcp": Row(more=({"search": "all"}, {"decay": False, "top": 0.5})),
    "lrp_pruning": Row(refused=dict.fromkeys(("grouped", "unet"), "no-relevance")),
    "masksparsity": Row(({},), ({"mask": "energy"},), _NO_NORMS),
}


@dataclass(frozen=True)
class Cell:
    """One prune."""

    method: str
    net: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def row(self) -> str:
        return "-".join([self.method, *(f"{key}={value}" for key, value in self.options)])

    def __str__(self) -> str:
        return f"{self.row}-{self.net}"


def cells(full: bool) -> list[Cell]:
    """Every method for modules x its options x every network."""
    found = []
    for name in module_methods():
        row = METHODS.get(name, Row())
        for options in (*row.options, *(row.more if full else ())):
            found += [Cell(name, net, tuple(options.items())) for net in NETS]
    return found


def network(name: str) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    """A network with random norms in float64, an input, and labelled batches."""
    make, sizes = NETS[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = make().double().eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
                part.weight.uniform_(0.1, 1, generator=generator)
                part.bias.normal_(generator=generator)
            if isinstance(part, nn.BatchNorm2d):
                part.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
                part.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
    batches = []
    for _ in range(2):
        inputs = torch.randn(sizes, generator=generator, dtype=torch.float64)
        shape = module(inputs).shape
        batches.append((inputs, torch.randint(4, (shape[0], *shape[2:]), generator=generator)))
    return module, batches[0][0], batches


def prune(cell: Cell, module: nn.Module, inputs: Tensor, data: Sequence[Any], ratio: float = 0.3) -> ModuleResult:
    """The prune of a cell; small networks come no nearer to a target than this."""
    options = dict(cell.options)
    needs = make_graph_method(cell.method, options).data
    result = secateur.prune(
        module,
        method=cell.method,
        ratio=ratio,
        example_inputs=inputs,
        options=options,
        tolerance=0.2,
        data=None if needs == "none" else data,
    )
    assert isinstance(result, ModuleResult)
    return result


def check_masked(module: nn.Module, inputs: Tensor, result: ModuleResult) -> None:
    """The whole network with the result's numbers where something stays, and zeros elsewhere, computes the same.

    Blocks that went are left out of the whole network's run instead.
    """
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    assert result.model is not None
    found = result.model(inputs)
    depth = Depth(graph)
    by_name = {block.name: block for block in depth.blocks}
    if result.removed and set(result.removed) <= set(by_name):
        gone = [by_name[name] for name in result.removed]
        wanted = host.run(inputs, instead={block.out: block.shortcut for block in gone})[0][0]
    else:
        whole = copy.deepcopy(module)
        _write(whole, graph, result)
        wanted = whole(inputs)
    assert float((wanted - found).detach().abs().max()) <= BOUND * float(wanted.detach().abs().max())


@torch.no_grad()
def _write(whole: nn.Module, graph: Graph, result: ModuleResult) -> None:
    """The numbers of a result at their places in the whole network."""
    assert result.model is not None
    stays = kept(graph, graph.gone(result.removed))
    for name in graph.network.state:
        tensor, small = tensor_at(whole, name), tensor_at(result.model, name)
        if not tensor.is_floating_point():
            continue
        places = [stays.get(name, {}).get(dim, torch.arange(size)).numpy() for dim, size in enumerate(tensor.shape)]
        value = np.zeros(tuple(tensor.shape))
        value[np.ix_(*places)] = small.numpy()
        tensor.copy_(torch.from_numpy(value))


def check_counts(inputs: Tensor, result: ModuleResult) -> None:
    """Achieved is what the smaller module holds, and what its own graph counts."""
    assert result.model is not None
    assert result.achieved["params"] == sum(p.numel() for p in result.model.parameters())
    counted = build(ModuleHost(result.model, inputs).network)
    assert result.achieved["flops"] == 2 * counted.costs.macs(counted.gone({}))
    assert result.achieved["params"] < result.achieved["params_before"]


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules hold the same numbers, to the bit."""
    one, other = left.state_dict(), right.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def refusal(cell: Cell, module: nn.Module, inputs: Tensor, data: Sequence[Any]) -> RequestError | None:
    """How a prune is refused; None when it is not."""
    try:
        prune(cell, module, inputs, data)
    except RequestError as error:
        return error
    return None


def run_cell(cell: Cell) -> str:
    """All behaviours of one cell.

    Returns:
        ``ok``, or ``refused: ...`` where the network has nothing that the method cuts.
    """
    module, inputs, data = network(cell.net)
    before = copy.deepcopy(module)
    expected = METHODS.get(cell.method, Row()).refused.get(cell.net, "")
    if expected:
        error = refusal(cell, module, inputs, data)
        assert error is not None, "this cannot be cut, and it was not refused"
        assert (error.code, error.exit_code) == (expected, 2)
        assert same(module, before), "the input was touched"
        return f"refused: {error.found}"
    result = prune(cell, module, inputs, data)
    assert result.model is not None
    assert result.removed
    check_masked(module, inputs, result)
    check_counts(inputs, result)
    again = prune(cell, module, inputs, data)
    assert again.model is not None
    assert again.removed == result.removed
    assert same(again.model, result.model), "the same seed gives other numbers"
    assert same(module, before), "the input was touched"
    nothing = prune(cell, module, inputs, data, ratio=0.0)
    assert nothing.model is not None
    assert nothing.model is not module
    assert not nothing.removed
    assert same(nothing.model, module), "a copy that should be equal is not"
    return "ok"
