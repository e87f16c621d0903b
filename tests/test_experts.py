"""Routed experts as units, and ``stun``: which experts become one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import grid
import masking
import models
import secateur
from conftest import Checkpoints
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.evidence import Routes
from secateur.methods.registry import describe_method
from secateur.methods.stun import Stun
from secateur.scores.experts import (
    clusters_after,
    coactivation_distances,
    complete_linkage,
    gram_of_rows,
    nearest_to_mean,
    router_distances,
)

EIGHT = {**models.ALL["mixtral"].config, "num_local_experts": 8}
DATA: dict[str, Any] = {"samples": 8, "length": 32}


def eight(folder: Path, **changes: Any) -> Path:
    """A tiny Mixtral with eight experts in each of three blocks, two of them for every token."""
    return models.save(folder, models.Tiny({**EIGHT, **changes}, model_type="mixtral"))


def block_experts(folder: Path) -> list[int]:
    """Experts of every block, as the record says."""
    return [block["experts"] for block in json.loads((folder / "secateur.json").read_text())["after"]["blocks"]]


# -- kernels ---------------------------------------------------------------------------------------------------------


def random_distances(size: int, seed: int) -> Tensor:
    values = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values + values.t()).fill_diagonal_(0)


def farthest(distances: Tensor, members: list[int]) -> float:
    """The largest distance within a set."""
    return max((float(distances[a, b]) for a, b in itertools.combinations(members, 2)), default=0.0)


@given(size=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_complete_linkage_is_that_of_its_definition(size: int, seed: int) -> None:
    distances = random_distances(size, seed)
    joins = complete_linkage(distances)
    clusters = [[expert] for expert in range(size)]
    for done, join in enumerate(joins, 1):
        pairs = list(itertools.combinations(clusters, 2))
        heights = [farthest(distances, one + other) for one, other in pairs]
        one, other = pairs[heights.index(min(heights))]
        clusters = sorted([sorted(one + other), *(c for c in clusters if c not in (one, other))])
        assert join.height == pytest.approx(min(heights))
        assert clusters_after(joins[:done], size) == clusters
        assert all(farthest(distances, cluster) <= join.height for cluster in clusters)
    assert [join.height for join in joins] == sorted(join.height for join in joins)


@given(size=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_the_representative_is_nearest_to_the_mean(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, width, generator=generator) for width in (3, 5)]
    rows, cluster = torch.cat(parts, 1), list(range(0, size, 2))
    gaps = (rows[cluster] - rows[cluster].mean(0)).norm(dim=1)
    chosen = nearest_to_mean(gram_of_rows(parts), cluster)
    assert float(gaps[cluster.index(chosen)]) == pytest.approx(float(gaps.min()), abs=1e-5)


def test_distances() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])
    assert torch.allclose(router_distances(rows) * (5 + 8 + 5) / 3, torch.cdist(rows, rows).double())
    together = torch.tensor([[9.0, 2.0, 1.0], [2.0, 5.0, 3.0], [1.0, 3.0, 4.0]])
    near = coactivation_distances(together)
    assert near[0].tolist() == [0, -1, -0.5]
    assert torch.equal(coactivation_distances(together, alike=False), -near)
    assert not coactivation_distances(torch.eye(3)).any()  # a router that sends every token to one expert


def test_routes_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(40)])
    weights = torch.rand(40, 3, generator=generator)
    routes = Routes(5, torch.device("cpu"))
    for part in (slice(0, 7), slice(7, 40)):
        routes.add(chosen[part], weights[part])
        routes.close_shard()
    together, mass = torch.zeros(5, 5), torch.zeros(5)
    for experts, weight in zip(chosen.tolist(), weights, strict=True):
        for a, b in itertools.product(experts, experts):
            together[a, b] += 1
        mass[experts] += weight
    found = routes.named("router")
    assert torch.equal(found["router.coactivation"], together.double())
    assert torch.allclose(found["router.mass"], mass.double())


# -- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe-dense"])
def test_evidence_is_what_the_stock_routers_do(
    family: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int | None, Tensor] = {}
    score = Stun.score

    def recorded(self: Stun, view: Any, evidence: Any) -> Any:
        if "router.coactivation" in evidence:
            seen[view.place] = evidence["router.coactivation"]
        return score(self, view, evidence)

    monkeypatch.setattr(Stun, "score", recorded)
    options = {"similarity": "mix", "representative": "busiest", "sparsity": 0.25}
    asked = {"model": str(checkpoint(family)), "method": "stun", "options": options, "data": str(notes), **DATA}
    run = Run(prepare(make_request(asked)), tmp_path / "out", Silent())
    run.plan()
    model, where = models.load(checkpoint(family)), models.ALL[family].where
    expected = {}
    for place, block in enumerate(model.get_submodule(where.blocks)):
        if hasattr(block.mlp, "experts"):
            block.get_submodule(where.router).register_forward_hook(
                lambda *given, place=place: expected.__setitem__(place, given[2][2])
            )
    assert run.windows is not None
    masking.logits(model, run.windows.ids)
    assert expected.keys() == seen.keys()
    for place, chosen in expected.items():
        counts = torch.zeros_like(seen[place])
        for a, b in itertools.product(range(chosen.shape[1]), repeat=2):
            counts.index_put_((chosen[:, a], chosen[:, b]), torch.ones(len(chosen)).double(), accumulate=True)
        assert torch.equal(counts, seen[place])


def test_data_is_needed_by_what_looks_at_tokens(checkpoint: Checkpoints, tmp_path: Path) -> None:
    assert describe_method("stun")["data"] == "none"
    assert Stun().data == "none"
    for options in ({"similarity": "mix"}, {"similarity": "traffic"}, {"representative": "busiest"}):
        assert Stun(**options).data == "text"
        error = grid.refusal(
            checkpoint("mixtral"), tmp_path / "out", {"method": "stun", "ratio": 0.1, "options": options}
        )
        assert error is not None
        assert error.code == "no-data"


# -- what goes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"representative": "busiest"}, {"average": 7}])
def test_planted_twins_become_one(options: dict[str, Any], notes: Path, tmp_path: Path) -> None:
    """Two experts equal up to noise are joined first, and no other expert is missed less.

    Every token visits one expert, so that without one of the twins it finds the other.
    """
    twins = {0: (1, 6), 1: (0, 7), 2: (3, 4)}

    def plant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        for block, (one, other) in twins.items():
            place = f"model.layers.{block}.block_sparse_moe"
            for name in ("w1", "w2", "w3"):
                like = tensors[f"{place}.experts.{one}.{name}.weight"]
                noise = 1e-5 * torch.randn(like.shape, generator=generator)
                tensors[f"{place}.experts.{other}.{name}.weight"] = like + noise
            gate = tensors[f"{place}.gate.weight"]
            gate[other] = gate[one] + 1e-5 * torch.randn(gate[one].shape, generator=generator)
        return tensors

    tiny = models.Tiny({**EIGHT, "num_experts_per_tok": 1}, model_type="mixtral")
    model, ids = models.save(tmp_path / "model", tiny, edit=plant), models.token_ids()
    asked = {"method": "stun", "options": {"sparsity": 0.125, **options}, "data": notes, **DATA}
    secateur.prune(model, output=tmp_path / "out", **asked)
    clusters = json.loads((tmp_path / "out" / "secateur.json").read_text())["notes"]["clusters"]
    joined = [[c for c in clusters[f"blocks.{block}.experts"] if len(c) > 1] for block in twins]
    assert joined == [[list(pair)] for pair in twins.values()]
    dense = masking.logits(models.load(model), ids)
    change = masking.difference(dense, masking.logits(models.load(tmp_path / "out"), ids))
    assert change < 1e-3
    for seed in range(3):
        other = tmp_path / str(seed)
        secateur.prune(
            model, method="random", options={"spaces": "experts", "sparsity": 0.125}, output=other, seed=seed
        )
        assert masking.difference(dense, masking.logits(models.load(other), ids)) > 10 * change


@pytest.mark.parametrize(("sparsity", "left"), [(0.125, 21), (0.3, 16), (0.5, 12), (0.75, 6)])
def test_counts_are_exact(sparsity: float, left: int, tmp_path: Path) -> None:
    """Of 24 experts in three blocks: one threshold for all, or as many in each; never fewer than a token visits."""
    model = eight(tmp_path / "model")
    for layout in ("native", "per-layer"):
        output = tmp_path / layout
        secateur.prune(model, method="stun", options={"sparsity": sparsity}, layout=layout, output=output)
        found = block_experts(output)
        assert min(found) >= 2
        assert sum(found) == (left if layout == "per-layer" else 3 * int(8 * (1 - sparsity)))


def test_a_ratio_is_met_to_the_nearest_expert(tmp_path: Path) -> None:
    model = eight(tmp_path / "model")
    one = 3 * 48 * 32 + 48  # parameters of an expert and its row of the router
    for layout, step in (("native", 3 * one), ("per-layer", one)):
        result = secateur.prune(model, method="stun", ratio=0.2, layout=layout, output=tmp_path / layout)
        before, after = result.achieved["params_before"], result.achieved["params"]
        assert (before - after) % step == 0
        assert abs(before - after - 0.2 * before) <= step / 2
        gone = before - after
        assert result.achieved["flops_per_token_before"] - result.achieved["flops_per_token"] == 2 * 48 * gone // one


def test_one_threshold_for_all_blocks(tmp_path: Path) -> None:
    """Every join below the threshold is made, none above it."""
    model, output = eight(tmp_path / "model"), tmp_path / "out"
    secateur.prune(model, method="stun", options={"sparsity": 0.25}, layout="per-layer", output=output)
    notes = json.loads((output / "secateur.json").read_text())["notes"]
    source = load_file(model / "model.safetensors")
    for block, left in enumerate(block_experts(output)):
        joins = complete_linkage(router_distances(source[f"model.layers.{block}.block_sparse_moe.gate.weight"]))
        assert 8 - left == sum(join.height <= notes["threshold"] + 1e-6 for join in joins)
        assert notes["clusters"][f"blocks.{block}.experts"] == clusters_after(joins[: 8 - left], 8)


@pytest.mark.parametrize("layout", ["native", "per-layer"])
@pytest.mark.parametrize("method", ["stun", "random"])
def test_a_token_has_to_find_its_experts(method: str, layout: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Two of four experts see every token: fewer cannot stay, however it is asked for."""
    spaces = {"spaces": "experts"} if method == "random" else {}
    too_few: list[dict[str, Any]] = [{"options": {**spaces, "sparsity": 0.75}}, {"ratio": 0.6, "options": spaces}]
    for asked in too_few:
        error = grid.refusal(checkpoint("mixtral"), tmp_path / "out", {"method": method, "layout": layout, **asked})
        assert error is not None
        assert (error.exit_code, error.code) == (2, "out-of-reach")
        assert not (tmp_path / "out").exists()
    half = {**spaces, "sparsity": 0.5}
    secateur.prune(checkpoint("mixtral"), method=method, layout=layout, options=half, output=tmp_path / "out")
    assert block_experts(tmp_path / "out") == [2, 2, 2]


def test_light_reconstruction(tmp_path: Path) -> None:
    """Blocks that end with few clusters take their means, rows of the router included; others a member each."""
    model = eight(tmp_path / "model")
    source = load_file(model / "model.safetensors")
    for average in (3, 0):
        output = tmp_path / str(average)
        secateur.prune(model, method="stun", options={"sparsity": 0.625, "average": average}, output=output)
        clusters = json.loads((output / "secateur.json").read_text())["notes"]["clusters"]
        found = load_file(output / "model.safetensors")
        for block in range(3):
            place = f"model.layers.{block}.block_sparse_moe"
            groups = clusters[f"blocks.{block}.experts"]
            rows = source[f"{place}.gate.weight"]
            assert len(groups) == len(found[f"{place}.gate.weight"]) == 3
            wanted = [rows[g].mean(0) for g in groups] if average else list(rows)
            assert all(any(torch.allclose(row, w, atol=1e-6) for w in wanted) for row in found[f"{place}.gate.weight"])
            w1 = [source[f"{place}.experts.{e}.w1.weight"] for e in range(8)]
            for new in range(3):
                tensor = found[f"{place}.experts.{new}.w1.weight"]
                candidates = [torch.stack([w1[e] for e in g]).mean(0) for g in groups] if average else w1
                assert any(torch.allclose(tensor, candidate, atol=1e-6) for candidate in candidates)


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "per-layer"])
def test_the_router_still_sums_to_one(layout: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    secateur.prune(eight(tmp_path / "model"), method="stun", options={"sparsity": 0.3}, layout=layout, output=output)
    model, left = models.load(output), block_experts(output)
    seen: dict[int, Any] = {}
    for place, block in enumerate(model.model.layers):
        block.mlp.gate.register_forward_hook(lambda *given, place=place: seen.__setitem__(place, given[2]))
    masking.logits(model, models.token_ids())
    for place, (logits, weights, chosen) in seen.items():
        assert logits.shape[1] == left[place]
        assert int(chosen.max()) < left[place]
        assert torch.allclose(weights.sum(1), torch.ones(len(weights)))
    assert (len(set(left)) > 1) is (layout == "per-layer")


@pytest.mark.parametrize("layout", ["native", "per-layer"])
def test_loads_without_secateur(layout: str, tmp_path: Path) -> None:
    output, ids = tmp_path / "out", models.token_ids(1, 8)
    model = eight(tmp_path / "model", output_router_logits=True)
    secateur.prune(model, method="stun", options={"sparsity": 0.5}, layout=layout, output=output)
    wanted = secateur.load(output).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert models.generated_alone(output, ids, tmp_path) == wanted.tolist()
    assert models.config(output)["num_local_experts"] == (4 if layout == "native" else 8)


@pytest.mark.parametrize("name", ["mixtral-sharded", "mixtral-fused"])
def test_disk_forms_cut_alike(name: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """One file per shard or experts stacked in it: the same model, experts numbered anew."""
    outputs = []
    for source in (name, "mixtral"):
        outputs.append(tmp_path / source)
        result = secateur.prune(checkpoint(source), method="stun", options={"sparsity": 0.25}, output=outputs[-1])
        grid.check_counts(result, outputs[-1])
    one, other = (models.load(output).state_dict() for output in outputs)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_pruned_again(tmp_path: Path) -> None:
    """In the per-layer layout a pruned output loses more experts, of which blocks have different numbers."""
    asked: dict[str, Any] = {"method": "stun", "layout": "per-layer"}
    secateur.prune(eight(tmp_path / "model"), output=tmp_path / "a", options={"sparsity": 0.25}, **asked)
    secateur.prune(tmp_path / "a", output=tmp_path / "b", options={"sparsity": 0.25}, **asked)
    first, second = block_experts(tmp_path / "a"), block_experts(tmp_path / "b")
    assert (sum(first), sum(second)) == (18, 13)
    assert all(after <= before for before, after in zip(first, second, strict=True))


def test_a_dense_model_has_none(checkpoint: Checkpoints, tmp_path: Path) -> None:
    error = grid.refusal(checkpoint(), tmp_path / "out", {"method": "stun", "ratio": 0.1})
    assert error is not None
    assert (error.exit_code, error.found) == (2, "its FFN has no experts")


def test_magnitude_counts_the_weights_it_says(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Of a unit all weights, those of the experts alone, or its row of the router alone."""
    source = load_file(checkpoint("mixtral") / "model.safetensors")
    energies: dict[str, list[Tensor]] = {"first": [], "reader": []}
    for block in range(3):
        place = f"model.layers.{block}.block_sparse_moe"
        energies["first"].append(source[f"{place}.gate.weight"].square().sum(1))
        own = [
            sum(source[f"{place}.experts.{e}.{w}.weight"].square().sum() for w in ("w1", "w2", "w3")) for e in range(4)
        ]
        energies["reader"].append(torch.stack([torch.as_tensor(value) for value in own]))
    energies["group"] = [sum(pair) for pair in zip(*energies.values(), strict=True)]
    for of, scores in energies.items():
        options = {"spaces": "experts", "of": of, "sparsity": 0.25}
        plan, _ = grid.plan_of(checkpoint("mixtral"), tmp_path / of, method="magnitude", options=options)
        for block, energy in enumerate(scores):
            gone = set(range(4)) - set(plan.kept[f"blocks.{block}.experts"].tolist())
            assert gone == {int(energy.argmin())}
