"""What only the per-layer layout knows: narrower heads, branches that read or write a part of the stream, new biases,
blocks without attention or FFN, a stream whose bases differ in width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from secateur.families import Sizes
from secateur.families.limits import problems
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


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_masked_is_cut(family: str, kind: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float64)
    prepared, plan = planned(model, PLANS[kind])
    reasons = refused(prepared, plan)
    if reasons:
        print(family, kind, reasons)
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


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "phi", "granite", "starcoder2"])
def test_sliced_by_interface(family: str, widths: tuple[int, ...], checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float64)
    prepared, plan = planned(model, lambda s: Plan(s, s))
    plan = sliced_plan(prepared, widths)
    assert refused(prepared, plan) == []
    write(prepared, plan, tmp_path / "out")
    check(model, tmp_path / "out", family, prepared, plan)
    state = load_file(tmp_path / "out" / "model.safetensors")
    stored = 0
    for first, second in pairwise(plan.bases.values()):
        assert (first.t() @ second).triu(1).abs().max() < 1e-12
        stored += torch.ones(first.shape[1], second.shape[1]).tril().count_nonzero()
    assert stored == sum(tensor.numel() for name, tensor in state.items() if name.endswith(".shortcut"))
