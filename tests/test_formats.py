"""Packed checkpoints: exact to the bit, never larger, read as any other folder, refused when damaged."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.api import pruning
from secateur.checkpoints import Checkpoint, Folder
from secateur.checkpoints.folder import DTYPES
from secateur.checkpoints.forms import Bitmask, Gaps, Pattern, bound, foreseen, measure, name_of
from secateur.checkpoints.packed import bits_of, tensor_of
from secateur.checkpoints.patterns import (
    digits_of,
    pack_digits,
    pack_fields,
    pattern_bytes,
    rank,
    unpack_digits,
    unpack_fields,
    unrank,
)
from secateur.cli import main
from secateur.engine import packing
from secateur.engine.journal import work_folder
from secateur.engine.packing import foreseen_bytes
from secateur.errors import RequestError
from secateur.runtimes import semi_structured
from secateur.spaces.weights import all_matrices
from test_errors import run
from test_resume import _PHASES, Clock, Killed, clocked

_ODD = {2: (0x8000, 0x7FC1, 0xFFFF), 4: (0x80000000, 0x7FC00001, 0xFFFFFFFF), 8: (1 << 63, 0x7FF8000000000001, 1)}
"""Bits of -0.0 and of NaNs, of 2, 4 and 8 bytes."""


def bits(shape: tuple[int, ...], density: float, size: int, seed: int) -> np.ndarray:
    """Random bits with a share of non-zeros, -0.0 and NaN payloads among them."""
    generator = np.random.default_rng(seed)
    count = math.prod(shape)
    values = generator.integers(1, 1 << (8 * size - 1), count, dtype=np.uint64)
    odd = generator.random(count) < 0.1
    values[odd] = generator.choice(np.array(_ODD[size], np.uint64), int(odd.sum()))
    return np.where(generator.random(count) < density, values, 0).astype(f"u{size}")


def grouped(shape: tuple[int, int], keep: int, of: int, axis: int, seed: int = 0) -> np.ndarray:
    """Bits of 16 with exactly ``keep`` non-zeros in every group of ``of`` along an axis."""
    generator = np.random.default_rng(seed)
    rows, columns = shape if axis == -1 else shape[::-1]
    there = generator.random((rows, columns // of, of)).argsort(-1) < keep
    found = np.where(there, generator.integers(1, 1 << 15, there.shape), 0).astype("u2").reshape(rows, columns)
    return np.ascontiguousarray(found if axis == -1 else found.T).reshape(-1)


# -- forms -------------------------------------------------------------------------------------------------------------


@given(width=st.integers(1, 63), count=st.integers(0, 40), seed=st.integers(0, 2**32))
def test_fields(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count, dtype=np.uint64)
    packed = pack_fields(values, width)
    assert len(packed) == -(-count * width // 8)
    assert np.array_equal(unpack_fields(packed, width, count), values)


def test_many_fields() -> None:
    """More than are packed at a time."""
    values = np.random.default_rng(0).integers(0, 1 << 13, 100_001, dtype=np.uint64)
    assert np.array_equal(unpack_fields(pack_fields(values, 13), 13, len(values)), values)


@pytest.mark.parametrize(("keep", "of"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 8), (2, 5), (3, 3)])
def test_patterns_are_numbered(keep: int, of: int) -> None:
    """Every pattern has a number of its own, and none is left over."""
    every = np.array([[int(c) for c in f"{i:0{of}b}"] for i in range(1 << of)])
    places = np.array([np.flatnonzero(row) for row in every if row.sum() == keep])
    numbers = rank(places, of)
    assert sorted(numbers.tolist()) == list(range(math.comb(of, keep)))
    assert np.array_equal(unrank(numbers, keep, of), places)
    together, width = digits_of(math.comb(of, keep))
    assert width <= max(1, math.ceil(math.log2(math.comb(of, keep)))) * together
    assert np.array_equal(unpack_digits(pack_digits(numbers, 1000), 1000, len(numbers)), numbers)


@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12, 32, 64]), max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]),
    size=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_forms_are_exact_and_never_larger(shape: list[int], density: float, size: int, seed: int) -> None:
    """Whatever is chosen gives the bits back; the other forms of the same tensor do so too."""
    whole = tuple(shape)
    given = bits(whole, density, size, seed)
    form, nonzeros = measure(given, whole)
    assert nonzeros == np.count_nonzero(given)
    forms = [Bitmask(shape=whole)] + [form] * (form is not None)
    for each in forms:
        values, where = each.encode(given)
        assert (len(values), len(where)) == (each.stored(nonzeros), each.where)
        assert np.array_equal(each.decode(values, where), given)
        if each is form:
            assert values.nbytes + where.nbytes < given.nbytes
            assert values.nbytes + where.nbytes >= math.floor(bound(form, given.size, nonzeros, size))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8), (3, 8), (8, 16), (16, 32)])
def test_patterns_are_found(keep: int, of: int, axis: int) -> None:
    """The smallest group that shows the pattern, along the inputs of [out, in] and of [in, out] matrices."""
    shape = (96, 160)
    given = grouped(shape, keep, of, axis)
    form, nonzeros = measure(given, shape)
    assert isinstance(form, Pattern)
    assert (form.keep, form.of, form.axis) == (keep, of, axis)
    values, where = form.encode(given)
    assert np.array_equal(form.decode(values, where), given)
    best = bound(form, given.size, nonzeros, 2)
    assert best <= values.nbytes + where.nbytes < 1.01 * best + 8
    given.reshape(shape)[:, :7] = 0  # fewer than N is a pattern too
    values, where = form.encode(given)
    assert np.array_equal(form.decode(values, where), given)


@pytest.mark.parametrize(
    ("density", "name"),
    [(0.0, "gaps"), (0.003, "gaps"), (0.1, "gaps"), (0.5, "bitmask"), (0.8, "bitmask"), (1, "dense")],
)
def test_large_tensors(density: float, name: str) -> None:
    """More than one piece; near the bound at every density."""
    shape = (1 << 11, 1200)
    given = bits(shape, density, 4, 1)
    form, nonzeros = measure(given, shape)
    assert name_of(form) == name
    if form is None:
        return
    values, where = form.encode(given)
    assert np.array_equal(form.decode(values, where), given)
    size = values.nbytes + where.nbytes
    assert size <= 1.02 * bound(form, given.size, nonzeros, 4) + given.size / 255 + 8
    assert abs(size - foreseen(given.size, nonzeros, 4)) < 0.01 * size + given.size / 255 + 8
    if density == 0.003:
        given[100 : 1 << 21] = 0  # a gap longer than a piece
        form, _ = measure(given, shape)
        assert isinstance(form, Gaps)
        assert np.array_equal(form.decode(*form.encode(given)), given)


@given(
    kind=st.sampled_from(["bitmask", "gaps", "pattern"]),
    cut=st.sampled_from(["values", "more", "where", "ones"]),
    seed=st.integers(0, 2**16),
)
def test_damaged_forms_are_refused(kind: str, cut: str, seed: int) -> None:
    """A number of values, places or elements that does not fit is an error, or gives a tensor of the shape said."""
    shape = (12, 32)
    given = bits(shape, 0.15, 2, seed) if kind != "pattern" else grouped(shape, 2, 4, -1, seed)
    forms = {
        "bitmask": Bitmask(shape=shape),
        "pattern": Pattern(shape=shape, keep=2, of=4, axis=-1),
        "gaps": measure(given, shape)[0],
    }
    form = forms[kind]
    assert form is not None
    values, where = form.encode(given)
    if cut == "values":
        values = values[:-1]
    elif cut == "more":
        values = np.concatenate([values, values[:1]])
    elif cut == "where":
        where = where[::-1].copy()
    else:
        where = np.full_like(where, 0xFF)
    try:
        found = form.decode(values, where)
    except ValueError:
        return
    assert cut in ("where", "ones")
    assert found.size == math.prod(shape)


# -- folders -----------------------------------------------------------------------------------------------------------


def zeroed(folder: Path, share: float | str) -> Path:
    """Zero the smallest weights of every matrix of a checkpoint's blocks, or those that make it 2:4; in place."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or "embed" in name or name == "lm_head.weight":
                continue
            if isinstance(share, float):
                tensor[tensor.abs() <= tensor.abs().float().quantile(share)] = 0
            else:
                groups = tensor.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sparse(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints with zeros."""
    made: dict[tuple[str, float | str], Path] = {}

    def get(name: str = "llama", share: float | str = 0.6) -> Path:
        if (name, share) not in made:
            folder = tmp_path_factory.mktemp("sparse") / name
            shutil.copytree(checkpoint(name), folder)
            made[name, share] = zeroed(folder, share)
        return made[name, share]

    return get


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(Folder(folder).read(Folder(folder).headers))


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape
        and found[n].flatten().view(torch.uint8).equal(t.flatten().contiguous().view(torch.uint8))
        for n, t in wanted.items()
    )  # fmt: skip


@given(
    drawn=st.lists(
        st.tuples(
            st.sampled_from(list(DTYPES)),
            st.lists(st.sampled_from([0, 1, 3, 8, 64]), max_size=3),
            st.sampled_from([0.0, 0.05, 0.5, 1.0]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=40)
def test_any_tensors(drawn: list[tuple[str, list[int], float, int]]) -> None:
    """Tensors of every type and shape in one file or several: packed, read, unpacked, all to the bit."""
    files: dict[str, dict[str, Tensor]] = {}
    for i, (dtype, shape, density, file) in enumerate(drawn):
        tensor = (torch.rand(shape) < density).to(DTYPES[dtype])
        if tensor.is_floating_point():
            tensor = tensor_of(bits(tuple(shape), density, tensor.element_size(), i), tensor.dtype).view(shape)
        files.setdefault(f"model-{file}.safetensors", {})[f"t{i}"] = tensor
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary) / "dense"
        dense.mkdir()
        (dense / "config.json").write_text('{"model_type": "llama"}')
        for file, tensors in files.items():
            save_file(tensors, dense / file, {"format": "pt"})
        names = {name: file for file, tensors in files.items() for name in tensors}
        (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        packed, out = Path(temporary) / "packed", Path(temporary) / "out"
        accounts = secateur.pack(dense, packed, form="sparse")["packed"]
        assert not list(packed.glob("model*"))
        assert accounts["bytes"] == sum(path.stat().st_size for path in packed.glob("*.safetensors"))
        assert accounts["dense_bytes"] == sum(path.stat().st_size for path in dense.glob("*.safetensors"))
        assert accounts["bytes"] <= accounts["dense_bytes"] + 120 * len(files)  # the record of each file
        assert Folder(packed).headers == Folder(dense).headers
        secateur.unpack(packed, out)
        wanted = tensors_of(dense)
        assert same_bits(tensors_of(packed), wanted)
        assert same_bits(tensors_of(out), wanted)
        assert Folder(packed).dense_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "share"),
    [("llama", 0.6), ("llama", "2:4"), ("sharded", 0.9), ("gpt2-bare", 0.6), ("tied-repeated", 0.6), ("mixtral", 0.6)],
)
def test_a_packed_folder_is_one_like_any_other(
    name: str, share: float | str, sparse: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    """The same figures, logits and tensors, fewer bytes; transformers refuses it, and takes what is unpacked."""
    dense, packed, out = sparse(name, share), tmp_path / "packed", tmp_path / "out"
    result = secateur.pack(dense, packed, form="sparse")
    assert result["bytes"] < 0.9 * result["packed"]["dense_bytes"]
    assert result["packed"]["bound_bytes"] <= result["bytes"]
    assert set(result["packed"]["forms"]) == {"dense", {0.6: "bitmask", "2:4": "2:4", 0.9: "gaps"}[share]}
    assert sum(facts["tensors"] for facts in result["packed"]["forms"].values()) == len(Folder(dense).headers)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(packed, local_files_only=True)
    figures = secateur.evaluate(packed, text=held_out, against=dense)
    assert figures["perplexity"] == figures["against"]["perplexity"]
    assert figures["bytes"] == result["bytes"]
    assert {**secateur.inspect(packed), "bytes": 0} == {**secateur.inspect(dense), "bytes": 0}
    ids = models.token_ids()
    with torch.no_grad():
        wanted = models.load(dense)(ids).logits
        assert secateur.load(packed).eval()(ids).logits.equal(wanted)
    secateur.unpack(packed, out)
    assert grid.hashes(out).keys() == grid.hashes(dense).keys()
    assert same_bits(tensors_of(out), tensors_of(dense))
    with torch.no_grad():
        assert models.load(out)(ids).logits.equal(wanted)
    assert {p: h for p, h in grid.hashes(out).items() if "safetensors" not in p} == {
        p: h for p, h in grid.hashes(dense).items() if "safetensors" not in p
    }


def test_generation_settings_come_along(sparse: Callable[..., Path], tmp_path: Path) -> None:
    dense = shutil.copytree(sparse(), tmp_path / "dense")
    (dense / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "do_sample": False}))
    secateur.pack(dense, tmp_path / "packed", form="sparse")
    model: Any = secateur.load(tmp_path / "packed", dtype=torch.bfloat16)
    assert model.generation_config.max_new_tokens == 7
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == str(tmp_path / "packed")


def test_prune_of_a_packed_folder(sparse: Callable[..., Path], notes: Path, tmp_path: Path) -> None:
    """The same bytes as from the dense folder, under the dense names; a copy stays packed and says so."""
    dense, packed = sparse("sharded"), tmp_path / "packed"
    secateur.pack(dense, packed, form="sparse")
    request: dict[str, Any] = {"method": "fasp", "ratio": 0.15, "data": notes, "samples": 8, "length": 16}
    ours = secateur.prune(packed, output=tmp_path / "a", **request)
    theirs = secateur.prune(dense, output=tmp_path / "b", **request)
    assert same_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    weights = [grid.hashes(tmp_path / name) for name in "ab"]
    assert {k: v for k, v in weights[0].items() if "safetensors" in k} == {
        k: v for k, v in weights[1].items() if "safetensors" in k
    }
    assert ours.achieved["bytes"] == theirs.achieved["bytes"]
    assert ours.achieved["bytes_before"] < theirs.achieved["bytes_before"]
    foreseen = [secateur.preview(model, **request)["achieved"] for model in (packed, dense)]
    assert foreseen[0]["bytes"] == foreseen[1]["bytes"]
    assert foreseen[0]["bytes_before"] == ours.achieved["bytes_before"]
    copied = secateur.prune(packed, output=tmp_path / "c", ratio=0)
    assert grid.hashes(tmp_path / "c") == grid.hashes(packed)
    assert copied.loads_in["transformers"].startswith("no")


# -- prune --format bitmask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "per-layer"])
def test_prune_to_packed(layout: str, sparse: Callable[..., Path], notes: Path, held_out: Path, tmp_path: Path) -> None:
    """Tensors, sizes and perplexity are those of the dense output; bytes are counted from the packed files."""
    request: dict[str, Any] = {"method": "random", "ratio": 0.15, "layout": layout, "text": held_out}
    if layout == "per-layer":
        request |= {"method": "flap", "data": notes, "samples": 8, "length": 16}
    dense = secateur.prune(sparse(), output=tmp_path / "dense", **request)
    packed = secateur.prune(sparse(), output=tmp_path / "packed", format="bitmask", **request)
    assert not (tmp_path / "packed").joinpath("model.safetensors").exists()
    size = (tmp_path / "packed" / "packed.safetensors").stat().st_size
    assert packed.achieved == {**dense.achieved, "bytes": size}
    assert packed.perplexity == dense.perplexity
    assert size < dense.achieved["bytes"]
    told = packed.as_dict()["packed"]
    assert (told["bytes"], told["dense_bytes"]) == (size, dense.achieved["bytes"])
    assert "packed" not in dense.as_dict()
    assert packed.loads_in["transformers"] == packed.loads_in["vllm"] == "no (secateur unpack)"
    assert packed.loads_in["secateur"].startswith("verified(")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "secateur unpack" in card
    assert "| stored as |" in (tmp_path / "packed" / "secateur-report.md").read_text()
    secateur.unpack(tmp_path / "packed", tmp_path / "out")
    records = [json.loads((tmp_path / name / "secateur.json").read_text()) for name in ("dense", "out")]
    assert records[1].pop("requested") == {**records[0].pop("requested"), "format": "bitmask"}
    assert records[0] == records[1]
    names = [n for n in grid.hashes(tmp_path / "dense") if n.endswith("safetensors") or n == "config.json"]
    assert all(grid.hashes(tmp_path / "out")[n] == grid.hashes(tmp_path / "dense")[n] for n in names)


def test_a_module_in_memory_can_be_packed(checkpoint: Checkpoints) -> None:
    model = models.load(checkpoint())
    result = secateur.prune(model, method="random", ratio=0.15, format="bitmask")
    assert type(result.model) is type(model)
    assert result.packed is not None


def test_recovery_of_a_packed_folder(sparse: Callable[..., Path], notes: Path, tmp_path: Path) -> None:
    """What is trained is written dense, under the dense names."""
    pytest.importorskip("peft")
    secateur.prune(sparse("sharded"), output=tmp_path / "packed", **_TO_PACKED)
    result = secateur.recover(tmp_path / "packed", data=notes, output=tmp_path / "out", steps=1, length=16)
    assert not list((tmp_path / "out").glob("packed*"))
    assert Folder(tmp_path / "out").headers == Folder(tmp_path / "packed").headers
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert "packed" not in record
    assert result.loads_in["transformers"].startswith("verified(")


_TO_PACKED: dict[str, Any] = {"method": "magnitude", "ratio": 0.15, "format": "bitmask"}


@pytest.fixture(scope="module")
def straight(sparse: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Hashes of the files of an undisturbed run, and ticks of the clock in it."""
    out, clock = tmp_path_factory.mktemp("straight") / "out", Clock()
    with clocked(clock):
        secateur.prune(sparse("sharded"), output=out, **_TO_PACKED)
    return grid.hashes(out, *grid.TIMED), clock.now


@settings(max_examples=12, phases=_PHASES)
@given(data=st.data())
def test_killed_while_packing(
    sparse: Callable[..., Path], straight: tuple[dict[str, str], int], data: st.DataObject
) -> None:
    """Killed anywhere, most often while packing, the same command finishes with the same bytes."""
    wanted, ticks = straight
    kills = data.draw(st.lists(st.integers(ticks // 3, ticks), min_size=1, max_size=2), label="kills")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        for kill in kills:
            if out.exists():
                break
            with clocked(Clock(kill)), suppress(Killed):
                secateur.prune(sparse("sharded"), output=out, **_TO_PACKED)
        secateur.prune(sparse("sharded"), output=out, force=True, **_TO_PACKED)
        assert grid.hashes(out, *grid.TIMED) == wanted
        assert not work_folder(out).exists()


def test_a_packed_file_is_not_believed_blindly(
    sparse: Callable[..., Path], straight: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    """Bytes lost between two runs are packed again; what is whole is not."""
    out = tmp_path / "out"
    with mock.patch.object(pruning, "write_card", side_effect=Killed), pytest.raises(Killed):
        secateur.prune(sparse("sharded"), output=out, **_TO_PACKED)
    packer = mock.Mock(wraps=packing.pack_folder)
    with (
        mock.patch.object(packing, "pack_folder", packer),
        mock.patch.object(pruning, "write_card", side_effect=Killed),
        pytest.raises(Killed),
    ):
        secateur.prune(sparse("sharded"), output=out, **_TO_PACKED)
    assert packer.call_count == 0
    file = sorted((work_folder(out) / "packed").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    secateur.prune(sparse("sharded"), output=out, **_TO_PACKED)
    assert grid.hashes(out, *grid.TIMED) == straight[0]


# -- refusals ----------------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the record and the tensors of a packed file."""

    def damage(folder: Path) -> None:
        path = folder / "packed.safetensors"
        with safe_open(path, framework="pt") as handle:
            record = json.loads(handle.metadata()["secateur_packed"])
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(record, tensors)
        save_file(tensors, path, {"format": "pt", "secateur_packed": json.dumps(record)})

    return damage


def shaped(*shape: int) -> Callable[[Path], None]:
    return rewritten(lambda record, _: next(iter(record["tensors"].values())).update(shape=list(shape)))


def parts(change: Callable[[dict[str, Tensor], str], object]) -> Callable[[Path], None]:
    return rewritten(lambda record, tensors: change(tensors, next(iter(record["tensors"]))))


def truncated(folder: Path) -> None:
    path = folder / "packed.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unmarked(folder: Path) -> None:
    path = folder / "packed.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


def misnamed(folder: Path) -> None:
    (folder / "packed.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../packed.safetensors"}}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "truncated or damaged"),
    "no record": (unmarked, "does not say how it is packed"),
    "strange version": (rewritten(lambda r, _: r.update(version=9)), "version"),
    "strange form": (rewritten(lambda r, _: next(iter(r["tensors"].values())).update(form="zip")), "zip"),
    "file outside": (rewritten(lambda r, _: r.update(file="../model.safetensors")), "leaves the folder"),
    "file of the system": (rewritten(lambda r, _: r.update(file="/model.safetensors")), "leaves the folder"),
    "index outside": (misnamed, "leaves the folder"),
    "negative size": (shaped(-4, 4), "shape"),
    "huge size": (shaped(2**40, 2**40), "does not fit what is stored"),
    "huge numbers": (shaped(10**400), "does not fit what is stored"),
    "other size": (shaped(32, 32), "does not fit what is stored"),
    "lost part": (parts(lambda t, name: t.pop(f"{name}:where")), "is not in it"),
    "lost value": (parts(lambda t, name: t.update({f"{name}:values": t[f"{name}:values"][:-1]})), "values for another"),
    "places gone": (parts(lambda t, name: t[f"{name}:where"].zero_()), "values for another"),
    "places of another type": (
        parts(lambda t, name: t.update({f"{name}:where": t[f"{name}:where"].short()})),
        "does not fit what is stored",
    ),
    "values of another type": (
        parts(lambda t, name: t.update({f"{name}:values": t[f"{name}:values"].int()})),
        "does not fit what is stored",
    ),
    "twice": (parts(lambda t, name: t.update({name: torch.zeros(2)})), "does not fit what is stored"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["unpack", "evaluate", "prune"])
def test_damaged_folders_are_refused(
    damage: str, command: str, sparse: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, a message that names it, and nothing written."""
    folder, out = tmp_path / "packed", tmp_path / "out"
    secateur.pack(sparse(), folder, form="sparse")
    change, message = DAMAGES[damage]
    change(folder)
    words = {
        "unpack": ["unpack", str(folder), "-o", str(out)],
        "evaluate": ["evaluate", str(folder)],
        "prune": ["prune", str(folder), "-o", str(out), "--method", "magnitude", "--ratio", "0.1"],
    }[command]
    code, _, told = run(words, capsys)
    assert code == 2
    assert message in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed"]


def test_a_size_that_no_file_holds() -> None:
    """Codes for gaps cannot ask for more than 255 elements each."""
    shape = (1 << 20, 1 << 20)
    with pytest.raises(ValueError, match="add up to 0 elements"):
        Gaps(shape=shape, width=8, codes=0).decode(np.zeros(0, "u2"), np.zeros(0, np.uint8))
    assert pattern_bytes(math.prod(shape) // 32, 1, 32) > 2**34


def test_no_room_on_the_disk(sparse: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secateur.pack(sparse(), tmp_path / "packed", form="sparse")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RequestError, match="1,000 are free"):
        secateur.unpack(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unpack", "{dense}", "-o", "{out}"], "not packed"),
        (["unpack", "{dense}", "-o", "{dense}", "--force"], "own folder"),
        (["pack", "{dense}", "-o", "{dense}", "--force", "--form", "sparse"], "own folder"),
        (["pack", "{dense}", "-o", "{out}", "--form", "sprase"], "did you mean sparse"),
        (["prune", "{dense}", "-o", "{out}", "--ratio", "0", "--format", "bitmask"], "secateur pack"),
        (["prune", "{dense}", "-o", "{out}", "--ratio", "0.2", "--format", "zip"], "format"),
        (["preview", "{dense}", "--ratio", "0", "--format", "bitmask", "--json"], "secateur pack"),
    ],
)
def test_refusals(
    words: list[str], message: str, sparse: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, shown, told = run([word.format(dense=sparse(), out=out) for word in words], capsys)
    assert code == 2
    assert message in told + shown
    assert not list(tmp_path.iterdir())


def test_commands(sparse: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables for people: bytes by form, beside dense ones and the bound."""
    code, shown, _ = run(["pack", str(sparse()), "-o", str(tmp_path / "p"), "--form", "sparse"], capsys)
    assert code == 0
    assert all(word in shown for word in ("bitmask", "dense bytes", "bound", "files"))
    code, shown, _ = run(["unpack", str(tmp_path / "p"), "-o", str(tmp_path / "u"), "--json"], capsys)
    assert code == 0
    assert set(json.loads(shown)) == {"output", "form", "bytes", "packed_bytes", "tensors", "seconds"}
    words = ["prune", str(sparse()), "-o", str(tmp_path / "q"), "--method", "random", "--ratio", "0.1"]
    code, shown, told = run([*words, "--format", "bitmask"], capsys)
    assert code == 0
    assert "bound" in shown
    assert "zeros take no bytes" in " ".join(told.split())
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    assert "sparse" in capsys.readouterr().out


def test_what_is_foreseen(sparse: Callable[..., Path], tmp_path: Path) -> None:
    """Bytes from headers alone are those that zeros of that number take, but for the files' headers."""
    for share, pattern in ((0.6, None), ("2:4", (2, 4))):
        checkpoint = Checkpoint.open(sparse("llama", share))
        tensors = tensors_of(checkpoint.folder.path)
        matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2 and "layers" in name]
        zeros = sum(int((tensors[name] == 0).sum()) for name in matrices)
        found = secateur.pack(checkpoint.folder.path, tmp_path / str(share), form="sparse")["packed"]
        among = [matrix.name for matrix in all_matrices(checkpoint.architecture)]
        assert abs(found["bytes"] - foreseen_bytes(checkpoint, zeros, among, pattern)) < 400 * len(matrices)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "1:8", "part": "ffn"}, {"sparsity": 0.95}]
)
def test_weights_pruned_one_by_one(
    options: dict[str, Any], checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preview foresees the bytes of the packed files; N:M zeros are found again and stored as such."""
    request = {"method": "magnitude", "options": {"spaces": "weights", **options}, "format": "bitmask"}
    seen = secateur.preview(checkpoint(), **request)
    made = secateur.prune(checkpoint(), output=tmp_path / "out", **request)
    assert made.packed is not None
    tensors = len(Folder(checkpoint()).headers)
    assert abs(made.achieved["bytes"] - seen["achieved"]["bytes"]) < 300 * tensors
    assert seen["achieved"]["nonzero"] == made.achieved["nonzero"]
    assert made.achieved["bytes"] < made.packed["dense_bytes"]
    names = {"2:4": "2:4", "1:8": "1:8"}
    assert (
        names.get(options.get("pattern", ""), "gaps" if options.get("sparsity") == 0.95 else "bitmask")
        in (made.packed["forms"])
    )
    words = [f"{key}={value}" for key, value in request["options"].items()]  # type: ignore[attr-defined]
    flags = [word for each in words for word in ("--set", each)]
    code, shown, _ = run(["preview", str(checkpoint()), "--method", "magnitude", *flags, "--format", "bitmask"], capsys)
    assert code == 0
    assert "zeros take no bytes" in " ".join(shown.split())


# -- 2:4 on a GPU ------------------------------------------------------------------------------------------------------


def linear(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    """A layer with the larger two of every four inputs."""
    layer = torch.nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    groups = layer.weight.view(-1, 4)
    groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    return layer


def test_which_layers_can_run_sparse() -> None:
    dense = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    layers = [linear(32, 64), linear(64, 128, torch.float16), linear(32, 64, torch.float32), linear(33, 64)]
    layers += [linear(32, 96), dense]
    assert semi_structured.eligible(torch.nn.Sequential(*layers)) == ["0", "1"]


def test_zeros_do_not_speed_up_a_cpu(sparse: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="zeros do not speed anything up"):
        secateur.load(sparse("llama", "2:4"), sparse="2:4")
    with pytest.raises(RequestError, match="no machine skips zeros"):
        secateur.load(sparse("llama", "2:4"), sparse="4:8")
    monkeypatch.setattr(semi_structured, "require_device", lambda _: None)
    with pytest.raises(RequestError, match="no linear layer is 2:4"):
        semi_structured.run_sparse(models.load(sparse()), torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_sparse_layers_compute_the_same() -> None:
    layer = linear(128, 256)
    signal = torch.randn(16, 256, dtype=torch.bfloat16)
    model = torch.nn.Sequential(linear(128, 256))
    model[0].load_state_dict(layer.state_dict())
    assert semi_structured.run_sparse(model, torch.device("cuda")) == ["0"]
    assert torch.allclose(model(signal.cuda()).float().cpu(), layer(signal).float(), atol=0.05)


def test_bits_are_shared() -> None:
    """Reading bits copies nothing, and they make the same tensor again."""
    tensor = torch.tensor([0.0, -0.0, float("nan"), 1.5], dtype=torch.bfloat16)
    found = bits_of(tensor)
    assert [int(b) for b in found[:2]] == [0, 0x8000]
    assert tensor_of(found, tensor.dtype).data_ptr() == tensor.data_ptr()
