"""Residual blocks of ONNX files: those of the module, left out exactly, by every criterion that needs no gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import secateur
from graph_nets import Deep, Layers
from onnx_nets import FLOAT, Builder, check_shapes, export
from secateur import SecateurError
from secateur.api.channels import prune_module
from secateur.budgets import blocks as amounts
from secateur.cli import main
from secateur.graph import onnx_files
from secateur.graph.blocks import Block, Depth
from secateur.graph.modules import ModuleHost
from secateur.graph.onnx_files import read_onnx
from secateur.graph.onnx_host import OnnxHost
from secateur.graph.onnx_structure import scope
from secateur.graph.spaces import build

NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "deep": lambda: (Deep().eval(), torch.randn(2, 3, 8, 8)),
    "layers": lambda: (Layers().eval(), torch.randn(2, 6, 5)),
}


@cache
def net(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETS[name]()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    @cache
    def path(name: str, new: bool = True) -> Path:
        return export(*net(name), tmp_path_factory.mktemp(name) / "net.onnx", new)

    return path


def opened(path: Path) -> tuple[Depth, OnnxHost]:
    host = OnnxHost.of(read_onnx(path))
    return Depth(build(host.network)), host


def written(model: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return path


def outputs(path: Path, feeds: dict[str, Any]) -> list[np.ndarray]:
    return list(onnxruntime.InferenceSession(str(path)).run(None, feeds))


def left_out(depth: Depth, host: OnnxHost, blocks: list[Block], path: Path) -> OnnxHost:
    """The host without some blocks, written and checked: sound, as small as was told, and true in what it says."""
    assert host.bench(depth.graph).unsound(depth, blocks) == ""
    small = host.bypassed(depth, blocks)
    small.model.write(path)
    onnx.checker.check_model(str(path), full_check=True)
    check_shapes(path, host.first)
    again = build(OnnxHost.of(read_onnx(path)).network)
    assert depth.remaining(blocks) == (again.parameters(), again.costs.macs(again.gone({})))
    return small


@pytest.mark.parametrize("new", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", NETS)
def test_blocks_of_the_file_are_those_of_the_module(
    name: str, new: bool, exported: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """Names, each alone and all together: the file computes what the module without the block does."""
    module, inputs = net(name)
    own = ModuleHost(module, inputs)
    theirs = Depth(build(own.network))
    depth, host = opened(exported(name, new))
    assert [block.name for block in depth.blocks] == [block.name for block in theirs.blocks]
    before = exported(name, new).read_bytes()
    for which in (*range(len(depth.blocks)), slice(None), slice(None, None, 2)):
        ours, others = (
            each[which] if isinstance(which, slice) else [each[which]] for each in (depth.blocks, theirs.blocks)
        )
        path = tmp_path / "small.onnx"
        left_out(depth, host, list(ours), path)
        with torch.no_grad():
            wanted = own.bypassed(theirs, others).module(inputs).numpy()
        assert np.allclose(outputs(path, {"x": inputs.numpy()})[0], wanted, atol=1e-5)
        assert [each.name for each in onnx.load(str(path)).graph.output] == [
            each.name for each in host.model.proto.graph.output
        ]
    assert exported(name, new).read_bytes() == before


def test_a_wrong_edit_is_noticed(exported: Callable[[str, bool], Path]) -> None:
    """The check has power: another block left out, other numbers, a weight too many."""
    depth, host = opened(exported("deep", True))
    one, other = depth.blocks[:2]
    small = host.bypassed(depth, [one]).model
    assert host.unlike_without(host.model, small, depth, [one]) == ""
    assert "differ" in host.unlike_without(host.model, host.bypassed(depth, [other]).model, depth, [one])
    wrong = small.changed(arrays={"5.weight": small.arrays["5.weight"] * (1 + 1e-3)})
    assert "differ" in host.unlike_without(host.model, wrong, depth, [one])
    assert "read elsewhere" in host.unlike_without(host.model, host.model, depth, [one])


def branch(b: Builder, x: str, name: str, **kinds: str) -> str:
    """Two convolutions of six channels beside ``x``, and their sum."""
    b.add("Relu", [b.conv(x, f"{name}.first", 6, 6)], f"{name}.relu")
    b.conv(f"{name}.relu", f"{name}.second", 6, 6)
    return b.add(kinds.get("op", "Add"), [x, f"{name}.second"], f"{name}.sum")


def test_sums_that_are_needed_by_name_keep_it(tmp_path: Path) -> None:
    """Outputs of the model, one of them a sum behind which only a sigmoid stands, and what a branch of control flow
    reads; a sum by the operator Sum; the first shortcut is an input."""
    b = Builder()
    first = branch(b, "x", "one", op="Sum")
    second = branch(b, first, "two")
    third = branch(b, second, "three")
    empty: list[Any] = []
    result = [helper.make_tensor_value_info("r", FLOAT, None)]
    inner = [helper.make_graph([helper.make_node(op, [second], ["r"])], op, empty, result) for op in ("Neg", "Abs")]
    b.add("ReduceSum", ["x"], "total", keepdims=0)
    b.weights.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "nought"))
    b.add("Greater", ["total", "nought"], "more")
    b.add("If", ["more"], "y", then_branch=inner[0], else_branch=inner[1])
    b.add("Sigmoid", [third], "z")
    shape = ["n", 6, 4, 4]
    path = written(b.model({"x": shape}, {"y": shape, first: shape, "z": shape}), tmp_path)
    depth, host = opened(path)
    assert [block.name for block in depth.blocks] == ["one", "two", "three"]
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 6, 4, 4)).astype(np.float32)}
    for number, block in enumerate(depth.blocks):
        left_out(depth, host, [block], tmp_path / f"{number}.onnx")
        y, a, z = outputs(tmp_path / f"{number}.onnx", feeds)
        for wanted, found in zip(outputs(path, feeds), (y, a, z), strict=True):
            assert wanted.shape == found.shape
    left_out(depth, host, list(depth.blocks), tmp_path / "small.onnx")
    y, a, z = outputs(tmp_path / "small.onnx", feeds)
    assert np.array_equal(a, feeds["x"])
    assert np.allclose(z, 1 / (1 + np.exp(-feeds["x"])), atol=1e-6)
    assert np.array_equal(np.abs(y), np.abs(feeds["x"]))
    operators = [node.op_type for node in onnx.load(str(tmp_path / "small.onnx")).graph.node]
    assert sorted(operators) == ["Greater", "Identity", "Identity", "If", "ReduceSum", "Sigmoid"]


def test_inputs_stay_and_weights_go_wherever_they_are_held(tmp_path: Path) -> None:
    """Weights as constants, and among the inputs as in old files; an input that only the branch reads stays one."""
    b = Builder(9)
    b.add("Mul", [b.conv("x", "in", 3, 6), "mask"], "masked")
    b.add("Mul", [branch(b, "masked", "one"), "gate"], "gated")
    b.add("Add", ["one.sum", b.conv("gated", "two", 6, 6)], "sum")
    b.add("Identity", [b.conv("sum", "head", 6, 4)], "y")
    image, wide = ["n", 3, 4, 4], ["n", 6, 4, 4]
    model = b.model({"x": image, "mask": wide, "gate": wide}, {"y": ["n", 4, 4, 4]})
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    tensor = held.pop("two.weight")
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["two.weight"], value=tensor))
    for name, each in held.items():
        model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, list(each.dims)))
    model.ir_version = 3
    onnx.checker.check_model(model)
    path = tmp_path / "net.onnx"
    onnx.save(model, str(path))
    depth, host = opened(path)
    assert [block.params for block in depth.blocks] == [84, 42]
    small = left_out(depth, host, list(depth.blocks), tmp_path / "small.onnx").model
    assert [each.name for each in small.proto.graph.input] == [
        *("x", "mask", "gate", "in.weight", "in.bias", "head.weight", "head.bias")
    ]
    assert set(small.arrays) == {"in.weight", "in.bias", "head.weight", "head.bias"}


def test_branches_of_control_flow_go_with_their_weights(tmp_path: Path) -> None:
    """A choice between two weights stands in the branch of a block."""
    b = Builder()
    b.conv("x", "in", 3, 6)
    empty: list[Any] = []
    result = [helper.make_tensor_value_info("r", FLOAT, None)]
    weight = numpy_helper.from_array(np.ones((1, 6, 1, 1), dtype=np.float32), "w")
    both = [
        helper.make_graph([helper.make_node(op, ["in", "w"], ["r"])], op, empty, result, [weight])
        for op in ("Mul", "Sub")
    ]
    b.add("ReduceSum", ["x"], "total", keepdims=0)
    b.weights.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "nought"))
    b.add("Greater", ["total", "nought"], "more")
    b.add("If", ["more"], "chosen", then_branch=both[0], else_branch=both[1])
    b.add("Add", [b.conv("chosen", "one", 6, 6), "in"], "sum")
    b.add("Identity", [b.conv("sum", "head", 6, 4)], "y")
    depth, host = opened(written(b.model({"x": ["n", 3, 4, 4]}, {"y": ["n", 4, 4, 4]}), tmp_path))
    assert [block.params for block in depth.blocks] == [42 + 2 * 6]
    small = left_out(depth, host, list(depth.blocks), tmp_path / "small.onnx").model
    assert small.inner == {}
    assert [node.op_type for node in small.proto.graph.node] == ["Conv", "Conv", "Identity"]


def test_what_is_read_for_its_sizes_elsewhere_is_refused(tmp_path: Path) -> None:
    """The shape of something in the branch is the target of a reshape behind it."""
    b = Builder()
    b.conv("x", "in", 3, 6)
    x = branch(b, branch(b, "in", "one"), "two")
    b.add("Shape", ["one.relu"], "shape")
    b.add("Reshape", [b.add("Flatten", [x], "flat"), "shape"], "back")
    b.add("Identity", [b.conv("back", "head", 6, 4)], "y")
    path = written(b.model({"x": ["n", 3, 4, 4]}, {"y": ["n", 4, 4, 4]}), tmp_path)
    depth, host = opened(path)
    bench = host.bench(depth.graph)
    assert "read elsewhere" in bench.unsound(depth, [depth.blocks[0]])
    assert bench.unsound(depth, [depth.blocks[1]]) == ""
    values = {"method": "layers_lottery", "ratio": 0.4, "tolerance": 0.1, "options": {"criterion": "l1", "keep": 0}}
    result: Any = secateur.prune(path, output=tmp_path / "small.onnx", **values)  # type: ignore[arg-type]
    assert (set(result.removed), set(result.refused)) == ({"two"}, {"one"})


def test_modules_are_told_from_metadata_or_names() -> None:
    def told(name: str, **metadata: str) -> str | None:
        node = helper.make_node("Add", ["a", "b"], ["c"], name=name)
        for key, value in metadata.items():
            node.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
        return scope(node)

    assert told("node_add", name_scopes="['', '1', '1.0', '1.0.act', 'add']") == "1.0.act"
    assert told("node_add", name_scopes="['', 'add']") == ""
    assert told("/layer1/layer1.0/conv1/Conv") == "layer1.0.conv1"
    assert told("/encoder/layer.1/attention/Add_1") == "encoder.layer.1.attention"
    assert told("model/conv1/BiasAdd") == "model.conv1"
    assert told("/Add") == ""
    assert told("Add.3") is None
    assert scope(onnx.NodeProto.FromString(b"\x1a\x03a/\xff")) is not None  # a name that is no text


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON object of a command."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--json"])
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


def held(path: Path) -> int:
    """Bytes of the weights of a file; sizes to which it reshapes are none."""
    arrays = [numpy_helper.to_array(each) for each in onnx.load(str(path)).graph.initializer]
    return sum(array.nbytes for array in arrays if array.dtype.kind == "f")


WORDS = ("--method", "layers_lottery", "--target", "flops=70%", "--tolerance", "0.1", "--set", "criterion=l1")


def test_prune_and_preview_from_the_command_line(
    exported: Callable[[str, bool], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, small = exported("deep", True), tmp_path / "small.onnx"
    before = path.read_bytes()
    code, foreseen = command(capsys, "preview", path, *WORDS)
    assert (code, foreseen["problems"]) == (0, [])
    code, told = command(capsys, "prune", path, *WORDS, "-o", small)
    assert code == 0
    assert abs(told["achieved"]["flops"] / told["achieved"]["flops_before"] - 0.7) < 0.1
    files = {"bytes", "bytes_before"}  # of what is written: those of the tensors and of what describes them
    assert {key: told["achieved"][key] for key in foreseen["achieved"]} | {
        key: foreseen["achieved"][key] for key in files
    } == foreseen["achieved"]
    assert held(small) == foreseen["achieved"]["bytes"] < told["achieved"]["bytes"]
    assert set(foreseen["sizes"]) == set(told["removed"]) <= {"1.0", "1.1", "1.2", "2.1", "2.2"}
    lost = sum(size["before"] - size["after"] for size in foreseen["sizes"].values())
    assert lost == told["achieved"]["params_before"] - told["achieved"]["params"]
    assert told["achieved"]["bytes"] == small.stat().st_size < told["achieved"]["bytes_before"] == len(before)
    depth, host = opened(path)
    gone = [block for block in depth.blocks if block.name in told["removed"]]
    assert host.unlike_without(host.model, read_onnx(small), depth, gone) == ""
    for batch in (1, 4):
        assert outputs(small, {"x": np.ones((batch, 3, 8, 8), np.float32)})[0].shape == (batch, 4)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["small.onnx"]
    with pytest.raises(SystemExit):
        main(["preview", str(path), *WORDS])
    assert next(iter(told["removed"])) in capsys.readouterr().out
    copied = tmp_path / "copy.onnx"
    secateur.prune(path, method="layers_lottery", ratio=0, options={"criterion": "l1"}, output=copied)
    assert copied.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ([], "no-gradients", "--set criterion=l1|cka|kl"),
        (["--set", "criterion=snip"], "no-gradients", "--set criterion=l1|cka|kl"),
        (["--set", "criterion=synflow"], "no-gradients", "--set criterion=l1|cka|kl"),
        (["--set", "criterion=kl"], "no-data", ""),
        (["--set", "criterion=l1", "--target", "flops=1%"], "target-out-of-reach", "keep"),
        (["--set", "criterion=l1", "--target", "kv_bytes=70%"], "bad-target", ""),
    ],
)
def test_refusals_name_what_works_and_leave_nothing(
    words: list[str],
    code: str,
    hint: str,
    exported: Callable[[str, bool], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = exported("deep", True)
    target = [] if "--target" in words else ["--target", "flops=70%"]
    asked = ("--method", "layers_lottery", *target, *words)
    exit_code, told = command(capsys, "prune", path, *asked, "-o", tmp_path / "small.onnx")
    assert (exit_code, told["error"]["code"]) == (2, code)
    assert hint in told["error"]["hint"]
    exit_code, told = command(capsys, "preview", path, *asked)
    assert (exit_code, told["problems"][0]["code"]) == (2, code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("target", ["bytes=70%", "activation=50%"])
@pytest.mark.parametrize("name", NETS)
def test_memory_is_a_target(
    name: str, target: str, new: bool, exported: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """What was foreseen is in the file; a peak of memory falls with the last of several blocks."""
    path, small, (measure, _, wanted) = exported(name, new), tmp_path / "small.onnx", target.partition("=")
    values: dict[str, Any] = {"method": "layers_lottery", "target": [target], "tolerance": 0.2}
    values["options"] = {"criterion": "l1", "keep": 0}
    told = secateur.preview(path, **values)["achieved"]
    assert abs(told[measure] / told[f"{measure}_before"] - float(wanted.rstrip("%")) / 100) <= 0.2
    result: Any = secateur.prune(path, output=small, **values)
    again = build(OnnxHost.of(read_onnx(small)).network)
    assert again.memory.saved(again.gone({})) == told["bytes"]
    assert again.memory.activation(again.gone({})) == told["activation"] == result.achieved["activation"]
    assert set(told) == {
        f"{each}{end}" for each in ("params", "flops", "bytes", "activation") for end in ("", "_before")
    }


def test_blocks_of_a_file_go_until_a_latency_is_passed(
    exported: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(host: OnnxHost, *_: object) -> Callable[[], int]:
        return lambda: sum(node.op_type == "Conv" for node in host.model.proto.graph.node)

    monkeypatch.setattr(OnnxHost, "runner", runner)
    monkeypatch.setattr(amounts, "relative_latency", lambda whole, small: small() / whole())
    values: dict[str, Any] = {"method": "layers_lottery", "options": {"criterion": "l1"}, "tolerance": 0}
    path, small = exported("deep", True), tmp_path / "small.onnx"
    result: Any = secateur.prune(path, output=small, target=["latency=70%"], **values)
    assert (len(result.removed), result.achieved["latency"]) == (2, round(1 - 4 / 14, 4))
    with pytest.raises(SecateurError, match="2 more are kept for their stages"):
        secateur.prune(path, output=tmp_path / "none.onnx", target=["latency=20%"], **values)
    assert [each.name for each in tmp_path.iterdir()] == ["small.onnx"]


def test_a_file_without_blocks_is_timed(exported: Callable[[str, bool], Path], tmp_path: Path) -> None:
    """Whatever the clock of this machine says of so small a file, it is told."""
    values: dict[str, Any] = {"method": "layers_lottery", "options": {"criterion": "l1"}, "tolerance": 1.0}
    result: Any = secateur.prune(
        exported("deep", True), output=tmp_path / "small.onnx", target=["latency=80%"], **values
    )
    assert 0 < result.achieved["latency"] < 1.5


@pytest.mark.parametrize(
    ("name", "criterion"),
    [("deep", "cka"), ("deep", "kl"), ("layers", "cka"), ("layers", "kl"), ("layers", "l1"), ("deep", "random")],
)
def test_criteria_decide_as_they_do_for_the_module(
    name: str, criterion: str, exported: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    """Norms are folded into convolutions in a file, so absolute values are those of the module only without them."""
    module, inputs = net(name)
    batch = torch.randn(12, *inputs.shape[1:], generator=torch.Generator().manual_seed(1))
    values: dict[str, Any] = {"method": "layers_lottery", "target": ["params=60%"], "tolerance": 0.2}
    values["options"] = {"criterion": criterion}
    wanted = prune_module(module, inputs, {**values, "data": [batch]})
    found: list[Any] = [
        secateur.prune(exported(name, True), output=tmp_path / f"{i}.onnx", data=[{"x": batch.numpy()}], **values)
        for i in range(2)
    ]
    assert list(found[0].removed) == list(found[1].removed) == list(wanted.removed)
    assert found[0].removed
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    assert wanted.model is not None
    with torch.no_grad():
        assert np.allclose(outputs(tmp_path / "0.onnx", {"x": batch.numpy()})[0], wanted.model(batch), atol=1e-5)


def scores(last: str, out: list[Any]) -> onnx.ModelProto:
    """Two blocks, the second of which does nothing; class scores, or what ``last`` makes of them."""
    b = Builder()
    b.conv("x", "in", 3, 6)
    x = branch(b, branch(b, "in", "one"), "two")
    for tensor in b.weights:
        if tensor.name.startswith("two.second"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    b.add("Flatten", [b.add("GlobalAveragePool", [x], "pooled")], "flat")
    b.add("Gemm", ["flat", b.weight("head.weight", 6, 4), b.weight("head.bias", 4)], "scores")
    b.add(last, ["scores"], "y", **({} if last == "Softmax" else {"keepdims": 0, "axis": 1}))
    return b.model({"x": ["n", 3, 4, 4]}, {"y": out}, check=False)


def test_blocks_that_do_nothing_go_first_whatever_the_outputs_are(tmp_path: Path) -> None:
    """KL of what a softmax made; where there are no class scores KL is refused."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {"method": "layers_lottery", "ratio": 0.4, "tolerance": 0.2}
    values |= {"data": [{"x": rng.standard_normal((8, 3, 4, 4)).astype(np.float32)}], "output": tmp_path / "small.onnx"}
    path = written(scores("Softmax", ["n", 4]), tmp_path)
    result: Any = secateur.prune(path, options={"criterion": "kl"}, **values)
    assert list(result.removed) == ["two"]
    best = scores("ArgMax", ["n"])
    best.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(SecateurError) as failure:
        secateur.prune(written(best, tmp_path), options={"criterion": "kl"}, force=True, **values)
    assert (failure.value.code, failure.value.exit_code) == ("no-scores", 2)
    result = secateur.prune(written(best, tmp_path), options={"criterion": "cka"}, force=True, **values)
    assert list(result.removed) == ["two"]


def test_weights_beside_the_file_are_read_and_written(
    exported: Callable[[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "beside.onnx"
    onnx.save(
        onnx.load(str(exported("deep", True))), str(path), save_as_external_data=True, location="own", size_threshold=0
    )
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    values: dict[str, Any] = {"method": "layers_lottery", "target": ["flops=70%"], "tolerance": 0.1}
    values["options"] = {"criterion": "l1"}
    secateur.prune(path, output=tmp_path / "new" / "small.onnx", **values)
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["small.onnx"]
    monkeypatch.setattr(onnx_files, "ONE_FILE", 100)
    result = secateur.prune(path, output=tmp_path / "large" / "small.onnx", **values)
    files = sorted(each.name for each in (tmp_path / "large").iterdir())
    assert len(files) == 2
    assert files[0].endswith(".data")
    assert result.achieved["bytes"] == sum(each.stat().st_size for each in (tmp_path / "large").iterdir())
    feeds = {"x": net("deep")[1].numpy()}
    (one,), (other,) = (outputs(tmp_path / folder / "small.onnx", feeds) for folder in ("new", "large"))
    assert np.array_equal(one, other)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
