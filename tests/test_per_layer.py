"""The per-layer layout: layers that differ, and a stream that changes its basis from norm to norm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.budgets.ranking import GlobalRanking, relative
from secateur.errors import RequestError
from secateur.families import BlockSizes, Sizes
from secateur.families.modeling_secateur import change_of_basis

FAMILIES = ("llama", "llama-tied", "gpt2", "opt", "mixtral")
ROTATED = {"method": "slicegpt", "ratio": 0.15, "samples": 8, "length": 32}
RANKED = {
    "ffn": {"method": "magnitude", "ratio": 0.15, "options": {"spaces": "ffn", "allocation": "global"}},
    "kv": {"method": "random", "ratio": 0.1, "options": {"spaces": "kv", "allocation": "global"}, "seed": 3},
}


def request(kind: str, notes: Path) -> dict[str, Any]:
    """A request in the per-layer layout."""
    made = {**ROTATED, "data": notes} if kind == "rotated" else RANKED[kind]
    return {**made, "layout": "per-layer"}


def load(folder: Path, **options: Any) -> Any:
    """Through Secateur's own copy of the modelling file, in float64."""
    return secateur.load(folder, dtype=torch.float64, experts_implementation="eager", **options).eval()


@pytest.mark.parametrize("kind", ["ffn", "kv", "rotated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_cut(family: str, kind: str, notes: Path, tmp_path: Path) -> None:
    """And the counts, the hashes, the bytes of a second run, the untouched input."""
    model = models.save(tmp_path / "model", family, torch.float64)
    before, asked, output = grid.hashes(model), request(kind, notes), tmp_path / "out"
    result = secateur.prune(model, output=output, **asked)
    plan, digest = grid.plan_of(model, tmp_path / "planned", **asked)
    where, ids = models.ALL[family].where, models.token_ids()
    dense = masking.swap_precise_parts(models.load(model, dtype=torch.float64, experts_implementation="eager"))
    untouched = masking.logits(dense, ids)
    expected = masking.logits(masking.mask(dense, where, plan), ids)
    cut = masking.swap_precise_parts(load(output))
    assert masking.difference(expected, masking.logits(cut, ids)) < 1e-10
    assert masking.difference(untouched, expected) > 1e-3
    assert result.achieved["params"] == sum(p.numel() for p in {id(p): p for p in cut.parameters()}.values())
    grid.check_record(output, digest)
    secateur.prune(model, output=tmp_path / "again", **asked)
    assert grid.hashes(output, *grid.TIMED) == grid.hashes(tmp_path / "again", *grid.TIMED)
    assert grid.hashes(model) == before


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "ffn"), ("llama", "rotated"), ("gpt2", "kv"), ("mixtral", "rotated")]
)
def test_loads_without_secateur(family: str, kind: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """In a process that cannot import Secateur: transformers alone, with the folder's own file, generates the same."""
    output, ids = tmp_path / "out", models.token_ids(1, 8)
    secateur.prune(checkpoint(family), output=output, **request(kind, notes))
    ours = secateur.load(output)
    wanted = [
        ours.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=1)
        for cache in (True, False)
    ]
    assert torch.equal(*wanted)
    assert models.generated_alone(output, ids, tmp_path) == wanted[0].tolist()
    again = secateur.load(tmp_path / "saved")
    assert torch.equal(masking.logits(again, ids), masking.logits(ours, ids))


def test_stock_loading_fails_loudly(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Nobody gets a model of other sizes by forgetting trust_remote_code."""
    from transformers import AutoModelForCausalLM

    for kind in ("ffn", "kv", "rotated"):
        secateur.prune(checkpoint("llama"), output=tmp_path / kind, **request(kind, notes))
        with pytest.raises((RuntimeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / kind, trust_remote_code=False)


def test_configuration_names_what_differs(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """``per_layer_config`` as transformers defines it, beside a uniform configuration."""
    from transformers import AutoConfig

    output = tmp_path / "out"
    secateur.prune(checkpoint("llama"), output=output, **request("ffn", notes))
    record = json.loads((output / "secateur.json").read_text())
    config = AutoConfig.from_pretrained(output)
    widths = [block["ffn"] for block in record["after"]["blocks"]]
    assert len(set(widths)) > 1
    assert [layer.intermediate_size for layer in config.per_layer_config] == widths
    assert "trust_remote_code=True" in (output / "README.md").read_text()
    assert record["loads_in"]["vllm"] == record["loads_in"]["llama.cpp"] == "no"


@pytest.mark.parametrize("kind", ["ffn", "rotated"])
def test_evaluated_and_pruned_again(
    kind: str, checkpoint: Checkpoints, notes: Path, held_out: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    once = secateur.prune(checkpoint("llama-tied"), output=first, text=held_out, **request(kind, notes))
    assert once.perplexity is not None
    figures = secateur.evaluate(first, text=held_out)
    assert figures["perplexity"] == pytest.approx(once.perplexity["after"], rel=1e-6)
    assert figures["params"] == once.achieved["params"]
    with pytest.raises(RequestError, match="per-layer"):
        secateur.prune(first, method="magnitude", ratio=0.1, output=second)
    again = secateur.prune(first, method="magnitude", ratio=0.1, output=second, layout="per-layer")
    assert again.achieved["params"] == sum(p.numel() for p in secateur.load(second).parameters())
    assert secateur.preview(first, method="magnitude", ratio=0.1, layout="per-layer")["problems"] == []
    copy = secateur.prune(first, ratio=0, output=tmp_path / "copy")
    assert copy.achieved["params"] == once.achieved["params"]
    if kind == "rotated":
        with pytest.raises(RequestError, match="changes bases"):
            secateur.prune(first, output=tmp_path / "third", **request(kind, notes))


def test_shortcuts_are_triangles(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Stored packed, in the gauge that makes each lower triangular: nothing is above the diagonal."""
    output, asked = tmp_path / "out", request("rotated", notes)
    secateur.prune(checkpoint("llama", torch.float64), output=output, **asked)
    plan, _ = grid.plan_of(checkpoint("llama", torch.float64), tmp_path / "planned", **asked)
    names, state = list(plan.bases), load_file(output / "model.safetensors")
    width = plan.after.residual
    for index in range(3):
        for step, writer in enumerate(("self_attn.o_proj", "mlp.down_proj")):
            first, second = (plan.bases[names[2 * index + step + i]] for i in (0, 1))
            change = first.t() @ second
            assert change.triu(1).abs().max() < 1e-12
            packed = state[f"model.layers.{index}.{writer}.shortcut"]
            assert packed.shape == (width * (width + 1) // 2,)
            assert torch.allclose(change_of_basis(packed, False) + torch.eye(width), change, atol=1e-12)


def test_native_refuses(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for options in ({"options": {"rotation": "each"}}, {}):
        asked = {**request("rotated", notes), **options, "layout": "native"} if options else {**RANKED["ffn"]}
        with pytest.raises(RequestError, match="per-layer"):
            secateur.prune(checkpoint("llama"), output=tmp_path / "out", **asked)
        assert list(tmp_path.iterdir()) == []


def test_damaged_records_are_refused(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    secateur.prune(checkpoint("llama"), output=output, **request("ffn", notes))
    text = (output / "secateur.json").read_text()
    for broken in ("{", "{}", '{"resize": {"sizes": {"blocks": [{"a": 1}]}}}', '{"resize": {"sizes": 3}}'):
        (output / "secateur.json").write_text(broken)
        with pytest.raises(RequestError):
            secateur.evaluate(output)
    (output / "secateur.json").write_text(text.replace('"ffn": ', '"ffn": 1'))
    with pytest.raises(RequestError, match="the file holds"):
        secateur.evaluate(output)
    (output / "secateur.json").unlink()
    with pytest.raises(RequestError, match="missing"):
        secateur.evaluate(output)


@given(data=st.data(), grain=st.integers(1, 4))
def test_ranking_keeps_the_best_units(data: st.DataObject, grain: int) -> None:
    """Against counting by hand: of the n best units in all, each block keeps its own, rounded to the grain."""
    widths = data.draw(st.lists(st.integers(grain, 24).map(lambda n: n - n % grain or grain), min_size=1, max_size=4))
    sizes = Sizes(16, 4, 10, 0, 0, False, tuple(BlockSizes(w, 2) for w in widths))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = {f"blocks.{i}.ffn": torch.rand(w, generator=generator) + 0.01 for i, w in enumerate(widths)}
    ranking = GlobalRanking(sizes, {"ffn": relative(scores)}, {"ffn": grain})
    ordered = sorted(
        ((float(value / score.mean()), i) for i, score in enumerate(scores.values()) for value in score), reverse=True
    )
    assert len(ranking) == len(ordered) + 1
    for count in range(len(ranking)):
        kept = [0] * len(widths)
        for _, block in ordered[:count]:
            kept[block] += 1
        wanted = [min(w, max(1, round(k / grain)) * grain) if k < w else w for k, w in zip(kept, widths, strict=True)]
        assert [block.ffn for block in ranking[count].blocks] == wanted
