"""What survivors make up for: matrices of readers, costs and least squares against oracles, statistics of norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from graph_nets import NETS, net
from onnx_nets import Builder
from secateur.graph import following
from secateur.graph.following import silent
from secateur.graph.modules import ModuleHost
from secateur.graph.onnx_files import read_onnx
from secateur.graph.onnx_host import OnnxHost
from secateur.graph.readers import norms_behind, readers
from secateur.graph.spaces import build
from secateur.mends.readers import Mender
from secateur.scores.obs import Share, elimination_scores


class Convolutions(nn.Module):
    """Strides, dilations, padding of all kinds, groups, one spatial axis and two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.second = nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4)
        self.third = nn.Conv2d(12, 6, 1, padding="valid", bias=False)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.up, self.head = nn.ConvTranspose1d(5, 4, 2, stride=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)).relu()).relu()
        return self.head(self.up(self.line(x.flatten(2))).transpose(1, 2))


@pytest.mark.parametrize("name", [*sorted(set(NETS) - {"recurrent", "strange", "tied", "unet"}), "convolutions"])
def test_readers_are_matrices(name: str) -> None:
    """What a reader makes is its matrix times its rows, plus the bias."""
    torch.manual_seed(0)
    module, inputs = (Convolutions().eval(), torch.randn(2, 3, 9, 8)) if name == "convolutions" else net(name)
    host = ModuleHost(module, inputs)
    found = readers(host.network)
    _, seen = host.run(inputs, [value for reader in found for value in (reader.x, reader.out)])
    assert found
    for reader in found:
        weight = host.tensor(reader.weight).detach()
        assert torch.equal(reader.tensor(reader.matrix(weight), weight), weight)
        rows = reader.rows(seen[reader.x])
        assert torch.equal(torch.cat(list(reader.pieces(seen[reader.x], None, 1)), 1), rows)
        few, all_rows = reader.rows(seen[reader.x], 5), rows.transpose(0, 1)
        assert few.shape == (rows.shape[0], 5 * len(reader.channels(seen[reader.x])), rows.shape[2])
        assert all((all_rows == row).flatten(1).all(1).any() for row in few.transpose(0, 1))
        made = (rows @ reader.matrix(weight).transpose(1, 2)).transpose(0, 1).flatten(1)
        out = seen[reader.out]
        if reader.transposed and reader.is_convolution:  # windows that do not overlap
            out = out.unflatten(2, (-1, 2)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
            made = made + (host.tensor(reader.bias).repeat_interleave(2) if reader.bias else 0)
        else:
            out = reader.channels(out).flatten(0, 1)
            made = made + (host.tensor(reader.bias) if reader.bias else 0)
        assert torch.allclose(made, out, atol=1e-5), reader.weight


@pytest.mark.parametrize("automatic", ["", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_readers_of_onnx_files_are_matrices(automatic: str, tmp_path: Path) -> None:
    builder = Builder()
    builder.weight("w", 6, 2, 3, 2), builder.weight("b", 6), builder.weight("m", 6, 4)
    windows: dict[str, Any] = {"auto_pad": automatic} if automatic else {"pads": [1, 0, 0, 1], "dilations": [1, 2]}
    builder.add("Conv", ["x", "w", "b"], "made", group=2, strides=[2, 1], **windows)
    builder.add("ReduceMean", ["made", builder.ints("axes", 2, 3)], "mean", keepdims=0)
    builder.add("MatMul", ["mean", "m"], "y")
    path = tmp_path / "net.onnx"
    path.write_bytes(builder.model({"x": ["n", 4, 7, 6]}, {"y": ["n", 4]}).SerializeToString())
    host = OnnxHost.of(read_onnx(path))
    inputs = torch.randn(3, 4, 7, 6)
    assert [reader.weight for reader in readers(host.network)] == ["w", "m"]
    for reader in readers(host.network):
        _, seen = host.run(inputs, [reader.x, reader.out])
        made = reader.rows(seen[reader.x]) @ reader.matrix(host.tensor(reader.weight)).transpose(1, 2)
        made = made.transpose(0, 1).flatten(1) + (host.tensor(reader.bias) if reader.bias else 0)
        assert torch.allclose(made, reader.channels(seen[reader.out]).flatten(0, 1), atol=1e-4)


@pytest.mark.parametrize("given", [True, False])
def test_onnx_files_are_mended_too(given: bool, tmp_path: Path) -> None:
    """obspa and udfc on a file, behind whose cut a module of the same numbers would be; nearer than plain cuts."""
    builder = Builder()
    x = builder.conv("x", "first", 3, 12, 3)
    x = builder.add("Relu", [builder.conv(builder.add("Relu", [x], "bent"), "second", 12, 10, 3)], "rounded")
    builder.conv(x, "third", 10, 4)
    path = tmp_path / "net.onnx"
    path.write_bytes(builder.model({"x": ["n", 3, 8, 8]}, {"third": ["n", 4, 8, 8]}).SerializeToString())
    torch.manual_seed(0)
    data = [{"x": torch.randn(16, 3, 8, 8)} for _ in range(2)] if given else None
    held, lost = torch.randn(8, 3, 8, 8), {}
    wanted = OnnxHost.of(read_onnx(path)).run(held)[0][0]
    for method in ("spa", "obspa", "udfc"):
        small = tmp_path / f"{method}.onnx"
        secateur.prune(str(path), method=method, ratio=0.3, tolerance=0.1, data=data, output=str(small))
        lost[method] = float((OnnxHost.of(read_onnx(small)).run(held)[0][0] - wanted).square().mean())
    assert lost["obspa"] < lost["spa"]
    assert 0 < lost["udfc"] < float("inf")


def redundant(kind: str) -> tuple[nn.Module, Tensor, list[int]]:
    """Two hidden units that are linear combinations of the others on all inputs."""
    torch.manual_seed(0)
    if kind == "linear":
        module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
        inputs = torch.randn(400, 6)
    else:
        groups = 2 if kind == "grouped" else 1
        second = nn.Conv2d(8, 6, 3, padding=1, groups=groups, bias=kind != "normed")
        after = nn.BatchNorm2d(6) if kind == "normed" else nn.ReLU()
        module = nn.Sequential(nn.Conv2d(3, 8, 1), second, after, nn.Conv2d(6, 3, 1))
        inputs = torch.randn(40, 3, 6, 6)
    gone = [3, 7] if kind == "grouped" else [2, 5]
    with torch.no_grad():
        first = module[0]
        for unit in gone:
            others = [u for u in range(8) if u not in gone and (kind != "grouped" or u // 4 == unit // 4)]
            mix = torch.randn(len(others))
            for tensor in (first.weight, first.bias):  # type: ignore[union-attr]
                tensor[unit] = torch.tensordot(mix, tensor[others], 1)  # type: ignore[index,arg-type]
    return module.eval(), inputs, gone


@pytest.mark.parametrize("kind", ["linear", "plain", "grouped", "normed"])
def test_least_squares_restore_what_others_can_say(kind: str) -> None:
    module, inputs, gone = redundant(kind)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    space = next(s for s in graph.spaces if s.name.startswith("0"))
    units = {space.name: [3] if kind == "grouped" else gone}
    mender = Mender(host, graph, graph.gone(units), damping=1e-9, shifts=False)
    tensors = mender.mend([inputs])
    before = module(inputs).detach()
    plain = host.with_tensors(silent(host, graph, graph.gone(units))).run(inputs)[0][0]
    after = host.with_tensors(tensors).run(inputs)[0][0]
    assert float((plain - before).abs().max()) > 0.1
    assert torch.allclose(after, before, atol=2e-4)
    cut = host.with_tensors(tensors).cut(graph, graph.gone(units))
    assert torch.allclose(cut(inputs), before, atol=2e-4)


@pytest.mark.parametrize("shifts", [False, True])
def test_refit_is_least_squares(shifts: bool) -> None:
    """Against numpy's lstsq on the inputs behind the cut, towards the outputs before it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    inputs = torch.randn(20, 3, 7, 7)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    gone = graph.gone({"0": [1, 3]})
    tensors = Mender(host, graph, gone, damping=1e-10, shifts=shifts).mend([inputs[:12], inputs[12:]])
    (reader,) = (r for r in readers(host.network) if r.weight == "2.weight")
    _, dense = host.run(inputs, [reader.x, reader.out])
    _, cut = host.with_tensors(silent(host, graph, gone)).run(inputs, [reader.x])
    columns = reader.columns(torch.tensor([0, 2, 4])).numpy()
    left = reader.rows(cut[reader.x])[0].double().numpy()[:, columns]
    right = reader.channels(dense[reader.out]).flatten(0, 1).double().numpy()
    if shifts:
        left = np.concatenate([left, np.ones((len(left), 1))], 1)
    else:
        right = right - module[2].bias.detach().double().numpy()  # type: ignore[operator,union-attr]
    wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
    found = reader.matrix(tensors["2.weight"])[0].double().numpy()
    assert np.allclose(found[:, columns], wanted[:, : len(columns)], atol=1e-5)
    assert not found[:, [c for c in range(45) if c not in columns]].any()
    if shifts:
        assert np.allclose(tensors["2.bias"].double().numpy(), wanted[:, -1], atol=1e-5)


def left_over(x: Tensor, weight: Tensor, gone: list[int]) -> float:
    """What least squares on the other columns leave."""
    rest = [c for c in range(x.shape[1]) if c not in gone]
    wanted = (x @ weight.t()).numpy()
    left = wanted - x[:, rest].numpy() @ np.linalg.lstsq(x[:, rest].numpy(), wanted, rcond=None)[0]
    return float((left**2).sum())


def test_costs_are_what_least_squares_leave() -> None:
    """One unit, then several after each other, in two matrices at once."""
    torch.manual_seed(0)
    columns = torch.arange(12).view(4, 3)
    pairs = [(torch.randn(50, 12).double() @ torch.randn(12, 12).double(), torch.randn(4, 12).double()) for _ in "ab"]

    def shares() -> list[Share]:
        return [Share.of(w, x.t() @ x, columns, 1e-14, worth) for (x, w), worth in zip(pairs, (1, 0.5), strict=True)]

    def wanted(units: list[int]) -> float:
        gone = columns[units].flatten().tolist()
        return left_over(*pairs[0], gone) + 0.5 * left_over(*pairs[1], gone)

    costs = torch.stack([share.costs() for share in shares()]).sum(0)
    assert costs.tolist() == pytest.approx([wanted([unit]) for unit in range(4)], rel=1e-6)
    found = elimination_scores(shares())
    order = found.argsort().tolist()
    assert order[0] == int(costs.argmin())
    for count in (1, 2, 3):
        assert float(found[order[:count]].sum()) == pytest.approx(wanted(order[:count]), rel=1e-5)
    for unit in order[2:]:
        assert wanted(order[:2]) <= wanted([order[0], unit]) + 1e-9


@pytest.mark.parametrize("name", ["residual", "concatenated", "grouped", "transformer", "unet"])
def test_side_by_side_is_one_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = net(name)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    units = {space.name: [0] for space in graph.spaces if space.size > 2 and not space.flags}
    torch.manual_seed(3)
    batches = [torch.randn(inputs.shape) for _ in range(3)]
    mender = Mender(host, graph, graph.gone(units), norms="own")
    fast = mender.mend(batches)
    monkeypatch.setattr(following, "_side_by_side", lambda *_: None)
    slow = Mender(host, graph, graph.gone(units), norms="own").mend(batches)
    assert set(fast) == set(slow)
    assert all(torch.allclose(fast[key], slow[key], atol=1e-4) for key in fast)


@pytest.mark.parametrize("norms", ["own", "match"])
def test_statistics_of_norms_follow(norms: str) -> None:
    """``own``: what the norm gives is standardised; ``match``: it has the moments that it had."""
    module, inputs = net("residual")
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()  # type: ignore[union-attr]
    inputs = torch.randn(16, 3, 8, 8)
    host = ModuleHost(module, inputs)
    graph = build(host.network)
    gone = graph.gone({"stem": [0, 1]})
    mender = Mender(host, graph, gone, readers=False, norms=norms)  # type: ignore[arg-type]
    tensors = mender.mend([inputs])
    norm = next(step for step in host.network.operations if step.place == "inner_norm")
    (dense,) = host.run(inputs, norm.outputs)[1].values()
    (after,) = host.with_tensors(tensors).run(inputs, norm.outputs)[1].values()
    wanted = (dense.mean((0, 2, 3)), dense.std((0, 2, 3))) if norms == "match" else (torch.zeros(5), torch.ones(5))
    assert torch.allclose(after.mean((0, 2, 3)), wanted[0], atol=1e-3)
    assert torch.allclose(after.std((0, 2, 3)), wanted[1], rtol=1e-2)
    assert set(norms_behind(host.network)) == {
        r.out for r in readers(host.network) if r.weight.startswith(("st", "in"))
    }


@pytest.mark.parametrize("name", ["residual", "grouped", "transformer", "concatenated", "unet"])
@pytest.mark.parametrize("given", [True, False])
def test_obspa_beats_plain_cuts(name: str, given: bool) -> None:
    module, inputs = net(name)
    torch.manual_seed(5)
    data = [torch.randn(8, *inputs.shape[1:]) for _ in range(2)]
    options = {"damping": 1e-3}
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    results = [
        secateur.prune(
            module,
            method=method,
            ratio=0.3,
            tolerance=0.2,
            example_inputs=inputs,
            data=data if given else None,
            options=options if method == "obspa" else {},
        ).model
        for method in ("obspa", "obspa", "spa")
    ]
    held = torch.randn(16, *inputs.shape[1:])
    with torch.no_grad():
        wanted = module(held)
        ours, again, plain = (float((m(held) - wanted).square().mean()) for m in results)  # type: ignore[misc]
    assert ours == again
    assert ours < plain
    assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())
