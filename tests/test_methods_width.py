"""fasp, modegpt, flap and cfsp against their definitions, and against what their released code gets wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

import masking
import models
import secateur
from conftest import Checkpoints
from secateur.api import load
from secateur.budgets import Budget, Costs, Target
from secateur.budgets.shares import narrowed, solve_shares
from secateur.cli import main
from secateur.errors import RequestError
from secateur.families import Architecture, canonical_name
from secateur.families.rotary import rotary_partners
from secateur.mends import narrowed_values
from secateur.mends.values import value_basis
from secateur.methods.base import Study
from secateur.methods.cfsp import Cfsp
from secateur.methods.fasp import Fasp
from secateur.methods.flap import Flap
from secateur.methods.modegpt import MoDeGpt
from secateur.plans import Plan
from secateur.scores.columns import column_scores
from secateur.scores.heads import best_pairs, output_moments, pair_scores
from secateur.spaces import BlockView, columns_of_values

DOUBLE = torch.float64


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def _architecture(family: str) -> Architecture:
    return Architecture(models.stock(family).config.to_dict())


def _view(architecture: Architecture, seed: int = 0) -> BlockView:
    names = [tensor.name for tensor in architecture.tensors_of(0)]
    tensors = {name: _normal(*architecture.shapes[name], seed=seed + i) for i, name in enumerate(names)}
    return BlockView(architecture, 0, tensors)


def _evidence(signal: Tensor, key: str, gram: bool = True) -> dict[str, Tensor]:
    """What the taps make of a signal [tokens, width]."""
    second = {f"{key}.gram": signal.t() @ signal} if gram else {f"{key}.squares": signal.square().sum(0)}
    return {**second, f"{key}.sum": signal.sum(0), f"{key}.count": torch.tensor([len(signal)], dtype=DOUBLE)}


def _budget(architecture: Architecture, layout: str = "per-layer", fraction: float = 0.8, **options: object) -> Budget:
    costs = Costs(architecture, dict.fromkeys(architecture.tensors, 4))
    target = Target("params", fraction=fraction)
    return Budget(architecture, costs, (target,), itemsize=4, layout=layout, **options)  # type: ignore[arg-type]


# -- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("ffn",), ("ffn", "value"), ("ffn", "qk", "value"), ("ffn", "kv"), ("value",)])
def test_shares_meet_the_target_and_grow(parts: tuple[str, ...]) -> None:
    budget = _budget(_architecture("llama"), fraction=0.9)
    blocks = len(budget.sizes.blocks)
    found = solve_shares(budget, lambda share: [share] * blocks, parts)
    assert not budget.problems(found)
    if "ffn" in parts:  # makes up for the heads' coarse steps
        assert budget.costs.params(found) == pytest.approx(0.9 * budget.costs.params(budget.sizes), rel=0.02)
    costs = [budget.costs.params(narrowed(budget, [share / 10] * blocks, parts)) for share in range(1, 11)]
    assert costs == sorted(costs)
    assert costs[-1] == budget.costs.params(budget.sizes)


# -- FASP ------------------------------------------------------------------------------------------------------------


def test_a_value_dimension_goes_with_every_query_head_that_reads_it() -> None:
    """Brute force over the columns of ``out``, in the order the stock class has them."""
    head, group, groups = 4, 3, 2
    kept = torch.tensor([0, 2, 5, 7])
    columns = columns_of_values(kept, head, group)
    every = [(u, q, c) for u in range(groups) for q in range(group) for c in range(head)]
    expected = [(u * group + q) * head + c for u, q, c in every if u * head + c in kept]
    assert columns.tolist() == sorted(expected)


@pytest.mark.parametrize("metric", ["wanda", "obs"])
def test_fasp_narrows_values_by_their_sum_over_the_group(metric: str) -> None:
    architecture = _architecture("llama")
    view, method = _view(architecture), Fasp(targets="ffn+vo", metric=metric)
    sizes = architecture.sizes
    block, head = sizes.blocks[0], sizes.head
    after = replace(sizes, blocks=tuple(replace(b, value=head // 2) for b in sizes.blocks))
    out = view.tensors["blocks.0.out.weight"]
    evidence = _evidence(_normal(300, out.shape[1], seed=9).relu(), "out")
    mend = method.mend(view, evidence, Plan(sizes, after), 0)
    scores = column_scores(out, evidence["out.gram"], method.metric, method.damping)
    rows = mend.kept["blocks.0.value"].tolist()
    for group in range(block.kv):
        total = [
            sum(float(scores[(group * block.group + q) * head + c]) for q in range(block.group)) for c in range(head)
        ]
        best = sorted(sorted(range(head), key=lambda c: -total[c])[: head // 2])
        assert [row - group * head for row in rows if row // head == group] == best
    removed = [c for c in range(out.shape[1]) if c not in columns_of_values(torch.tensor(rows), head, block.group)]
    assert not mend.edits["blocks.0.out.weight"][:, removed].any()


def test_a_bias_absorbs_constant_features_exactly() -> None:
    """OPT: neurons that are constant cost nothing to remove, whatever the weights, if there is a bias."""
    architecture = _architecture("opt")
    view = _view(architecture)
    sizes = architecture.sizes
    width = sizes.blocks[0].ffn
    signal = _normal(400, width, seed=3)
    constant = torch.arange(0, width, 2)
    signal[:, constant] = 5.0 + constant.double()
    after = sizes.resized("ffn", width - len(constant))
    down, bias = view.tensors["blocks.0.down.weight"], view.tensors["blocks.0.down.bias"]
    mend = Fasp(metric="obs").mend(view, _evidence(signal, "down"), Plan(sizes, after), 0)
    assert not set(mend.kept["blocks.0.ffn"].tolist()) & set(constant.tolist())
    before = signal @ down.t() + bias
    found = signal @ mend.edits["blocks.0.down.weight"].t() + mend.edits["blocks.0.down.bias"]
    assert masking.difference(before, found) < 1e-8


def test_values_stay_whole_in_the_native_layout() -> None:
    with pytest.raises(RequestError, match="targets=ffn\\+vo"):
        Fasp(targets="ffn+vo").in_layout("native")


# -- MoDeGPT ---------------------------------------------------------------------------------------------------------


def test_output_moments_are_those_of_the_outputs() -> None:
    signal, weight, bias = _normal(50, 6) + 1, _normal(4, 6, seed=1), _normal(4, seed=2)
    outputs = signal @ weight.t() + bias
    given = _evidence(signal, "q")
    found = output_moments(weight, bias, given["q.gram"], given["q.sum"], given["q.count"])
    assert torch.allclose(found, outputs.t() @ outputs / 50)


def test_pair_scores_are_the_norms_of_the_roots_and_no_rotation_changes_them() -> None:
    """CR asks for column norms of C^1/2: second moments are enough."""
    q, k = _normal(80, 4), _normal(80, 4, seed=1)
    grams = [signal.t() @ signal / 80 for signal in (q, k)]
    roots = []
    for gram in grams:
        values, vectors = torch.linalg.eigh(gram)
        roots.append(vectors @ values.sqrt().diag() @ vectors.t())
    expected = (roots[0].norm(dim=0) * roots[1].norm(dim=0)).square()
    alone = list(range(4))
    found = pair_scores(grams[0].diagonal()[None, None], grams[1].diagonal()[None], alone)[0]
    assert torch.allclose(found, expected)
    partners, angle = [2, 3, 0, 1], torch.tensor(0.7)
    turn = torch.eye(4, dtype=DOUBLE)
    turn[[0, 2], [0, 2]], turn[0, 2], turn[2, 0] = angle.cos().double(), -angle.sin().double(), angle.sin().double()
    before, after = (
        pair_scores((t @ grams[0] @ t.t()).diagonal()[None, None], grams[1].diagonal()[None], partners)
        for t in (torch.eye(4, dtype=DOUBLE), turn)
    )
    assert torch.allclose(before, after)
    assert torch.equal(before[0, :2], before[0, 2:])


def test_query_heads_of_a_group_share_one_selection_of_their_sum() -> None:
    queries, keys = _normal(2, 3, 4).square(), _normal(2, 4, seed=1).square()
    found = pair_scores(queries, keys, list(range(4)))
    assert torch.allclose(found, torch.stack([(queries[u] * keys[u]).sum(0) for u in range(2)]))


def test_best_pairs_keep_rotated_pairs_together() -> None:
    partners = [2, 3, 0, 1, 4, 5, 6]  # two pairs, three alone
    scores = torch.tensor([5.0, 1.0, 5.0, 1.0, 2.0, 0.1, 1.9])
    assert best_pairs(scores, partners, 2).tolist() == [0, 2]
    assert best_pairs(scores, partners, 4).tolist() == [0, 2, 4, 6]
    assert best_pairs(scores, list(range(7)), 3).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", lambda i, h: (i + h // 2) % h), ("cohere", lambda i, _: i ^ 1), ("gpt2", lambda i, _: i)],
)
def test_partners_are_the_dimensions_the_stock_class_turns_together(family: str, expected: object) -> None:
    architecture = _architecture(family)
    head = architecture.sizes.head
    assert rotary_partners(architecture, 0) == [expected(i, head) for i in range(head)]  # type: ignore[operator]


def test_partial_rotation_leaves_the_rest_alone() -> None:
    architecture = _architecture("phi")
    partners = rotary_partners(architecture, 0)
    assert any(i != other for i, other in enumerate(partners))
    assert partners[-1] == architecture.sizes.head - 1


def test_the_small_svd_is_the_large_one() -> None:
    """Against C^1/2 W_v W_o truncated, as the paper writes it, for one query head."""
    signal, v, out = _normal(200, 12), _normal(4, 12, seed=1), _normal(10, 4, seed=2)
    correlation = signal.t() @ signal / 200
    values, vectors = torch.linalg.eigh(correlation)
    root = vectors @ values.sqrt().diag() @ vectors.t()
    left, singular, right = torch.linalg.svd(root @ v.t() @ out.t(), full_matrices=False)
    best = torch.linalg.solve(root, left[:, :2]) @ singular[:2].diag() @ right[:2]
    basis = value_basis([out], [v @ correlation @ v.t()])
    down, up = basis.reduce[:2], basis.restore[:, :2]
    assert torch.allclose((down @ v).t() @ (out @ up).t(), best, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_changes_nothing_and_a_planted_rank_is_found(bias: bool) -> None:
    groups, group, head, width = 2, 3, 4, 10
    tensors = {"v.weight": _normal(groups * head, width), "out.weight": _normal(width, groups * group * head, seed=1)}
    if bias:
        tensors["v.bias"] = _normal(groups * head, seed=4)
    given = _evidence(_normal(300, width, seed=2), "q")

    def outputs(of: dict[str, Tensor]) -> Tensor:
        """What every query head makes of one token's value."""
        x = _normal(20, width, seed=5)
        values = (x @ of["v.weight"].t() + of.get("v.bias", 0.0)).reshape(20, groups, 1, head)
        return values.expand(-1, -1, group, -1).flatten(1) @ of["out.weight"].t()

    def moments() -> Tensor:
        return output_moments(
            tensors["v.weight"], tensors.get("v.bias"), *(given[f"q.{n}"] for n in ("gram", "sum", "count"))
        )

    assert torch.allclose(outputs(narrowed_values(tensors, moments(), head, head)), outputs(tensors), atol=1e-6)
    shared = _normal(head, 2, seed=7) @ _normal(2, head, seed=8)  # every reader of a group sees the same two directions
    readers = tensors["out.weight"].reshape(width, groups, group, head) @ shared
    tensors["out.weight"] = readers.flatten(1)
    found = narrowed_values(tensors, moments(), head, 2)
    assert torch.allclose(outputs(found), outputs(tensors), atol=1e-4 * float(outputs(tensors).abs().max()))
    assert not found["v.weight"].reshape(groups, head, width)[:, 2:].any()


def test_joint_readers_beat_values_alone_under_gqa() -> None:
    """A released re-implementation takes the SVD of the values only where heads share them: it is worse."""
    group, head, width, rank = 4, 8, 16, 3
    v, out, signal = _normal(head, width), _normal(width, group * head, seed=1), _normal(400, width, seed=2)
    out = out * torch.logspace(0, -2, head, dtype=DOUBLE).flip(0).repeat(group)  # readers ask little of most dimensions
    second = v @ (signal.t() @ signal / 400) @ v.t()
    readers = out.reshape(width, group, head).flatten(0, 1)
    basis = value_basis(out.reshape(width, group, head).unbind(1), [second] * group)
    down, up = basis.reduce[:rank], basis.restore[:, :rank]
    _, vectors = torch.linalg.eigh(second)
    alone = vectors[:, -rank:] @ vectors[:, -rank:].t()
    values = signal @ v.t()
    errors = [(values @ (torch.eye(head, dtype=DOUBLE) - m).t() @ readers.t()).norm() for m in (up @ down, alone)]
    assert errors[0] < 0.9 * errors[1]


def test_blocks_of_high_influence_keep_more() -> None:
    """Another re-implementation has the sign the other way round."""
    budget = _budget(_architecture("llama"), fraction=0.8, quantum=1)
    influence = torch.linspace(0.1, 0.5, len(budget.sizes.blocks))
    widths = [block.ffn for block in MoDeGpt(temperature=0.5)._sizes(budget, influence).blocks]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    even = MoDeGpt(temperature=1e9)._sizes(budget, influence)
    assert len({block.ffn for block in even.blocks}) == 1


def test_nystrom_reads_what_down_reads() -> None:
    """Not the output of ``gate`` before its activation, as a released re-implementation does: duplicates are exact."""
    architecture = _architecture("llama")
    view, sizes = _view(architecture), architecture.sizes
    width = sizes.blocks[0].ffn
    signal = _normal(400, width, seed=3)
    signal[:, : width // 2] = signal[:, :1]  # all the same: each of little leverage
    after = sizes.resized("ffn", width - width // 2 + 1)
    plan, evidence = Plan(sizes, after), _evidence(signal, "down")
    mend = MoDeGpt(modules="ffn", leverage=1e-9, damping=1e-10).mend(view, evidence, plan, 0)
    found = signal @ mend.edits["blocks.0.down.weight"].t()
    assert masking.difference(signal @ view.tensors["blocks.0.down.weight"].t(), found) < 1e-5


def test_modegpt_leaves_normalised_queries_alone_and_says_so() -> None:
    budget = _budget(_architecture("qwen3"))
    parts, skipped = MoDeGpt().parts(budget)
    assert parts == ["ffn", "value"]
    assert "normalised" in skipped["qk"]
    with pytest.raises(RequestError, match="module qk"):
        MoDeGpt(modules="ffn+qk").parts(budget)


# -- FLAP ------------------------------------------------------------------------------------------------------------


def test_wifv_is_the_error_that_its_own_compensation_leaves() -> None:
    """A variance per token: the released running one is about as many times larger as a window has tokens."""
    signal, weight = _normal(500, 6) * torch.arange(1, 7) + 3, _normal(5, 6, seed=1)
    sums = {"squares": signal.square().sum(0), "sum": signal.sum(0), "count": torch.tensor([500.0], dtype=DOUBLE)}
    found = Flap().channel_scores(weight, **sums)
    for j in range(6):
        left = torch.outer(signal[:, j] - signal[:, j].mean(), weight[:, j])
        assert float(found[j]) == pytest.approx(float(left.square().sum() / 499))
    assert torch.allclose(Flap(metric="ifv").channel_scores(weight, **sums), signal.var(0))
    wanda = (weight.abs() * signal.square().mean(0).sqrt()).mean(0)
    assert torch.allclose(Flap(metric="wifn").channel_scores(weight, **sums), wanda)


def test_a_dead_module_scores_zero_not_nan() -> None:
    assert not Flap().unit_scores(torch.zeros(8), 4, False).any()


def test_heads_count_at_their_real_cost() -> None:
    """The released code counts a head as 512 / 3 neurons, truncated to 170, whatever the model."""
    architecture = _architecture("llama")
    budget = _budget(architecture, fraction=0.85, quantum=1)
    scores = {}
    for kind in ("ffn", "kv"):
        spaces = Study(budget, torch.Generator(), None).spaces(kind)  # type: ignore[arg-type]
        scores[kind] = {space.name: _normal(space.size, seed=i) for i, space in enumerate(spaces)}
    after = budget.solve_ranked(scores)  # type: ignore[arg-type]
    assert budget.costs.params(after) == pytest.approx(0.85 * budget.costs.params(budget.sizes), rel=0.02)
    with pytest.raises(RequestError, match="native"):
        replace(budget, layout="native").solve_ranked(scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_goes_is_replaced_by_its_mean(family: str) -> None:
    """The edited biases make up for the means of removed channels, added where the stock class has none."""
    architecture = _architecture(family)
    view, method = _view(architecture), Flap()
    sizes = architecture.sizes
    budget = _budget(architecture)
    base = method._with_biases(budget)
    assert base.blocks[0].down_bias == (family == "llama")
    signal = _normal(50, sizes.blocks[0].ffn) + 2
    kept = torch.arange(0, sizes.blocks[0].ffn, 2)
    after = replace(base, blocks=tuple(replace(b, ffn=len(kept)) for b in base.blocks))
    blocks = range(len(sizes.blocks))
    summaries = {f"{canonical_name(b, 'down', 'weight')}.mean": [signal.mean(0)] for b in blocks}
    tensors = {name.replace("blocks.0", f"blocks.{b}"): t for b in blocks for name, t in view.tensors.items()}
    study = Study(
        budget, torch.Generator(), lambda place, _: BlockView(architecture, place, tensors), MappingProxyType(summaries)
    )
    plan = Plan(sizes, after, {f"blocks.{b}.ffn": kept for b in blocks})
    found = method._compensated(study, plan, ["ffn"])
    down = view.tensors["blocks.0.down.weight"]
    old = view.tensors.get("blocks.0.down.bias", torch.zeros(len(down), dtype=DOUBLE))
    filled = signal.mean(0).expand_as(signal).clone()
    filled[:, kept] = signal[:, kept]
    masked = torch.zeros_like(signal)
    masked[:, kept] = signal[:, kept]
    assert torch.allclose(masked @ down.t() + found.edits["blocks.0.down.bias"], filled @ down.t() + old)


def test_flap_allocates_evenly_in_the_native_layout() -> None:
    assert Flap().in_layout("native").structure == "ul-um"
    assert Flap().in_layout("per-layer").structure == "al-am"
    with pytest.raises(RequestError, match="al-am"):
        Flap(structure="al-am").in_layout("native")


# -- CFSP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_fine_score_depends_on_the_weights(family: str) -> None:
    """As released, normalised over each channel itself, it is the activation norm for whatever weights."""
    architecture = _architecture(family)
    view = _view(architecture)
    space = view.spaces("ffn")[0]
    evidence = _evidence(_normal(50, space.size, seed=8), "down", gram=False)
    activation = evidence["down.squares"].sqrt()
    released = torch.zeros(space.size, dtype=DOUBLE)
    parts = [view.tensors["blocks.0.down.weight"].abs() * activation]
    parts += [w.abs().t() for w in (view.matrix("up"), view.matrix("gate")) if w is not None]
    for part in parts:
        released += (part / part.sum(0, keepdim=True)).mean(0)
    released *= activation
    assert torch.allclose(released / released.sum(), activation / activation.sum())
    assert torch.equal(Cfsp(fine="activation").fine_score(view, space, evidence), activation)
    for fine in ("relative", "matrix"):
        found = Cfsp(fine=fine).fine_score(view, space, evidence)  # type: ignore[arg-type]
        assert (found / found.sum() - activation / activation.sum()).abs().max() > 1e-3
        louder = {**view.tensors, "blocks.0.up.weight": view.tensors["blocks.0.up.weight"].clone()}
        louder["blocks.0.up.weight"][0] *= 100
        changed = Cfsp(fine=fine).fine_score(BlockView(architecture, 0, louder), space, evidence)  # type: ignore[arg-type]
        assert changed[0] > found[0]


def test_angles_of_unchanged_streams_are_zero() -> None:
    """Rounding puts a cosine above one, whose arccos is not a number."""
    from secateur.evidence import Influence

    influence, signal = Influence(), _normal(3, 40, 7).float()
    influence.add(signal, signal * 1.7)
    assert influence.named()["influence"].isfinite().all()
    assert float(influence.named()["influence"][1]) < 1e-6


def test_blocks_that_turn_the_stream_more_stay_wider() -> None:
    budget = _budget(_architecture("llama"), fraction=0.8, quantum=1)
    coarse = torch.linspace(0.1, 0.3, len(budget.sizes.blocks))
    widths = [block.ffn for block in Cfsp()._sizes(budget, coarse).blocks]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert len({block.ffn for block in Cfsp(slope=0)._sizes(budget, coarse).blocks}) == 1
    own = Cfsp(sparsity=0.3)._sizes(budget, coarse).blocks
    mean = sum(block.ffn for block in own) / sum(block.ffn for block in budget.sizes.blocks)
    assert mean == pytest.approx(0.7, abs=0.03)


def test_widths_keep_to_the_quantum() -> None:
    budget = _budget(_architecture("llama"), fraction=0.8, quantum=16)
    coarse = torch.linspace(0.1, 0.3, len(budget.sizes.blocks))
    assert all(block.ffn % 16 == 0 for block in Cfsp()._sizes(budget, coarse).blocks)


# -- whole prunes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fasp", "flap", "cfsp", "modegpt"])
@pytest.mark.parametrize("share", [["--ratio", "0.15"], ["--set", "sparsity=0.25"]], ids=str)
def test_the_command_takes_a_ratio_and_the_papers_own(
    method: str, share: list[str], checkpoint: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(models.text(200))
    model = str(checkpoint("llama", torch.float32))
    words = ["prune", model, "--method", method, *share, "--data", str(notes), "--samples", "4", "--length", "32"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--layout", "per-layer", "-o", str(tmp_path / "out"), "--json"])
    assert not left.value.code
    achieved = json.loads(capsys.readouterr().out)["achieved"]
    assert achieved["params"] < achieved["params_before"]


@pytest.mark.assets
@pytest.mark.parametrize("method", ["fasp", "flap", "cfsp", "modegpt"])
def test_prunes_beat_random_on_the_text_they_saw(method: str, assets: Path, tmp_path: Path) -> None:
    """On a real model, per-layer layout: the written folder scores below random neurons at the same size."""
    text = assets / "text" / "tinystories-sample"
    given = {"ratio": 0.2, "text": str(text / "valid.txt"), "context": 256}
    data = {"data": text / "train.txt", "samples": 16, "length": 128, "layout": "per-layer"}
    model = assets / "lm" / "stories260k-llama"
    ours = secateur.prune(model, method=method, output=tmp_path / "ours", **given, **data)  # type: ignore[arg-type]
    chance = secateur.prune(model, method="random", output=tmp_path / "chance", **given)  # type: ignore[arg-type]
    assert ours.perplexity["after"] < chance.perplexity["after"]
    assert load(tmp_path / "ours") is not None
