"""ONNX files from the command line and from Python: what is written, what is refused, files that mean harm."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import secateur
from onnx_nets import FLOAT, HAND, OTHERS, Builder, other
from secateur import SecateurError
from secateur.cli import main
from secateur.graph import onnx_files
from secateur.graph.edit import kept
from secateur.graph.onnx_files import read_onnx
from secateur.graph.onnx_host import OnnxHost, silenced
from secateur.graph.spaces import build
from secateur.graph.verify import relative_difference


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(HAND["blocks"](), str(path))
    return path


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON object of a command."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words), "--json"])
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


def test_prune_writes_a_file_that_onnxruntime_runs(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, before = net.with_name("small.onnx"), net.read_bytes()
    code, told = command(capsys, "prune", net, "--method", "spa", "--ratio", "0.4", "-o", small, "--tolerance", "0.1")
    assert code == 0
    keys = {
        "method",
        "requested",
        "achieved",
        "perplexity",
        "seconds",
        "peak_rss_bytes",
        "output",
        "layout",
        "loads_in",
    }
    assert keys | {"seed", "removed", "refused", "unknown"} <= set(told)
    assert told["loads_in"] == {"onnxruntime": f"verified({onnxruntime.__version__})"}
    assert told["achieved"]["bytes"] == small.stat().st_size < told["achieved"]["bytes_before"] == len(before)
    assert abs(told["achieved"]["params"] / told["achieved"]["params_before"] - 0.6) < 0.1
    onnx.checker.check_model(str(small), full_check=True)
    session = onnxruntime.InferenceSession(str(small))
    for batch in (1, 4):
        assert session.run(None, {"x": np.ones((batch, 3, 8, 8), np.float32)})[0].shape == (batch, 4)
    assert net.read_bytes() == before
    assert sorted(each.name for each in net.parent.iterdir()) == ["net.onnx", "small.onnx"]


def test_written_file_computes_what_the_masked_one_does(net: Path) -> None:
    small = net.with_name("small.onnx")
    result = secateur.prune(net, ratio=0.5, output=small, tolerance=0.1)
    host = OnnxHost.of(read_onnx(net))
    graph = build(host.network)
    masked = silenced(host.model, kept(graph, graph.gone(result.removed)))  # type: ignore[attr-defined]
    for wanted, found in zip(host.outputs(masked), host.outputs(read_onnx(small)), strict=True):
        assert relative_difference(wanted, found) < 1e-5


def test_prune_is_the_same_every_time(net: Path) -> None:
    digests = []
    for number in range(2):
        output = net.with_name(f"small{number}.onnx")
        secateur.prune(net, ratio=0.5, output=output, tolerance=0.1, seed=3, options={"score_by": "random"})
        digests.append(hashlib.sha256(output.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_targets_and_data(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FLOPs as the target; examples from arrays decide what is run, so that FLOPs are those of their size."""
    data = net.with_name("data.npz")
    np.savez(data, x=np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float64), labels=np.arange(5))
    small = net.with_name("small.onnx")
    code, told = command(
        capsys, "prune", net, "--target", "flops=60%", "--data", data, "-o", small, "--tolerance", "0.1"
    )
    assert code == 0
    assert abs(told["achieved"]["flops"] / told["achieved"]["flops_before"] - 0.6) < 0.1


@pytest.mark.parametrize("measure", ["activation", "latency"])
def test_memory_and_time_of_a_run_are_targets(measure: str, net: Path) -> None:
    """Whatever the clock of this machine says of so small a file, it is told."""
    output = net.with_name("small.onnx")
    result = secateur.prune(net, output=output, method="spa", target=[f"{measure}=70%"], tolerance=1.0)
    assert 0 < result.achieved[measure] < 1.5 * result.achieved[f"{measure}_before"]


def test_ratio_zero_copies_the_bytes(net: Path) -> None:
    small = net.with_name("small.onnx")
    result = secateur.prune(net, ratio=0, output=small)
    assert small.read_bytes() == net.read_bytes()
    assert result.achieved["params"] == result.achieved["params_before"] == 296


def test_outputs_are_not_overwritten(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = net.with_name("small.onnx")
    small.write_bytes(b"old")
    words = ("prune", net, "--ratio", "0.4", "-o", small, "--tolerance", "0.1")
    code, told = command(capsys, *words)
    assert (code, told["error"]["code"], small.read_bytes()) == (2, "output-exists", b"old")
    code, _ = command(capsys, *words, "--force")
    assert code == 0
    assert small.with_name("small.onnx.previous").read_bytes() == b"old"
    onnx.checker.check_model(str(small))


def test_preview_and_inspect(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = command(capsys, "preview", net, "--ratio", "0.4", "--tolerance", "0.1")
    assert (code, told["problems"]) == (0, [])
    assert told["achieved"]["params"] < told["achieved"]["params_before"]
    assert all(change["after"] < change["before"] for change in told["sizes"].values())
    code, told = command(capsys, "preview", net, "--ratio", "0.999")
    assert (code, told["problems"][0]["code"]) == (2, "target-out-of-reach")
    code, told = command(capsys, "inspect", net, "--graph")
    assert code == 0
    assert [(space["size"], "refused" in space) for space in told["spaces"]] == [(3, False), (4, False)]
    assert told["inputs"] == {"x": {"type": "float32", "shape": ["n", 3, 8, 8]}}
    assert told["unknown"] == {}
    assert told["cuttable"] > 0.9
    assert [path.name for path in net.parent.iterdir()] == ["net.onnx"]
    with pytest.raises(SystemExit):
        main(["inspect", str(net), "--graph"])
    printed = capsys.readouterr().out
    assert "can be cut" in printed
    assert "first" in printed
    code, told = command(capsys, "inspect", net, "--draw", net.with_name("net.svg"))
    assert (code, told["drawing"]) == (0, str(net.with_name("net.svg")))
    assert net.with_name("net.svg").read_text(encoding="utf-8").startswith("<svg")
    code, told = command(capsys, "inspect", net, "--draw", net.with_name("net.png"))
    assert (code, told["error"]["code"]) == (2, "bad-drawing")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--ratio", "0.3"], "no-output"),
        (["--ratio", "0.3", "-o", "net.onnx"], "output-is-input"),
        (["--ratio", "0.3", "-o", "small"], "bad-output"),
        (["-o", "small.onnx"], "no-target"),
        (["--ratio", "0.3", "-o", "small.onnx", "--method", "wanda"], "method-on-checkpoints"),
        (["--ratio", "0.3", "-o", "small.onnx", "--layout", "native"], "unknown-option"),
        (["--ratio", "0.3", "-o", "small.onnx", "--data", "nowhere.npz"], "no-data"),
        (["--ratio", "0.3", "-o", "small.onnx", "--data", "other.npz"], "bad-data"),
        (["--ratio", "0.3", "-o", "small.onnx", "--data", "text.npy"], "bad-data"),
    ],
)
def test_refusals_leave_nothing(
    words: list[str], code: str, net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(net.parent)
    np.savez("other.npz", y=np.ones(3))
    Path("text.npy").write_text("no array")
    before = sorted(each.name for each in net.parent.iterdir())
    exit_code, told = command(capsys, "prune", "net.onnx", *words)
    assert (exit_code, told["error"]["code"]) == (2, code)
    assert sorted(each.name for each in net.parent.iterdir()) == before


def test_a_file_that_is_wrong_about_its_output_is_at_fault(net: Path) -> None:
    """It runs, but what is written could not pass the ONNX checker."""
    model = onnx.load(str(net))
    last = model.graph.output[0].type.tensor_type.shape.dim[-1]
    last.dim_value += 3
    onnx.save(model, str(net))
    with pytest.raises(SecateurError) as failure:
        secateur.prune(net, method="spa", ratio=0.4, tolerance=0.1, output=net.parent / "new" / "small.onnx")
    assert (failure.value.code, failure.value.exit_code) == ("bad-onnx", 2)
    assert [path.name for path in net.parent.iterdir()] == ["net.onnx"]


def test_a_graph_is_asked_of_files_only(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="no ONNX file"):
        secateur.inspect(tmp_path, graph=True)


def outside(net: Path, location: str, **more: int) -> Path:
    """The model with its first weight said to lie somewhere else."""
    model = onnx.load(str(net))
    tensor = next(t for t in model.graph.initializer if t.name == "first.weight")
    data = tensor.raw_data
    (net.parent / "own.data").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    path = net.with_name("outside.onnx")
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_beside_a_file_are_read(net: Path) -> None:
    model = read_onnx(outside(net, "own.data", offset=0, length=144))
    assert np.array_equal(model.arrays["first.weight"], read_onnx(net).arrays["first.weight"])
    assert model.beside == 144
    for ratio in (0, 0.4):
        small = net.with_name(f"small{ratio}.onnx")
        secateur.prune(outside(net, "own.data"), ratio=ratio, output=small, tolerance=0.1)
        onnx.checker.check_model(str(small), full_check=True)


def test_large_weights_lie_beside_the_output(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do from 1.5 GiB on: one data file, named after its contents; both appear, or none."""
    monkeypatch.setattr(onnx_files, "ONE_FILE", 100)
    small = net.parent / "new" / "small.onnx"
    result = secateur.prune(net, ratio=0.4, output=small, tolerance=0.1)
    files = sorted(each.name for each in small.parent.iterdir())
    assert len(files) == 2
    assert files[1] == "small.onnx"
    assert files[0].startswith("small.")
    assert files[0].endswith(".data")
    assert result.achieved["bytes"] == sum(each.stat().st_size for each in small.parent.iterdir())
    onnx.checker.check_model(str(small), full_check=True)
    session = onnxruntime.InferenceSession(str(small))
    assert session.run(None, {"x": np.ones((3, 3, 8, 8), np.float32)})[0].shape == (3, 4)
    again = secateur.prune(small, ratio=0.1, output=net.with_name("smaller.onnx"), tolerance=0.2)
    assert again.achieved["params_before"] == result.achieved["params"]


@pytest.mark.parametrize(
    "place", ["/etc/hostname", "../secret.data", "inner/../../secret.data", "link.data", "", "no.data"]
)
def test_weights_outside_the_folder_are_refused(place: str, net: Path) -> None:
    folder = net.parent / "folder"
    (folder / "inner").mkdir(parents=True)
    secret = net.parent / "secret.data"
    secret.write_bytes(bytes(144))
    (folder / "link.data").symlink_to(secret)
    path = folder / "outside.onnx"
    path.write_bytes(outside(net, place).read_bytes())
    with pytest.raises(SecateurError) as failure:
        secateur.prune(path, ratio=0.4, output=net.with_name("small.onnx"))
    assert failure.value.code == ("no-weights" if place == "no.data" else "outside-folder")
    assert failure.value.exit_code == 2
    assert not net.with_name("small.onnx").exists()


@pytest.mark.parametrize("told", [{"offset": -4}, {"offset": 2**62}, {"length": 2**40}, {"length": 8}, {"offset": "a"}])
def test_weights_that_are_not_where_they_are_said_to_be(told: dict[str, Any], net: Path) -> None:
    with pytest.raises(SecateurError) as failure:
        read_onnx(outside(net, "own.data", **told))
    assert (failure.value.code, failure.value.exit_code) == ("bad-onnx", 2)


def bytes_only(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def edited(change: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        model = HAND["blocks"]()
        change(model)
        path.write_bytes(model.SerializeToString())

    return write


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**50


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -12


def _bomb(model: onnx.ModelProto) -> None:
    """Four lines that make a tensor of a trillion numbers."""
    sizes = numpy_helper.from_array(np.array([10**4, 10**4, 10**4], dtype=np.int64), "sizes")
    model.graph.initializer.append(sizes)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["sizes"], ["big"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["big"], ["total"], keepdims=0))
    model.graph.output.append(helper.make_tensor_value_info("total", FLOAT, []))


def _wide(model: onnx.ModelProto) -> None:
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    dim.ClearField("dim_param")
    dim.dim_value = 2**40


def _strange(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Nonsense"


def _foreign(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "org.nobody"
    model.opset_import.append(helper.make_opsetid("org.nobody", 1))


def _axis(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Flatten").attribute.append(helper.make_attribute("axis", 99))


def _text(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING


def _nan(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "first.weight")
    tensor.raw_data = struct.pack("<f", float("nan")) * 36


HOSTILE = {
    "empty": bytes_only(b""),
    "text": bytes_only(b"not a model"),
    "pickle": bytes_only(b"\x80\x04\x95" + bytes(100)),
    "nested": bytes_only(b"\x3a\x7f" * 4000),
    "cut off": lambda path: path.write_bytes(HAND["blocks"]().SerializeToString()[:-40]) and None,
    "no nodes": edited(lambda model: model.graph.ClearField("node")),
    "cycle": edited(_cycle),
    "huge dims": edited(_huge),
    "negative dims": edited(_negative),
    "bomb": edited(_bomb),
    "wide input": edited(_wide),
    "unknown operator": edited(_strange),
    "unknown domain": edited(_foreign),
    "bad axis": edited(_axis),
    "text input": edited(_text),
    "not numbers": edited(_nan),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_files_that_mean_harm_are_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, small = tmp_path / "bad.onnx", tmp_path / "small.onnx"
    HOSTILE[kind](path)
    for words in (("prune", path, "--ratio", "0.4", "-o", small), ("inspect", path, "--graph")):
        code, told = command(capsys, *words)
        assert code == 2, told
        assert told["error"]["found"]
    assert [each.name for each in tmp_path.iterdir()] == ["bad.onnx"]


def test_flipped_bytes_never_end_in_a_crash(tmp_path: Path) -> None:
    """A model with any few bytes changed is refused or cut; nothing else happens."""
    clean = HAND["parts"]().SerializeToString()
    generator = np.random.default_rng(0)
    path, codes = tmp_path / "bad.onnx", set()
    for _ in range(40):
        data = bytearray(clean)
        for place in generator.integers(0, len(data), 3):
            data[place] ^= int(generator.integers(1, 256))
        path.write_bytes(bytes(data))
        try:
            secateur.inspect(path, graph=True)
        except SecateurError as error:
            codes.add(error.exit_code)
    assert codes <= {2}


def test_open_sizes_are_found_by_trying(tmp_path: Path) -> None:
    """Sizes that only some values fit; where none does, examples are asked for."""
    for width, runs in ((48, True), (57, False)):
        b = Builder()
        b.add("Reshape", ["x", b.ints("to", 0, 3, width)], "shaped")
        b.add("MatMul", ["shaped", b.weight("w", width, 5)], "y")
        path = tmp_path / "net.onnx"
        onnx.save(b.model({"x": ["n", "m"]}, {"y": ["n", 3, 5]}), str(path))
        if width == 48:
            data = {"x": np.ones((2, 144), np.float32)}
            assert secateur.inspect(path, data=[data])["params"] == 240
        with pytest.raises(SecateurError, match="--data"):
            secateur.inspect(path)
        assert runs or width == 57


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_makers(name: str, tmp_path: Path) -> None:
    """Half of the parameters, or what can go, are cut; the file is written only if it equals the masked original."""
    path = other(name)
    if path is None:
        pytest.skip(f"{name.split('/')[0]} is not installed, and SECATEUR_ONNX_PACKAGES names no folder with it")
    share, shapes = OTHERS[name]
    generator = np.random.default_rng(0)
    integer = next(iter(shapes)) == "bytes"
    data = [
        {n: generator.integers(0, 256, s) if integer else generator.standard_normal(s, np.float32)}
        for n, s in shapes.items()
    ]
    told = secateur.inspect(path, graph=True, data=data)
    assert told["cuttable"] > share
    assert not told["unknown"]
    small = tmp_path / "small.onnx"
    result = secateur.prune(path, ratio=0.5, output=small, data=data)
    assert abs(result.achieved["params"] / result.achieved["params_before"] - 0.5) < 0.02
    assert small.stat().st_size < 0.75 * path.stat().st_size


@pytest.mark.assets
def test_voice_detector(assets: Path) -> None:
    """Its network stands in branches on the sample rate, which are not looked into: refused, with their name."""
    path = assets / "audio" / "silero-vad" / "silero_vad_16k_op15.onnx"
    data = [
        {
            "input": np.zeros((1, 512), np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000, np.int64),
        }
    ]
    told = secateur.inspect(path, graph=True, data=data)
    assert "If" in told["unknown"] or told["cuttable"] > 0
