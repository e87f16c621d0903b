"""What only the per-layer layout knows: narrower heads, branches that read or write a part of the stream, new biases,
blocks without attention or FFN, a stream whose bases differ in width."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import masking
import models
import secateur
from conftest import Checkpoints
from secateur.cuts.stream import interfaces, sliced, triangular
from secateur.engine.prepare import Prepared, prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.errors import RequestError
from secateur.families import Sizes
from secateur.families.limits import problems
from secateur.families.resizing import sizes_of
from secateur.plans import Plan
from secateur.spaces import spaces_of

Planner = Callable[[Sizes], Plan]


def some(count: int, of: int, seed: int) -> Tensor:
    """Random positions, ascending."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def in_heads(count: int, head: int, heads: int, seed: int) -> Tensor:
    """As many positions in every head, other ones in each."""
    return torch.cat([some(count, head, seed + i) + i * head for i in range(heads)])


def narrow(sizes: Sizes, fields: tuple[str, ...]) -> Plan:
    """Some fields of some blocks, at random; block 1 stays whole but for the queries and keys."""
    kept: dict[str, Tensor] = {}
    blocks = list(sizes.blocks)
    for i, block in enumerate(sizes.blocks):
        for number, field in enumerate(fields):
            seed = 100 * i + 10 * number
            if i == 1 and field != "qk":
                continue
            if field in ("qk", "value"):
                count = sizes.head - 2 - (i > 1)
                kept[f"blocks.{i}.{field}"] = in_heads(count, sizes.head, block.kv, seed)
            else:
                count = sizes.residual - 7 - 3 * number - i
                kept[f"blocks.{i}.{field}"] = some(count, sizes.residual, seed)
            blocks[i] = replace(blocks[i], **{field: count})
    return Plan(sizes, replace(sizes, blocks=tuple(blocks)), kept)


def with_units(plan: Plan) -> Plan:
    """The same, and fewer FFN neurons and key/value heads."""
    sizes, kept, blocks = plan.before, dict(plan.kept), list(plan.after.blocks)
    kept |= {"blocks.0.kv": some(2, sizes.blocks[0].kv, 5), "blocks.2.kv": some(1, sizes.blocks[2].kv, 6)}
    blocks[0], blocks[2] = replace(blocks[0], kv=2), replace(blocks[2], kv=1)
    for i in (0, 1):
        count = sizes.blocks[i].ffn // 2
        kept |= {s.name: some(count, s.size, i) for s in spaces_of(sizes, "ffn", i) if s.expert != "shared"}
        blocks[i] = replace(blocks[i], ffn=count)
    return replace(plan, after=replace(plan.after, blocks=tuple(blocks)), kept=kept)


def without(sizes: Sizes, attention: tuple[int, ...], ffn: tuple[int, ...]) -> Plan:
    """Blocks that lose a branch."""
    blocks = list(sizes.blocks)
    for i in attention:
        blocks[i] = replace(blocks[i], kv=0)
    for i in ffn:
        blocks[i] = replace(blocks[i], ffn=0, experts=0, shared=0)
    return Plan(sizes, replace(sizes, blocks=tuple(blocks)))


def with_biases(plan: Plan, flags: tuple[str, ...]) -> Plan:
    """Biases of every block that still has the branch."""
    edits, blocks = dict(plan.edits), list(plan.after.blocks)
    for i, block in enumerate(blocks):
        for number, flag in enumerate(flags):
            if block.has("ffn" if flag == "down_bias" else "attention"):
                generator = torch.Generator().manual_seed(10 * i + number)
                role = flag.removesuffix("_bias")
                edits[f"blocks.{i}.{role}.bias"] = torch.randn(
                    plan.before.residual, generator=generator, dtype=torch.float64
                )
                blocks[i] = replace(blocks[i], **{flag: True})
    return replace(plan, after=replace(plan.after, blocks=tuple(blocks)), edits=edits)


STREAM = ("attention_read", "attention_write", "ffn_read", "ffn_write")
PLANS: dict[str, Planner] = {
    "qk": lambda s: narrow(s, ("qk",)),
    "value": lambda s: narrow(s, ("value",)),
    "heads": lambda s: with_units(narrow(s, ("qk", "value"))),
    "stream": lambda s: narrow(s, STREAM),
    "attention-stream": lambda s: narrow(s, STREAM[:2]),
    "no-attention": lambda s: without(s, (0,), ()),
    "no-ffn": lambda s: without(s, (), (1,)),
    "branches": lambda s: without(s, (0, len(s.blocks) - 1), (1,)),
    "biases": lambda s: with_biases(Plan(s, s), ("out_bias", "down_bias")),
    "out-bias": lambda s: with_biases(Plan(s, s), ("out_bias",)),
}


def planned(model: Path, planner: Planner) -> tuple[Prepared, Plan]:
    prepared = prepare(make_request({"model": str(model), "method": "random", "ratio": 0.1, "layout": "per-layer"}))
    return prepared, planner(prepared.checkpoint.architecture.sizes)


def refused(prepared: Prepared, plan: Plan) -> list[str]:
    return problems(prepared.checkpoint.architecture, plan.after, 8, "per-layer")


def write(prepared: Prepared, plan: Plan, output: Path) -> None:
    """Through the engine: the plan saved and loaded, the cut sweep, the reload check."""
    run = Run(prepared, output, Silent())
    run.journal.add("plan", sha256=plan.save(run.work))
    run.write(run.plan())
    run.publish()


def load(folder: Path) -> Any:
    return models.load(folder, dtype=torch.float64, experts_implementation="eager")


def check(model: Path, output: Path, family: str, prepared: Prepared, plan: Plan) -> None:
    """Against hooks on the dense model; counts against the file; with and without a cache."""
    ids, where = models.token_ids(), models.ALL[family].where
    dense, cut = masking.swap_precise_parts(load(model)), masking.swap_precise_parts(load(output))
    untouched = masking.logits(dense, ids)
    expected = masking.logits(masking.mask(dense, where, plan), ids)
    assert masking.difference(expected, masking.logits(cut, ids)) < 1e-10
    assert masking.difference(untouched, expected) > 1e-3
    check_counts(output, prepared, plan, cut)
    check_cache(cut)


def check_counts(output: Path, prepared: Prepared, plan: Plan, cut: Any) -> None:
    costs, tensors = prepared.budget.costs, load_file(output / "model.safetensors")
    dense = load_file(prepared.checkpoint.folder.path / "model.safetensors")
    assert costs.params(plan.after) == sum({id(p): p.numel() for p in cut.parameters()}.values())
    grown = sum(t.nbytes for t in tensors.values()) - sum(t.nbytes for t in dense.values())
    lost = sum(t.nbytes for n, t in dense.items() if n not in tensors and n.endswith("e_score_correction_bias"))
    assert costs.bytes(plan.after) - costs.bytes(plan.before) == grown + lost
    assert secateur.evaluate(output)["params"] == costs.params(plan.after)


def check_cache(cut: Any) -> None:
    ids = models.token_ids(2, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with_cache, plain = (cut.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache.sequences, plain.sequences)
    assert masking.difference(torch.stack(plain.logits), torch.stack(with_cache.logits)) < 1e-5


EVERY = [(family, kind) for family in models.FAMILIES for kind in PLANS]
BRANCHES = ("opt", "mixtral", "phi", "gpt_neox", "bloom", "gpt_oss", "qwen2_moe")
CELLS = [
    *(("llama", kind) for kind in PLANS),
    *(("gpt2", kind) for kind in ("heads", "stream", "branches")),
    *((family, "branches") for family in BRANCHES),
    *(("phi3", "heads"), ("falcon", "stream"), ("deepseek_v3", "attention-stream"), ("gemma2", "stream")),
]
"""What CI runs; with SECATEUR_FULL set, every family with every plan."""


@pytest.mark.parametrize(("family", "kind"), EVERY if os.environ.get("SECATEUR_FULL") else CELLS)
def test_masked_is_cut(family: str, kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float64)
    prepared, plan = planned(model, PLANS[kind])
    reasons = refused(prepared, plan)
    if reasons:
        pytest.skip(str(reasons))
    write(prepared, plan, tmp_path / "out")
    check(model, tmp_path / "out", family, prepared, plan)


# -- a stream whose bases differ in width ----------------------------------------------------------------------------

WIDTHS = {"wide-head": (30, 22, 35, 28, 20, 33, 40), "narrow-head": (41, 22, 35, 28, 20, 33, 17)}


def sliced_plan(prepared: Prepared, widths: tuple[int, ...]) -> Plan:
    """Random bases in the triangular gauge."""
    architecture = prepared.checkpoint.architecture
    sizes, names = architecture.sizes, interfaces(architecture)
    directions = dict(zip(names, widths[-len(names) :], strict=True))
    generator, bases, before = torch.Generator().manual_seed(0), {}, None
    for name, count in directions.items():
        random = torch.randn(sizes.residual, count, generator=generator, dtype=torch.float64)
        if sizes.mean_free:
            random -= random.mean(0)
        basis = torch.linalg.qr(random).Q
        bases[name] = before = basis if before is None else triangular(basis, before)
    return Plan(sizes, sliced(architecture, sizes, directions), bases=bases)


SLICED = [("llama", "wide-head"), ("llama-tied", "narrow-head"), ("gpt2", "narrow-head"), ("phi", "wide-head")]
SLICED_MORE = [(f, w) for f in ("llama", "llama-tied", "gpt2", "opt", "phi", "granite", "starcoder2") for w in WIDTHS]


@pytest.mark.parametrize(("family", "which"), SLICED_MORE if os.environ.get("SECATEUR_FULL") else SLICED)
def test_sliced_by_interface(family: str, which: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float64)
    prepared, plan = planned(model, lambda s: Plan(s, s))
    plan = sliced_plan(prepared, WIDTHS[which])
    assert refused(prepared, plan) == []
    write(prepared, plan, tmp_path / "out")
    check(model, tmp_path / "out", family, prepared, plan)
    state = load_file(tmp_path / "out" / "model.safetensors")
    stored = 0
    for first, second in pairwise(plan.bases.values()):
        assert (first.t() @ second).triu(1).abs().max() < 1e-12
        stored += torch.ones(first.shape[1], second.shape[1]).tril().count_nonzero()
    assert stored == sum(tensor.numel() for name, tensor in state.items() if name.endswith(".shortcut"))


# -- the folder ------------------------------------------------------------------------------------------------------


def everything(sizes: Sizes) -> Plan:
    """All of it at once: block 0 without attention, block 1 without FFN, block 2 narrow, with biases."""
    plan = narrow(sizes, ("qk", "value", *STREAM))
    kept = {name: positions for name, positions in plan.kept.items() if name.startswith("blocks.2.")}
    gone = without(sizes, (0,), (1,)).after.blocks
    after = replace(sizes, blocks=(*gone[:2], plan.after.blocks[2]))
    return with_biases(Plan(sizes, after, kept), ("out_bias", "down_bias"))


def test_loads_without_secateur(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """In a process that cannot import Secateur; what it saves is the same model."""
    prepared, plan = planned(checkpoint("llama"), everything)
    output, ids = tmp_path / "out", models.token_ids(1, 8)
    write(prepared, plan, output)
    ours = secateur.load(output)
    wanted = ours.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert models.generated_alone(output, ids, tmp_path) == wanted.tolist()
    assert torch.equal(masking.logits(secateur.load(tmp_path / "saved"), ids), masking.logits(ours, ids))


def test_pruned_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """The FFN and the depth of such a folder can be cut again; what is narrowed already cannot."""
    prepared, plan = planned(checkpoint("llama"), everything)
    first = tmp_path / "first"
    write(prepared, plan, first)
    for kind in ("ffn", "blocks"):
        asked = {"method": "magnitude", "ratio": 0.1, "layout": "per-layer", "options": {"spaces": kind}}
        again = secateur.prune(first, output=tmp_path / kind, **asked)
        assert again.achieved["params"] == sum(p.numel() for p in secateur.load(tmp_path / kind).parameters())
    for kind in ("kv", "residual"):
        with pytest.raises(RequestError, match="narrowed already"):
            secateur.prune(
                first, output=tmp_path / kind, method="random", ratio=0.1, layout="per-layer", options={"spaces": kind}
            )


def test_native_has_no_place(checkpoint: Checkpoints) -> None:
    prepared, plan = planned(checkpoint("llama"), everything)
    found = problems(prepared.checkpoint.architecture, plan.after, 4, "native")
    for word in ("queries", "values", "read a part", "write a part", "a bias", "without their attention", "their FFN"):
        assert any("no place for" in reason and word in reason for reason in found), word


REFUSED = {
    ("qwen3", "qk"): "the divisor sums over all dimensions",
    ("gpt_neox", "value"): "take turns",
    ("deepseek_v3", "qk"): "low-rank",
    ("mixtral", "stream"): "experts are called together",
    ("opt", "biases"): "has a bias there",
}


@pytest.mark.parametrize(("family", "kind"), REFUSED)
def test_refused_with_a_reason(family: str, kind: str, checkpoint: Checkpoints) -> None:
    prepared, plan = planned(checkpoint(family, torch.float64), PLANS[kind])
    assert any(REFUSED[family, kind] in reason for reason in refused(prepared, plan))


def test_one_attention_has_to_stay(checkpoint: Checkpoints) -> None:
    """And one of the kind whose cache tells the length."""
    prepared, plan = planned(checkpoint("llama"), lambda s: without(s, (0, 1, 2), ()))
    assert any("has to stay" in reason for reason in refused(prepared, plan))
    prepared, plan = planned(checkpoint("qwen2"), lambda s: without(s, (0,), ()))
    assert any("length of the cache" in reason for reason in refused(prepared, plan))


def test_sizes_of_older_records(checkpoint: Checkpoints) -> None:
    _, plan = planned(checkpoint("llama"), everything)
    assert sizes_of(json.loads(json.dumps(asdict(plan.after)))) == plan.after
    old = asdict(plan.before)
    for block in old["blocks"]:
        for field in ("qk", "value", *STREAM, "out_bias", "down_bias"):
            del block[field]
    del old["stem_write"], old["stem_read"]
    assert sizes_of(old) == plan.before
    assert hash(plan.after) != hash(plan.before)
