"""ONNX files as networks: every unit of every space cut against its mask, and the same graph as the module's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import graph_nets
from onnx_nets import HAND, check_shapes, export
from secateur.graph.onnx_files import read_onnx
from secateur.graph.onnx_host import OnnxHost, silenced
from secateur.graph.spaces import Graph, build
from secateur.graph.tape import record
from secateur.graph.verify import verify

HAND_SPACES = {
    "literal_reshape": [3, 4],
    "computed_reshape": [3, 4],
    "parts": [4, 12],
    "expanded": [6],
    "groups": [2, 2, 3, 3],
    "blocks": [3, 4],
    "attention": [2, 2, 4, 10, 12],
    "recurrent": [4, 5, 6],
    "old": [6],
    "constants": [6],
    "branching": [5],
}
"""Sizes of the spaces that can be cut."""
HAND_REFUSED = {"constants": {"second": "reduce"}}
"""Those that must be refused, with a word of the reason."""


def opened(model: onnx.ModelProto, tmp_path: Path) -> OnnxHost:
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path))
    return OnnxHost.of(read_onnx(path))


@pytest.mark.parametrize("name", HAND)
def test_every_unit_is_cut_right_or_refused(name: str, tmp_path: Path) -> None:
    """Single units and all spaces at once; the batch stays open, and what is written passes the checker."""
    host = opened(HAND[name](), tmp_path)
    graph = build(host.network)
    bench = host.bench(graph)
    verdict = verify(bench)
    sound = [graph.space(each) for each in verdict.sound]
    wanted = HAND_REFUSED.get(name, {})
    assert {k: v for k, v in verdict.refused.items() if k not in wanted} == {}
    assert all(word in verdict.refused[space] for space, word in wanted.items())
    assert sorted(space.size for space in sound) == HAND_SPACES[name]
    for space in sound:
        for unit in range(space.size):
            assert bench.compare(graph.gone({space.name: [unit]}))[0] == "", (space.name, unit)
    gone = graph.gone({space.name: [0] for space in sound})
    assert bench.compare(gone)[0] == ""
    small = tmp_path / "small.onnx"
    host.cut(graph, gone).write(small)
    onnx.checker.check_model(str(small), full_check=True)
    for before, after in zip(host.model.proto.graph.input, onnx.load(str(small)).graph.input, strict=True):
        if before.name in host.first:
            assert before == after  # open sizes stay open
    assert read_onnx(small).bytes == 4 * (graph.costs.params(gone) + buffers(graph, host, gone))


def buffers(graph: Graph, host: OnnxHost, gone: np.ndarray) -> int:
    """Numbers that are measured and not learned, after a cut."""
    state = [name for name, value in host.network.state.items() if value.kind == "buffer"]
    return sum(int(np.prod([(~gone[axis]).sum() for axis in graph.axes[name]])) for name in state)


def test_a_wrong_cut_is_noticed(tmp_path: Path) -> None:
    """The check has power: another cut than the mask, a wrong literal and a lost bias show."""
    host = opened(HAND["parts"](), tmp_path)
    graph = build(host.network)
    space = graph.space("first")
    one, other = (graph.gone({space.name: [unit]}) for unit in (0, 1))
    small = host.cut(graph, one)
    assert host.unlike(host.model, host.outputs(small), graph, one) == ""
    assert "differ" in host.unlike(host.model, host.outputs(small), graph, other)
    name = next(name for name in small.arrays if name.endswith("head.weight"))
    wrong = small.changed(arrays={name: small.arrays[name] * (1 + 1e-3)})
    assert "differ" in host.unlike(host.model, host.outputs(wrong), graph, one)


def test_operators_without_a_rule_are_named(tmp_path: Path) -> None:
    host = opened(HAND["branching"](), tmp_path)
    graph = build(host.network)
    assert set(graph.unknown) == {"If", "DequantizeLinear"}
    assert [space.name for space in graph.spaces] == ["fourth"]
    assert graph.unknown["If"] == ("branched",)


def test_shared_weights_are_sliced_once(tmp_path: Path) -> None:
    host = opened(HAND["expanded"](), tmp_path)
    graph = build(host.network)
    small = host.cut(graph, graph.gone({graph.spaces[0].name: [2]}))
    assert small.arrays["shared.weight"].shape == (5, 5, 1, 1)
    assert [node.input[1] for node in small.proto.graph.node if "shared.weight" in node.input] == ["shared.weight"] * 2


def test_literals_that_several_nodes_share_change_for_each_alone(tmp_path: Path) -> None:
    """One constant serves a reshape of a cut axis and one of an input, which stays."""
    model = HAND["literal_reshape"]()
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", 1, ["n", 12, 8, 8]))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["z", "five"], ["r"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["n", 3, 4, 8, 8]))
    host = opened(model, tmp_path)
    graph = build(host.network)
    verdict = verify(host.bench(graph))
    assert sorted(graph.space(name).size for name in verdict.sound) == [3, 4]
    small = host.cut(graph, graph.gone({name: [0] for name in verdict.sound}))
    assert "five" in {tensor.name for tensor in small.proto.graph.initializer}


def test_dead_arithmetic_goes(tmp_path: Path) -> None:
    """Sizes that are overridden leave no constants behind; what is still read stays."""
    host = opened(HAND["literal_reshape"](), tmp_path)
    graph = build(host.network)
    space = min(graph.spaces, key=lambda each: each.size)
    small = host.cut(graph, graph.gone({space.name: [0]}))
    literals = [t.name for t in small.proto.graph.initializer if t.name not in small.arrays]
    assert len(literals) == 2
    assert {"five", "four"}.isdisjoint(literals)


@pytest.mark.parametrize("new", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", sorted(set(graph_nets.NETS) - {"strange"}))
def test_graph_of_the_file_is_that_of_the_module(name: str, new: bool, tmp_path: Path) -> None:
    """Both doors give the same spaces and multiplications, and the file's cuts are right where the module's are."""
    if name == "recurrent" and new:
        pytest.skip("torch cannot export recurrent layers with an open batch this way")
    if name == "rms" and not new:
        pytest.skip("torch's older exporter does not know this norm")
    module, inputs = graph_nets.net(name)
    path = export(module, inputs, tmp_path / "net.onnx", new)
    host = OnnxHost.of(read_onnx(path), given={"x": inputs.numpy()})
    graph, other = build(host.network), build(record(module, inputs))
    assert not graph.unknown
    assert graph.costs.macs(graph.gone({})) == other.costs.macs(other.gone({}))
    bench = host.bench(graph)
    verdict = verify(bench)
    ours = sorted(graph.space(each).size for each in verdict.sound)
    if name != "unet":  # its group norm is an instance norm of the file, whose groups are not numbers of its own
        mine, theirs = sorted(s.size for s in graph.spaces), sorted(s.size for s in other.spaces)
        assert [size for size in mine if size > 2] == [size for size in theirs if size > 2]
    # the older exporter computes the scale of attention from sizes that the file holds: its heads stay; and so does
    # what a norm written out in single operators takes its statistic over
    refused = 2 if name in ("unet", "rms") or (name in ("literal", "transformer") and not new) else 1
    assert len(ours) >= len(other.spaces) - refused
    for each in verdict.sound:
        space = graph.space(each)
        for unit in (0, space.size - 1):
            assert bench.compare(graph.gone({each: [unit]}))[0] == "", each


@pytest.mark.parametrize("name", [*HAND, "transformer", "gqa", "shuffled", "layers"])
def test_shapes_that_a_file_says_are_true_after_a_cut(name: str, tmp_path: Path) -> None:
    """Of single axes and of products of open and cut ones; what cannot be said any more is not."""
    path, small = tmp_path / "net.onnx", tmp_path / "small.onnx"
    if name in HAND:
        onnx.save(onnx.shape_inference.infer_shapes(HAND[name](), data_prop=True), str(path))
        host = OnnxHost.of(read_onnx(path))
    else:
        layers = (graph_nets.Layers().eval(), torch.randn(2, 6, 5))
        module, inputs = layers if name == "layers" else graph_nets.net(name)
        host = OnnxHost.of(read_onnx(export(module, inputs, path)), given={"x": inputs.numpy()})
    assert check_shapes(path, host.first) > 0
    graph = build(host.network)
    host.cut(graph, graph.gone({each: [0] for each in verify(host.bench(graph)).sound})).write(small)
    assert check_shapes(small, host.first) > 0
    assert onnx.load(str(small)).graph.value_info


def test_values_can_be_watched_and_tensors_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 1)).eval()
    image = torch.randn(2, 3, 8, 8)
    host = OnnxHost.of(read_onnx(export(module, image, tmp_path / "net.onnx")))
    first = next(step.outputs[0] for step in host.network.operations if step.op == "convolution")
    batch = torch.randn(5, 3, 8, 8)
    outputs, found = host.run({"x": batch}, [first, host.network.inputs[0], host.network.state["0.bias"]])
    with torch.no_grad():
        assert torch.allclose(found[first], module[0](batch), atol=1e-5)
        assert torch.allclose(outputs[0], module(batch), atol=1e-5)
    assert torch.equal(found[host.network.inputs[0]], batch)
    assert torch.equal(found[host.network.state["0.bias"]], host.tensor("0.bias"))
    doubled = host.with_tensors({name: 2 * host.tensor(name) for name in ("2.weight", "2.bias")})
    assert torch.allclose(doubled.run(batch)[0][0], 2 * outputs[0], atol=1e-4)
    assert torch.equal(host.run([batch])[0][0], outputs[0])


def test_norms_over_channels_see_what_stays(tmp_path: Path) -> None:
    """The mask of a layer norm in the file is the norm of the rest, and zeros elsewhere."""
    host = opened(HAND["attention"](), tmp_path)
    stays = {"ln.weight": {0: torch.tensor([0, 2, 5])}, "ln.bias": {0: torch.tensor([0, 2, 5])}}
    masked = silenced(host.model, stays)
    masked.proto.graph.output.append(onnx.ValueInfoProto(name="normed"))
    masked.proto.graph.output.append(onnx.ValueInfoProto(name="embedded"))
    session = onnxruntime.InferenceSession(masked.assembled().SerializeToString())
    normed, x = (torch.from_numpy(a) for a in session.run(["normed", "embedded"], dict(host.first)))
    index = stays["ln.weight"][0]
    wanted = torch.nn.functional.layer_norm(
        x[..., index], (3,), host.tensor("ln.weight")[index], host.tensor("ln.bias")[index]
    )
    assert torch.allclose(normed[..., index], wanted, atol=1e-5)
    assert float(normed.abs().sum(-1).sub(normed[..., index].abs().sum(-1)).abs().max()) < 1e-5
