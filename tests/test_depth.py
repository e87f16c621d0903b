"""Block influence and the greedy search over blocks and branches, against direct computations on the stock model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import grid
import models
import secateur
from conftest import Checkpoints
from secateur.cli import main
from secateur.engine.journal import Journal
from secateur.engine.trials import CalibrationTrials
from secateur.evidence import Influence
from secateur.methods.blockpruner import BlockPruner
from secateur.scores.depth import run_distances

DOUBLE = torch.float64
SILENT = 1


def _idle(folder: Path, layers: tuple[int, ...] = (SILENT,), count: int = 5) -> Path:
    """A llama some of whose layers add nothing to the stream."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        idle = tuple(f"model.layers.{i}.{w}.weight" for i in layers for w in ("self_attn.o_proj", "mlp.down_proj"))
        return {key: tensor * (key not in idle) for key, tensor in tensors.items()}

    return models.save(folder, "llama", DOUBLE, edit=edit, num_hidden_layers=count)


def _request(notes: Path, method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "ratio": 0.12, "data": notes, "samples": 8, "length": 16, **more}


def _notes(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "secateur.json").read_text())["notes"]
    return found


@pytest.mark.parametrize("metric", ["cosine", "angular", "relative"])
def test_a_block_that_does_nothing_goes_first_and_changes_nothing(metric: str, notes: Path, tmp_path: Path) -> None:
    model = _idle(tmp_path / "model")
    secateur.prune(model, output=tmp_path / "out", **_request(notes, "shortgpt", options={"metric": metric}))
    found = _notes(tmp_path / "out")
    assert found["removed"] == [SILENT]
    assert found["influence"][SILENT] == pytest.approx(0, abs=1e-6)
    dense, cut = (models.load(folder, dtype=DOUBLE) for folder in (model, tmp_path / "out"))
    ids = models.token_ids()
    assert torch.allclose(dense(input_ids=ids).logits, cut(input_ids=ids).logits, atol=1e-9)
    _generates(cut, ids)


def _generates(model: Any, ids: Tensor) -> None:
    """The same tokens with the cache and without."""
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with_cache = model.generate(ids[:1, :8], use_cache=True, **wanted)
    assert torch.equal(with_cache, model.generate(ids[:1, :8], use_cache=False, **wanted))
    assert with_cache.shape[1] == 14


def test_influence_is_that_of_the_raw_stream(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Of the last block too, behind which transformers' hidden states are normed already (released code)."""
    secateur.prune(checkpoint("llama", DOUBLE), output=tmp_path / "out", **_request(notes, "shortgpt", ratio=0.25))
    plan, ids = _calibration(checkpoint("llama", DOUBLE), notes, tmp_path)
    model = models.load(checkpoint("llama", DOUBLE), dtype=DOUBLE)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, i, o: seen.append((i[0], o[0] if isinstance(o, tuple) else o)))
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = [_influence(*pair) for pair in seen]
    assert plan["influence"] == pytest.approx(expected, abs=2e-6)
    assert abs(_influence(hidden[-2], hidden[-1]) - expected[-1]) > 1e-3


def _influence(before: Tensor, after: Tensor) -> float:
    one, other = before[:, 1:].flatten(0, 1), after[:, 1:].flatten(0, 1)
    return float((1 - torch.nn.functional.cosine_similarity(one, other)).mean())


def _calibration(model: Path, notes: Path, folder: Path) -> tuple[dict[str, Any], Tensor]:
    """Notes of a shortgpt plan and the windows it saw."""
    from secateur.engine.prepare import prepare
    from secateur.engine.progress import Silent
    from secateur.engine.request import make_request
    from secateur.engine.run import Run

    run = Run(prepare(make_request({"model": str(model), **_request(notes, "shortgpt", ratio=0.25)})), folder, Silent())
    found = run.plan()
    assert run.windows is not None
    return dict(found.notes), run.windows.ids


def test_influence_needs_no_table_of_all_pairs_and_hides_no_token() -> None:
    """Memory is linear in the tokens; a zero vector counts as turned wholly, it is not replaced by 0.5."""
    many = torch.ones(1, 200_001, 2)  # all pairs would take 160 GB
    collected = Influence()
    collected.add(many, many)
    assert float(collected.named()["influence"][0]) == pytest.approx(0, abs=1e-9)
    zero = Influence()
    zero.add(torch.zeros(1, 3, 2), torch.ones(1, 3, 2))
    assert float(zero.named()["influence"][0]) == pytest.approx(1)


def test_the_first_token_has_no_say() -> None:
    before = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[:, 0] *= -1000
    collected = Influence()
    collected.add(before, after)
    assert collected.named()["influence"].abs().max() < 1e-6


def test_distances_of_runs_against_their_definition() -> None:
    ends = torch.randn(5, 7, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for length in (1, 2, 4):
        found = run_distances(ends, length)
        for start in range(5 - length):
            pairs = zip(ends[start], ends[start + length], strict=True)
            angles = [math.acos(float(a @ b / (a.norm() * b.norm()))) / math.pi for a, b in pairs]
            assert float(found[start]) == pytest.approx(sum(angles) / len(angles))
        assert len(found) == 5 - length


def test_one_run_of_blocks_goes_and_never_the_last(notes: Path, tmp_path: Path) -> None:
    """Blocks 1 and 2 do nothing, and so does the last, which stays."""
    model = _idle(tmp_path / "model", (1, 2, 4))
    wanted = _request(notes, "shortgpt", ratio=0.3, options={"contiguous": True})
    secateur.prune(model, output=tmp_path / "out", **wanted)
    plan, _ = grid.plan_of(model, tmp_path / "planned", **{**wanted, "data": str(notes)})
    assert plan.blocks == [0, 3, 4]
    _generates(models.load(tmp_path / "out", dtype=DOUBLE), models.token_ids())


def test_greedy_is_leave_one_out_on_the_whole_model(notes: Path, tmp_path: Path) -> None:
    """Every step takes what an independent evaluation finds; the order is kept, and nothing leaks between trials."""
    model = models.save(tmp_path / "model", "llama", DOUBLE, num_hidden_layers=4)
    wanted = _request(notes, "blockpruner", ratio=0.35)
    asked: list[tuple[float, frozenset[str]]] = []
    original = CalibrationTrials.loss

    def spy(self: CalibrationTrials, edits: Any = None) -> float:
        value = original(self, edits)
        asked.append((value, frozenset(edits or {})))
        return value

    with mock.patch.object(CalibrationTrials, "loss", spy):
        secateur.prune(model, output=tmp_path / "out", **wanted)
    _, ids = _calibration(model, notes, tmp_path / "other")
    found = _notes(tmp_path / "out")
    order = [int(name.split(".")[1]) for name in found["path"]]
    gone: list[int] = []
    for step, chosen in enumerate(order):
        losses = {block: _loss_without(model, ids, [*gone, block]) for block in range(4) if block not in gone}
        assert min(losses, key=losses.__getitem__) == chosen
        gone.append(chosen)
        assert found["losses"][step + 1] == pytest.approx(losses[chosen], rel=1e-5)
    assert len(order) > 1
    for value, edits in asked:
        blocks = sorted({int(name.split(".")[1]) for name in edits})
        assert value == pytest.approx(_loss_without(model, ids, blocks), rel=1e-5)


def test_trials_by_divergence(notes: Path, tmp_path: Path) -> None:
    """With objective=kl, every step takes the block without which the predictions move least, and resumes."""
    model = models.save(tmp_path / "model", "llama", DOUBLE, num_hidden_layers=4)
    wanted = _request(notes, "blockpruner", ratio=0.35, options={"objective": "kl"})
    secateur.prune(model, output=tmp_path / "out", **wanted)
    _, ids = _calibration(model, notes, tmp_path / "other")
    dense = _logits_without(model, ids, []).log_softmax(-1)
    found, gone = _notes(tmp_path / "out"), list[int]()
    for chosen, value in zip(found["path"], found["divergences"], strict=True):
        apart = {}
        for block in (block for block in range(4) if block not in gone):
            cut = _logits_without(model, ids, [*gone, block]).log_softmax(-1)
            apart[block] = float((dense.exp() * (dense - cut)).sum(-1).mean())
        gone.append(int(chosen.split(".")[1]))
        assert min(apart, key=apart.__getitem__) == gone[-1]
        assert value == pytest.approx(apart[gone[-1]], abs=2e-6)
    assert found["losses"][len(gone)] == pytest.approx(_loss_without(model, ids, gone), rel=1e-5)


def _logits_without(folder: Path, ids: Tensor, blocks: list[int]) -> Tensor:
    """Of a stock model whose layers are taken out of the list, where it predicts."""
    model = models.load(folder, dtype=DOUBLE)
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in blocks)
    model.config.num_hidden_layers = len(model.model.layers)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return logits


def _loss_without(folder: Path, ids: Tensor, blocks: list[int]) -> float:
    logits = _logits_without(folder, ids, blocks)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@pytest.mark.assets
@pytest.mark.parametrize("layout", ["native", "per-layer"])
def test_planted_redundancy_is_found_first(layout: str, assets: Path, tmp_path: Path) -> None:
    """A trained model one block of which was silenced."""
    shutil.copytree(assets / "lm" / "stories260k-llama", tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(file)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.3.{name}.weight"].zero_()
    save_file(tensors, file, {"format": "pt"})
    request = {"data": assets / "text" / "tinystories-sample" / "train.txt", "samples": 8, "length": 64, "ratio": 0.17}
    secateur.prune(tmp_path / "model", method="blockpruner", output=tmp_path / "out", layout=layout, **request)
    found = _notes(tmp_path / "out")
    first = 1 if layout == "native" else 2
    assert {name.split(".")[1] for name in found["path"][:first]} == {"3"}
    assert found["losses"][first] == pytest.approx(found["losses"][0], abs=1e-6)


@pytest.mark.parametrize("objective", ["perplexity", "kl"])
def test_an_interrupted_search_goes_on_where_it_was(
    objective: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """The trials that were made are not made again, and the bytes are the same."""
    wanted = _request(notes, "blockpruner", ratio=0.25, options={"objective": objective})
    secateur.prune(checkpoint(), output=tmp_path / "straight", **wanted)
    computed, original, add = mock.Mock(), CalibrationTrials._mean, Journal.add

    class Killed(BaseException):
        pass

    def dying(self: Journal, step: str, **content: Any) -> None:
        add(self, step, **content)
        if len(self.done("trial")) == 3:
            raise Killed

    def counting(self: CalibrationTrials, *args: Any) -> float:  # of a trial, whatever it is judged by
        computed()
        return original(self, *args)

    with mock.patch.object(Journal, "add", dying), pytest.raises(Killed):
        secateur.prune(checkpoint(), output=tmp_path / "out", **wanted)
    with mock.patch.object(CalibrationTrials, "_mean", counting):
        secateur.prune(checkpoint(), output=tmp_path / "out", **wanted)
    assert computed.call_count == _notes(tmp_path / "out")["trials"] - 3
    assert grid.hashes(tmp_path / "out", *grid.TIMED) == grid.hashes(tmp_path / "straight", *grid.TIMED)


@pytest.mark.parametrize("units", ["branches", "attention", "ffn"])
def test_branches_are_refused_in_the_native_layout(
    units: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    wanted = _request(notes, "blockpruner", options={"units": units})
    with pytest.raises(secateur.errors.RequestError, match="without attention") as caught:
        secateur.prune(checkpoint(), output=tmp_path / "out", **wanted)
    assert (caught.value.code, caught.value.exit_code) == ("not-native", 2)
    assert "per-layer" in caught.value.hint


@pytest.mark.parametrize("units", ["attention", "branches"])
def test_without_branches_it_generates(units: str, notes: Path, tmp_path: Path) -> None:
    """With the cache as without, also where the first attention, whose cache tells the length, is gone."""
    model = models.save(tmp_path / "model", "llama", DOUBLE, num_hidden_layers=4)

    def first(_: CalibrationTrials, edits: Any = None) -> float:
        return float(min(int(name.split(".")[1]) for name in edits))

    with mock.patch.object(CalibrationTrials, "loss", first):
        wanted = _request(notes, "blockpruner", layout="per-layer", options={"units": units})
        secateur.prune(model, output=tmp_path / "out", **wanted)
    found = _notes(tmp_path / "out")
    assert found["path"][0] == "blocks.0.attention"
    assert found["taken"] >= 1
    _generates(models.load(tmp_path / "out", dtype=DOUBLE), models.token_ids())


@pytest.mark.parametrize("method", ["shortgpt", "blockpruner"])
def test_from_the_command_line(method: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    words = ["prune", str(checkpoint()), "-o", str(tmp_path / "out"), "--method", method, "--ratio", "0.25",
             "--data", str(notes), "--samples", "8", "--length", "16"]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert models.config(tmp_path / "out")["num_hidden_layers"] < models.config(checkpoint())["num_hidden_layers"]


def test_units_default_to_what_the_layout_can_hold() -> None:
    made = {layout: BlockPruner().in_layout(layout).units for layout in ("native", "per-layer")}  # type: ignore[arg-type]
    assert made == {"native": "blocks", "per-layer": "branches"}
