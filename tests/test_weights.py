"""Single weights as units: masks, densities, thresholds, scores and the sweep that mends, against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import models
import secateur
from conftest import Checkpoints
from secateur.budgets import densities
from secateur.budgets.thresholds import ranked_counts
from secateur.cuts.masks import best, parse_pattern
from secateur.cuts.orders import assigned, best_order, dealt, retained
from secateur.engine.readers import Readers
from secateur.errors import RequestError
from secateur.mends.obs import obs_sweep, shares_of
from secateur.methods.elementwise import Elementwise
from secateur.methods.registry import make_method
from secateur.plans import Masks
from secateur.scores.weights import lamp_scores, obs_scores, ria_scores, wanda_scores

DOUBLE = torch.float64


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# -- masks -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_the_best_weights_stay_and_ties_go_in_order(rows: int, columns: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 4), min_size=rows * columns, max_size=rows * columns))
    count = data.draw(st.integers(0, rows * columns))
    scores = torch.tensor(values, dtype=DOUBLE).view(rows, columns)
    order = sorted(range(rows * columns), key=lambda i: (-values[i], i))
    mask = best(scores, count)
    assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:count])


@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_every_row_keeps_as_many(rows: int, columns: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    scores = _random(data.draw(st.integers(0, 99)), rows, columns)
    mask = best(scores, count, "row")
    kept = mask.sum(1)
    assert int(kept.sum()) == count
    assert set(kept.tolist()) <= {count // rows, count // rows + 1}
    for row, each in enumerate(kept.tolist()):
        assert set(mask[row].nonzero().flatten().tolist()) == set(scores[row].topk(each).indices.tolist())


@given(st.integers(1, 5), st.integers(1, 19), st.sampled_from(["1:2", "2:4", "1:4", "4:8", "3:7"]), st.integers(0, 99))
def test_of_every_m_inputs_n_stay(rows: int, columns: int, spelled: str, seed: int) -> None:
    pattern, scores = parse_pattern(spelled), _random(seed, rows, columns)
    mask = best(scores, 0, pattern=pattern)
    assert int(mask.sum()) == pattern.count((rows, columns))
    for row, first in itertools.product(range(rows), range(0, columns, pattern.of)):
        group = scores[row, first : first + pattern.of]
        chosen = set(mask[row, first : first + pattern.of].nonzero().flatten().tolist())
        assert chosen == set(group.topk(min(pattern.kept, len(group))).indices.tolist())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.data())
def test_blocks_go_together(rows: int, columns: int, high: int, wide: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, rows * columns))
    mask = best(_random(seed, rows, columns), count, pattern=parse_pattern(f"{high}x{wide}"))
    for top, left in itertools.product(range(0, rows, high), range(0, columns, wide)):
        assert mask[top : top + high, left : left + wide].unique().numel() == 1
    assert abs(int(mask.sum()) - count) <= high * wide


@pytest.mark.parametrize("spelled", ["4:2", "0:4", "2:2", "2x", "two", "", "2:4:8", "-1x2"])
def test_a_pattern_that_is_none_is_refused(spelled: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    options = {"spaces": "weights", "pattern": spelled}
    with pytest.raises(RequestError) as caught:
        secateur.prune(checkpoint(), method="magnitude", options=options, output=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_masks_on_disk_are_bits(tmp_path: Path) -> None:
    mask = _random(0, 13, 37) > 0
    Masks(tmp_path).write("blocks.3", {"blocks.3.q.weight": mask, "blocks.3.k.weight": ~mask})
    read = Masks(tmp_path)
    assert torch.equal(read["blocks.3.q.weight"], mask)
    assert torch.equal(read.of("blocks.3")["blocks.3.k.weight"], ~mask)
    assert (tmp_path / "plan-masks-blocks.3.safetensors").stat().st_size < 2 * (13 * 37 // 8 + 1) + 400


# -- orders of the inputs ----------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 21), st.sampled_from(["1:2", "2:4", "1:4", "2:3"]), st.integers(0, 99))
def test_an_assignment_loses_nothing_of_what_was_dealt(rows: int, columns: int, spelled: str, seed: int) -> None:
    scores, pattern = _random(seed, rows, columns).square(), parse_pattern(spelled)
    first = dealt(scores, pattern)
    second = assigned(scores, first, pattern)
    for order in (first, second, best_order(scores, pattern), best_order(scores, pattern, assign=True)):
        assert sorted(order.tolist()) == list(range(columns))
    assert retained(scores[:, second], pattern) >= retained(scores[:, first], pattern) - 1e-9
    assert retained(scores[:, best_order(scores, pattern)], pattern) >= retained(scores, pattern)


def test_channels_that_matter_are_dealt_to_different_groups() -> None:
    """Strips of the ranking, every second one backwards; here that is the best of all orders."""
    scores = torch.tensor([[9.0, 8.0, 7.0, 3.0, 2.0, 1.0]])
    pattern = parse_pattern("1:2")
    assert dealt(scores, pattern).tolist() == [0, 5, 1, 4, 2, 3]
    assert retained(scores[:, dealt(scores, pattern)], pattern) == 24
    assert retained(scores, pattern) == 9 + 7 + 2


@pytest.mark.parametrize("seed", range(5))
def test_assignments_come_near_the_best_of_all_orders(seed: int) -> None:
    scores, pattern = _random(seed, 4, 6).square(), parse_pattern("1:2")
    orders = (torch.tensor(order) for order in itertools.permutations(range(6)))
    most = max(retained(scores[:, order], pattern) for order in orders)
    found = retained(scores[:, best_order(scores, pattern, assign=True)], pattern)
    assert retained(scores, pattern) <= found <= most + 1e-9
    assert found > 0.95 * most


# -- densities ---------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@given(SIZES, st.data())
def test_fill_is_exact_within_floors_and_caps(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    caps = {str(i): rows * columns for i, (rows, columns) in enumerate(sizes)}
    floors = {name: data.draw(st.integers(0, cap)) for name, cap in caps.items()}
    weights = {name: data.draw(st.floats(0, 10)) for name in caps}
    total = data.draw(st.integers(sum(floors.values()), sum(caps.values())))
    counts = densities.fill(weights, caps, total, floors)
    assert sum(counts.values()) == total
    assert all(floors[name] <= counts[name] <= caps[name] for name in caps)


@given(SIZES, st.floats(0.05, 1))
def test_uniform_densities_differ_by_less_than_one_weight(sizes: list[tuple[int, int]], share: float) -> None:
    shapes = {str(i): shape for i, shape in enumerate(sizes)}
    total = int(share * sum(rows * columns for rows, columns in sizes))
    counts = densities.uniform(shapes, total)
    exact = total / sum(rows * columns for rows, columns in sizes)
    assert all(abs(counts[name] - exact * rows * columns) <= 1 for name, (rows, columns) in shapes.items())


def test_erk_is_the_published_recursion() -> None:
    """The loop of the released code: what would be denser than dense is dense, and epsilon is solved again."""
    shapes = {"a": (512, 64), "b": (64, 64), "c": (1000, 300), "d": (8, 64)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    density, dense = 0.2, set[str]()
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    while True:
        spare = sum(density * sizes[n] for n in shapes if n not in dense) - sum((1 - density) * sizes[n] for n in dense)
        epsilon = spare / sum(raw[n] * sizes[n] for n in shapes if n not in dense)
        worst = max((n for n in shapes if n not in dense), key=lambda n: raw[n])
        if epsilon * raw[worst] <= 1:
            break
        dense.add(worst)
    assert dense
    expected = {n: sizes[n] if n in dense else epsilon * raw[n] * sizes[n] for n in shapes}
    counts = densities.erk(shapes, round(density * sum(sizes.values())))
    assert all(abs(counts[n] - expected[n]) <= 1 for n in shapes)
    assert sum(counts.values()) == round(density * sum(sizes.values()))


def test_owl_keeps_the_mean_and_the_spread() -> None:
    shares = densities.owl_shares([0.01, 0.03, 0.02, 0.09], 0.5, 0.08)
    assert sum(shares) / 4 == pytest.approx(0.5)
    assert max(shares) - min(shares) == pytest.approx(0.16)
    assert sorted(range(4), key=lambda i: shares[i]) == [0, 2, 1, 3]
    assert densities.owl_shares([0.02, 0.02], 0.4, 0.08) == [0.4, 0.4]


def test_a_floor_is_held_and_paid_by_the_others() -> None:
    """A matrix a thousand times smaller: a plain ranking empties it, with the threshold it keeps exactly that much."""
    scores = {"a": _random(0, 40, 30).abs(), "b": 1e-3 * _random(1, 40, 30).abs(), "c": _random(2, 2, 3).abs()}
    caps = {name: each.numel() for name, each in scores.items()}

    def rank(some: dict[str, int], total: int) -> dict[str, int]:
        return ranked_counts(lambda: ((name, scores[name]) for name in some), total)

    assert rank(caps, 500)["b"] == 0
    counts = densities.with_floor(rank, caps, 500, 20)
    assert counts["b"] == 20
    assert counts["c"] == 6
    assert sum(counts.values()) == 500
    with pytest.raises(RequestError, match="floors"):
        densities.with_floor(rank, caps, 30, 20)


@given(st.lists(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_one_ranking_of_all_is_exact(matrices: list[list[float]], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(map(len, matrices))))
    counts = ranked_counts(lambda: ((str(i), torch.tensor(m)) for i, m in enumerate(matrices)), total)
    every = [(-np.float32(value) + np.float32(0), i) for i, matrix in enumerate(matrices) for value in matrix]
    expected = [i for _, i in sorted(every)[:total]]
    assert [counts[str(i)] for i in range(len(matrices))] == [expected.count(i) for i in range(len(matrices))]


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_their_formulas() -> None:
    weight, signal = _random(0, 5, 7).float(), _random(1, 50, 7)
    squares = signal.square().mean(0)
    assert torch.allclose(wanda_scores(weight, squares), weight.abs() * signal.norm(dim=0).float() / 50**0.5)
    size = weight.abs()
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    assert torch.allclose(ria_scores(weight, squares, 0.5), relative * squares.float() ** 0.25)
    assert torch.equal(wanda_scores(weight, torch.zeros(7)), size), "an expert that saw nothing goes by magnitude"
    gram = signal.t() @ signal
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(7))
    assert torch.allclose(obs_scores(weight, gram, 0.01), weight.double().square() / inverse.diagonal())


def test_lamp_scores_end_in_one_and_know_no_scale() -> None:
    weight = _random(0, 6, 9)
    scores = lamp_scores(weight.abs())
    assert float(scores.max()) == 1
    assert torch.allclose(lamp_scores(1e3 * weight.abs()), scores)
    order = weight.abs().flatten().argsort()
    assert (scores.flatten()[order].diff() > 0).all()
    u = (2, 5)
    tail = weight[weight.abs() >= weight[u].abs()].square().sum()
    assert float(scores[u]) == pytest.approx(float(weight[u] ** 2 / tail))


# -- the sweep that mends ----------------------------------------------------------------------------------------------


def _fixed(mask: Tensor) -> object:
    return lambda _, start, stop: mask[:, start:stop]


@pytest.mark.parametrize("width", [3, 8, 100])
def test_the_sweep_is_optimal_where_each_row_loses_one_weight(width: int) -> None:
    """Then the columns before it have nothing to make up for, if it stands first; least squares says the same."""
    weight, signal = _random(0, 4, 12), _random(1, 300, 12)
    gram = signal.t() @ signal
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 0] = False
    found, stays = obs_sweep(weight, gram, _fixed(mask), damping=1e-12, width=width)  # type: ignore[arg-type]
    assert torch.equal(stays, mask)
    expected = torch.linalg.lstsq(signal[:, 1:], signal @ weight.t()).solution.t()
    assert torch.allclose(found[:, 1:], expected, atol=1e-8)
    assert not found[:, 0].any()


def test_the_sweep_comes_near_the_optimum_and_lazy_updates_change_nothing() -> None:
    weight = _random(0, 6, 32)
    signal = _random(1, 400, 8) @ _random(2, 8, 32) + 0.3 * _random(3, 400, 32)  # inputs that say much the same
    gram = signal.t() @ signal
    mask = best(obs_scores(weight, gram, 1e-6), 96, "row")
    sweeps = [obs_sweep(weight, gram, _fixed(mask), damping=1e-9, width=w)[0] for w in (5, 32)]  # type: ignore[arg-type]
    assert torch.allclose(*sweeps, atol=1e-9)

    def loss(new: Tensor) -> float:
        return float(((new - weight) @ signal.t()).square().sum())

    exact = torch.zeros_like(weight)
    for row in range(6):
        kept = mask[row]
        exact[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row])
    masked, swept, best_of_all = (loss(new) for new in (weight * mask, sweeps[0], exact))
    assert best_of_all <= swept < masked - 0.5 * (masked - best_of_all)


def _step_by_step(weight: Tensor, gram: Tensor, chosen: Callable[[Tensor, int], Tensor | None]) -> Tensor:
    """OBS as the paper states it: after every column the inverse of the Hessian of those behind it, nothing shared.

    A column q whose weights w go is zero, and what is behind it becomes w_F - w / [H_F^-1]_qq [H_F^-1]_q,F, with F the
    columns from q on. ``chosen`` is given the scores w^2 / [H_F^-1]_qq that the columns from q on have as they stand.
    """
    new, columns = weight.clone(), weight.shape[1]
    stays = torch.ones_like(weight, dtype=torch.bool)
    for q in range(columns):
        # [H_F^-1]_jj where the columns between q and j are done with too: the diagonal that a sweep meets
        diagonal = torch.stack([torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(q, columns)])
        mask = chosen(new[:, q:].square() / diagonal, q)
        if mask is not None:
            stays[:, q : q + mask.shape[1]] = mask
        inverse = torch.linalg.inv(gram[q:, q:])
        gone = torch.where(stays[:, q], 0.0, new[:, q])
        new[:, q:] -= torch.outer(gone / inverse[0, 0], inverse[0])
        new[:, q] = torch.where(stays[:, q], new[:, q], 0.0)
    return new


@pytest.mark.parametrize("size", ["half", "2:4", "given"])
def test_the_sweep_is_the_papers_one_column_after_the_other(size: str) -> None:
    weight, signal, damping = _random(0, 6, 24), _random(1, 200, 24) @ _random(2, 24, 24), 0.02
    gram = signal.t() @ signal
    damped = gram + damping * gram.diagonal().mean() * torch.eye(24, dtype=DOUBLE)
    given, half, width = _random(3, 6, 24) > 0.3, 6 * 8 // 2, 8

    def lowest(scores: Tensor, count: int) -> Tensor:
        """Which of the scores of some rows stay when the lowest of each go, one by one."""
        stays = torch.ones_like(scores, dtype=torch.bool)
        for row in range(len(scores)):
            for column in sorted(range(scores.shape[1]), key=lambda column: float(scores[row, column]))[:count]:
                stays[row, column] = False
        return stays

    def chosen(scores: Tensor, q: int) -> Tensor | None:
        if size == "given":
            return given[:, q : q + 1]
        if size == "2:4":
            return lowest(scores[:, :4], 2) if q % 4 == 0 else None
        return lowest(scores[:, :width].reshape(1, -1), half).view(6, width) if q % width == 0 else None

    def choose(scores: Tensor, start: int, stop: int) -> Tensor:
        if size == "given":
            return given[:, start:stop]
        return best(scores, half, pattern=parse_pattern("2:4" if size == "2:4" else "element"))

    expected = _step_by_step(weight, damped, chosen)
    step = 4 if size == "2:4" else None
    found, stays = obs_sweep(weight, gram, choose, damping=damping, width=width, step=step)
    assert torch.equal(stays, expected != 0)
    assert torch.allclose(found, expected, atol=1e-10)


def test_the_sweep_counts_exactly_and_drops_dead_inputs() -> None:
    weight, signal = _random(0, 6, 30), _random(1, 300, 30)
    signal[:, 4] = 0
    share = shares_of(77, 30)
    new, mask = obs_sweep(weight, signal.t() @ signal, lambda s, a, b: best(s, share(a, b)), width=8)
    assert int(mask.sum()) == 77
    assert not new[~mask].any()
    assert not new[:, 4].any()
    ordered = torch.argsort(signal.square().sum(0), descending=True)
    again, other = obs_sweep(weight, signal.t() @ signal, lambda s, a, b: best(s, share(a, b)), width=8, order=ordered)
    assert int(other.sum()) == 77
    assert not torch.equal(again, new)


# -- whole prunes ------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_all_parameters_and_the_pattern_is_a_size(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = checkpoint()
    result = secateur.prune(
        model, method="magnitude", ratio=0.3, options={"spaces": "weights"}, output=tmp_path / "third"
    )
    assert result.achieved["nonzero_before"] - result.achieved["nonzero"] == round(0.3 * result.achieved["params"])
    assert result.achieved["bytes"] == result.achieved["bytes_before"]
    options = {"spaces": "weights", "pattern": "2:4"}
    secateur.prune(model, method="magnitude", options=options, output=tmp_path / "pairs")
    for name, values in models.load(tmp_path / "pairs").named_parameters():
        if name.endswith("proj.weight"):
            assert ((values.view(len(values), -1, 4) != 0).sum(-1) == 2).all()
    with pytest.raises(RequestError, match="2:4 leaves"):
        secateur.prune(model, method="magnitude", ratio=0.2, options=options, output=tmp_path / "no")
    with pytest.raises(RequestError, match="can become zero"):
        secateur.prune(model, method="magnitude", ratio=0.95, options={"spaces": "weights"}, output=tmp_path / "no")
    with pytest.raises(RequestError, match="zeros change nothing about flops"):
        secateur.prune(
            model, method="magnitude", target=["flops=50%"], options={"spaces": "weights"}, output=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ["global_mp", "lamp", "random_pruning_erk"])
def test_densities_of_the_named_methods(method: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    result = secateur.prune(checkpoint(), method=method, options={"sparsity": 0.9}, output=tmp_path / "out")
    loaded = models.load(tmp_path / "out")
    kept = {n: int((p != 0).sum()) for n, p in loaded.named_parameters() if n.endswith("proj.weight")}
    sizes = {n: p.numel() for n, p in loaded.named_parameters() if n in kept}
    assert sum(kept.values()) == sum(sizes.values()) - int(0.9 * sum(sizes.values()) + 1e-9)
    assert all(kept.values())
    assert len({round(kept[n] / sizes[n], 3) for n in kept}) > 1
    assert result.achieved["params"] == result.achieved["params_before"]


def test_folded_neurons_are_the_models_own_in_another_order(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """The file is 2:4, and every neuron of it has the gate, up and down weights of one neuron of the source."""
    model, output = checkpoint(), tmp_path / "out"
    options = {"pattern": "2:4", "permute": "fold", "search": "assign"}
    secateur.prune(model, method="ria", options=options, data=notes, samples=4, length=32, output=output)
    before, after = (dict(models.load(path).named_parameters()) for path in (model, output))
    moved = 0
    for name, kept in after.items():
        if name.endswith("proj.weight"):
            assert ((kept.view(len(kept), -1, 4) != 0).sum(-1) == 2).all()
        if not name.endswith("down_proj.weight"):
            continue
        parts = [name.replace("down", part) for part in ("gate", "up")]
        sources = {
            key: torch.cat([*(table[p].detach() for p in parts), table[name].detach().T], 1)
            for key, table in (("before", before), ("after", after))
        }
        there = [
            int(((sources["before"] == neuron) | (neuron == 0)).all(1).nonzero().item()) for neuron in sources["after"]
        ]
        assert sorted(there) == list(range(len(there)))
        moved += sum(index != place for place, index in enumerate(there))
    assert moved


def test_the_word_none_is_a_choice_where_there_is_such_a_choice() -> None:
    assert make_method("ria", {"permute": "none"}).model_dump()["permute"] == "none"
    assert make_method("ria", {"sparsity": "none"}).sparsity is None
    with pytest.raises(RequestError, match="permute=None"):
        make_method("ria", {"permute": None})


def test_an_order_is_for_patterns(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"permute": "fold", "sparsity": 0.5}, "has no groups"),
        ({"permute": "fold", "pattern": "2:4", "part": "attention"}, "leaves them alone"),
    ):
        with pytest.raises(RequestError, match=words):
            secateur.prune(checkpoint(), method="wanda", options=options, data=notes, output=tmp_path / "no")


def test_no_inputs_are_kept_of_a_block_that_is_rewritten(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix changes, so that no later run could use them; keeping them gives the same bits."""
    kept: list[str] = []
    place = Readers._place

    def watched(self: Readers, role: str, *rest: Any) -> Tensor | None:
        kept.append(role)
        return place(self, role, *rest)

    monkeypatch.setattr(Readers, "_place", watched)
    options = {"model": checkpoint(), "method": "sparsegpt", "options": {"sparsity": 0.5}, "data": notes}
    written = []
    for rewrites in (True, False):
        monkeypatch.setattr(Elementwise, "rewrites", rewrites)
        output = tmp_path / str(rewrites)
        secateur.prune(**options, samples=8, length=32, output=output)
        written.append((output / "model.safetensors").read_bytes())
        assert bool(kept) != rewrites
    assert written[0] == written[1]


def test_a_matrix_that_saw_nothing_goes_by_magnitude() -> None:
    """An expert without tokens keeps as many weights as any other, and as they are."""
    weight = _random(0, 6, 30)
    share = shares_of(90, 30)
    new, mask = obs_sweep(weight, torch.zeros(30, 30, dtype=DOUBLE), lambda s, a, b: best(s, share(a, b)), width=30)
    assert torch.equal(mask, best(weight.abs(), 90))
    assert torch.equal(new, weight * mask)
