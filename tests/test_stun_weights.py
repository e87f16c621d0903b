"""``stun`` with both halves: experts first, then single weights of those that stay, in one run."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.engine.journal import work_folder
from secateur.errors import RequestError
from secateur.families import Survivors
from secateur.meters.counts import remaining
from secateur.methods.registry import describe_method, make_method
from secateur.methods.stun import Stun
from test_experts import DATA, block_experts, eight
from test_resume import _PHASES, Clock, Killed, clocked

BOTH = {"weights": "wanda", "experts": 0.25}
LAYOUTS = ("native", "per-layer")


def prune(model: Path, output: Path, notes: Path, options: dict[str, Any], **more: Any) -> secateur.PruneResult:
    return secateur.prune(model, method="stun", options=options, data=notes, output=output, **DATA, **more)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# -- oracles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "owl", "part": "all"},
        {"weights": "sparsegpt", "similarity": "traffic", "representative": "busiest"},
        {"weights": "magnitude", "allocation": "global", "average": 6},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "wanda",
)
def test_one_command_is_two(options: dict[str, Any], layout: str, notes: Path, tmp_path: Path) -> None:
    """The bytes of every tensor are those of removing the experts, and of pruning what that wrote to the same size.

    Bit for bit: the second half runs the same stock model on the same tensors, read through the plan of the first
    instead of from a file.
    """
    model, total = eight(tmp_path / "model"), 0.4
    options = {**BOTH, **options}
    once = prune(model, tmp_path / "once", notes, options, ratio=total, layout=layout)
    first = {key: options[key] for key in ("similarity", "representative", "average") if key in options}
    prune(model, tmp_path / "first", notes, {**first, "sparsity": options["experts"]}, layout=layout)
    second = {key: options[key] for key in ("allocation", "part") if key in options}
    method = options["weights"]
    twice = secateur.prune(
        tmp_path / "first",
        method=method,
        options={"part": "experts", **second, **({"spaces": "weights"} if method == "magnitude" else {})},
        target=[f"params={once.achieved['nonzero']}"],
        data=notes,
        layout=layout,
        output=tmp_path / "twice",
        **DATA,
    )
    assert once.achieved["nonzero"] == twice.achieved["nonzero"]
    found, expected = weights_of(tmp_path / "once"), weights_of(tmp_path / "twice")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("config.json", *(["modeling_secateur.py"] if layout == "per-layer" else [])):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_masks_are_those_of_what_the_smaller_model_sees(notes: Path, tmp_path: Path) -> None:
    """Wanda's rule by hooks on the stock class without the experts: |W| times the norm of what each expert reads.

    Block after block behind the cuts so far, every row of a matrix keeping as many.
    """
    model = eight(tmp_path / "model")
    prune(model, tmp_path / "out", notes, {**BOTH, "sparsity": 0.5})
    prune(model, tmp_path / "experts", notes, {"sparsity": 0.25})
    whole, cut = weights_of(tmp_path / "experts"), weights_of(tmp_path / "out")
    asked = {"model": str(model), "method": "stun", "options": {**BOTH, "sparsity": 0.5}, "data": str(notes), **DATA}
    run = grid.Run(grid.prepare(grid.make_request(asked)), tmp_path / "drawn", grid.Silent())
    assert run.windows is not None
    smaller = models.load(tmp_path / "experts", experts_implementation="eager")
    for block in range(3):
        squares = torch.zeros(6, 48)
        experts, gate = smaller.model.layers[block].mlp.experts, smaller.model.layers[block].mlp.gate

        def see(_: Any, inputs: Any, squares: Tensor = squares) -> None:
            hidden, chosen = inputs[0].reshape(-1, 48), inputs[1].reshape(-1, inputs[1].shape[-1])
            for expert in range(6):
                squares[expert] += hidden[(chosen == expert).any(1)].square().sum(0)

        handle = experts.register_forward_pre_hook(see)
        masking.logits(smaller, run.windows.ids)
        handle.remove()
        assert gate.weight.shape[0] == 6
        place = f"model.layers.{block}.block_sparse_moe.experts"
        for expert in range(6):
            for name in ("w1", "w3"):
                weight = whole[f"{place}.{expert}.{name}.weight"]
                score = weight.abs() * squares[expert].sqrt()
                kept = (cut[f"{place}.{expert}.{name}.weight"] != 0).sum(1)
                found = cut[f"{place}.{expert}.{name}.weight"] != 0
                for row in range(len(weight)):
                    best = set(score[row].topk(int(kept[row])).indices.tolist())
                    assert set(found[row].nonzero().flatten().tolist()) == best
        masking.put(
            smaller, {n: v for n, v in models.load(tmp_path / "out").state_dict().items() if f"s.{block}." in n}
        )


def test_names_before_and_behind_a_cut() -> None:
    survivors = Survivors([0, 2, 5], {2: [1, 3], 5: [0, 4]})
    for before, behind in {
        "stem.embedding.weight": "stem.embedding.weight",
        "blocks.5.q.weight": "blocks.2.q.weight",
        "blocks.2.experts.3.gate.weight": "blocks.1.experts.1.gate.weight",
        "blocks.0.experts.3.gate.weight": "blocks.0.experts.3.gate.weight",
        "blocks.5.experts.shared.up.weight": "blocks.2.experts.shared.up.weight",
    }.items():
        assert survivors.new_name(before) == behind
        assert survivors.old_name(behind) == before
    assert survivors.new_name("blocks.2.experts.0.gate.weight") is None


# -- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["experts", "ffn", "all", "attention"])
def test_the_total_is_exact(part: str, layout: str, notes: Path, tmp_path: Path) -> None:
    """Removed experts and zeros together are what was asked for, to one weight; zeros lie where they may."""
    model, ratio = eight(tmp_path / "model"), 0.2 if part == "attention" else 0.37
    options = {**BOTH, "part": part}
    result = prune(model, tmp_path / "out", notes, options, ratio=ratio, layout=layout)
    achieved = result.achieved
    assert achieved["nonzero"] == achieved["params_before"] - round(ratio * achieved["params_before"])
    assert remaining(achieved) == achieved["nonzero"]
    assert sum(block_experts(tmp_path / "out")) == 18
    foreseen = secateur.preview(model, method="stun", options=options, ratio=ratio, layout=layout)
    assert foreseen["problems"] == []
    assert foreseen["foreseen"] is (layout == "native")
    assert {key: foreseen["achieved"][key] for key in ("params", "nonzero")} == {
        key: achieved[key] for key in ("params", "nonzero")
    }
    holes = {name for name, tensor in weights_of(tmp_path / "out").items() if (tensor == 0).any()}
    inside = {"experts": ["experts"], "ffn": ["experts"], "attention": ["attn"], "all": ["experts", "attn"]}[part]
    assert holes
    assert all(any(word in name for word in inside) for name in holes)
    report = (tmp_path / "out" / "secateur-report.md").read_text()
    assert f"removed or set to zero {ratio:.2%}" in report


def test_half_of_what_goes_is_experts_unless_it_is_said(notes: Path, tmp_path: Path) -> None:
    """The size of the first half alone is the one nearest to half of the target."""
    model = eight(tmp_path / "model")
    for layout in LAYOUTS:
        result = prune(model, tmp_path / layout, notes, {"weights": "wanda"}, ratio=0.4, layout=layout)
        alone = secateur.prune(model, method="stun", ratio=0.2, layout=layout, output=tmp_path / f"{layout}-experts")
        assert result.achieved["params"] == alone.achieved["params"]
        assert result.achieved["nonzero"] == round(0.6 * result.achieved["params_before"])
    few = prune(model, tmp_path / "few", notes, {"weights": "wanda"}, ratio=0.02).achieved
    assert few["params"] == few["params_before"]
    assert few["nonzero"] == round(0.98 * few["params_before"])


def test_the_papers_own_knobs(notes: Path, tmp_path: Path) -> None:
    """1 - (1 - p_e) (1 - p_w) of the experts' weights, without a ratio; or a pattern."""
    model, one = eight(tmp_path / "model"), 3 * 48 * 32
    result = prune(model, tmp_path / "both", notes, {**BOTH, "sparsity": 0.3})
    left = result.achieved["params"] - result.achieved["nonzero"]
    assert left == round(0.3 * 18 * one)
    result = prune(model, tmp_path / "pattern", notes, {**BOTH, "pattern": "2:4"})
    assert result.achieved["params"] - result.achieved["nonzero"] == 18 * one // 2


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ratio", "code"),
    [
        (BOTH, 0.1, "out-of-reach"),  # the experts alone are more
        (BOTH, 0.95, "out-of-reach"),
        ({**BOTH, "part": "attention"}, 0.4, "out-of-reach"),
        ({"weights": "wanda", "sparsity": 0.3}, None, "bad-option"),
        ({"weights": "wanda", "pattern": "2:4"}, None, "bad-option"),
        ({"experts": 0.25}, 0.3, "unknown-option"),
        ({"weights": "owl"}, 0.3, "bad-option"),
        (BOTH, None, "no-target"),
    ],
)
def test_refusals(options: dict[str, Any], ratio: float | None, code: str, notes: Path, tmp_path: Path) -> None:
    model = eight(tmp_path / "model")
    asked = {"method": "stun", "options": options, "ratio": ratio, "data": notes}
    error = grid.refusal(model, tmp_path / "out", asked)
    assert error is not None
    assert (error.exit_code, error.code) == (2, code)
    assert not (tmp_path / "out").exists()
    seen = secateur.preview(model, **{**asked, "data": str(notes)})
    assert [problem["code"] for problem in seen["problems"]] == [code]


def test_zeros_take_no_cache_and_no_time(notes: Path, tmp_path: Path) -> None:
    model = eight(tmp_path / "model")
    for target in ("kv_bytes=50%", "flops=90%"):
        with pytest.raises(RequestError):
            prune(model, tmp_path / "out", notes, BOTH, target=[target])


def test_data_is_needed_by_scores_of_signals(checkpoint: Checkpoints, tmp_path: Path) -> None:
    assert make_method("stun", {"weights": "wanda"}).data == "text"
    assert make_method("stun", {"weights": "magnitude"}).data == "none"
    assert make_method("stun", {"weights": "magnitude", "similarity": "mix"}).data == "text"
    assert type(make_method("stun", {"weights": "none"})) is Stun
    error = grid.refusal(checkpoint("mixtral"), tmp_path / "out", {"method": "stun", "ratio": 0.3, "options": BOTH})
    assert error is not None
    assert error.code == "no-data"
    (both,) = describe_method("stun")["variants"].values()
    assert both["output"] == "dense-zeros"


def test_matrices_of_experts_are_a_part(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Of any method of single weights; a model without experts has none."""
    options = {"part": "experts", "spaces": "weights"}
    secateur.prune(checkpoint("qwen2_moe"), method="magnitude", ratio=0.1, options=options, output=tmp_path / "out")
    holes = [name for name, tensor in weights_of(tmp_path / "out").items() if (tensor == 0).any()]
    assert holes
    assert all(".experts." in name for name in holes)
    error = grid.refusal(checkpoint(), tmp_path / "no", {"method": "magnitude", "ratio": 0.1, "options": options})
    assert error is not None
    assert (error.exit_code, error.code) == (2, "bad-option")


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_every_family_of_experts(family: str, tmp_path: Path) -> None:
    """Every behaviour of the grid; both layouts."""
    for layout in LAYOUTS:
        cell = grid.Cell(family, "stun", grid._Frozen(weights="wanda"), layout)
        folder = tmp_path / layout
        folder.mkdir()
        assert grid.run_cell(cell, folder) == "ok"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed(layout: str, notes: Path, tmp_path: Path) -> None:
    """Packed on disk it takes what was foreseen and loads as what it is unpacked."""
    model, options = eight(tmp_path / "model"), {**BOTH, "part": "all"}
    asked = {"options": options, "ratio": 0.6, "layout": layout}
    prune(model, tmp_path / "dense", notes, **asked)
    result = prune(model, tmp_path / "packed", notes, format="bitmask", **asked)
    foreseen = secateur.preview(model, method="stun", format="bitmask", **asked)["achieved"]["bytes"]
    assert abs(foreseen - result.achieved["bytes"]) < 400 * len(weights_of(tmp_path / "dense"))
    assert result.achieved["bytes"] < 0.8 * 4 * result.achieved["params"]
    secateur.unpack(tmp_path / "packed", tmp_path / "unpacked")
    found, expected = weights_of(tmp_path / "unpacked"), weights_of(tmp_path / "dense")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def straight(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], int]:
    """A model, the files of an undisturbed run, and how often the clock ticks in it."""
    folder, clock = tmp_path_factory.mktemp("straight"), Clock()
    model = eight(folder / "model")
    with clocked(clock):
        prune(model, folder / "out", notes, {**BOTH, **_OPTIONS}, ratio=0.4, layout="per-layer")
    return model, grid.hashes(folder / "out", *grid.TIMED), clock.now


_OPTIONS = {"similarity": "traffic", "allocation": "owl", "average": 6}


@settings(max_examples=6, phases=_PHASES, deadline=None)
@given(data=st.data())
def test_killed_at_random_points(notes: Path, straight: tuple[Path, dict[str, str], int], data: st.DataObject) -> None:
    """Killed in either half and run again, the bytes are those of a run that was never disturbed."""
    model, wanted, ticks = straight
    kills = data.draw(st.lists(st.integers(1, ticks), min_size=1, max_size=2), label="kills")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        asked: dict[str, Any] = {"ratio": 0.4, "layout": "per-layer"}
        for kill in kills:
            if out.exists():
                break
            with clocked(Clock(kill)), suppress(Killed):
                prune(model, out, notes, {**BOTH, **_OPTIONS}, **asked)
        prune(model, out, notes, {**BOTH, **_OPTIONS}, force=True, **asked)
        assert grid.hashes(out, *grid.TIMED) == wanted
        assert not work_folder(out).exists()


def test_the_record_tells_both_halves(notes: Path, tmp_path: Path) -> None:
    prune(eight(tmp_path / "model"), tmp_path / "out", notes, BOTH, ratio=0.4)
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["method"] == "stun"
    assert {"clusters", "threshold", "weights"} <= set(record["notes"])
    assert record["requested"]["options"]["weights"] == "wanda"
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "experts: 0.25" in recipe
