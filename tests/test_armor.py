"""ARMOR: every step a descent, every group and wrapper at its optimum, the factors those of the written weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import models
import secateur
from conftest import Checkpoints
from secateur.checkpoints import Checkpoint, Folder
from secateur.cuts.factors import Factors, Stored, largest_block, wrapped
from secateur.cuts.masks import Pattern, best, parse_pattern
from secateur.errors import RequestError
from secateur.mends.obs import obs_sweep
from secateur.mends.wrapped import Descent, all_supports, normalised
from secateur.plans import FactorFiles

DOUBLE = torch.float64
PAIRS = parse_pattern("2:4")
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 19))
PATTERNS = st.sampled_from(["2:4", "1:4", "3:4", "1:3", "4:8"]).map(parse_pattern)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _inputs(seed: int, width: int, correlated: bool) -> Tensor:
    """Second moments of signals, or their diagonal alone."""
    signal = _random(seed + 1, 50, width) @ (torch.eye(width, dtype=DOUBLE) + 0.5 * _random(seed + 2, width, width))
    gram = signal.t() @ signal / 50
    return gram if correlated else gram.diagonal()


def _descent(
    seed: int,
    shape: tuple[int, int],
    pattern: Pattern = PAIRS,
    block: int = 4,
    correlated: bool = False,
    damping: float = 1e-9,
) -> Descent:
    """A descent that has moved a little, so that no wrapper is the identity any more."""
    weight, metric = _random(seed, *shape), _inputs(seed, shape[1], correlated)
    scores = weight.square() * (metric.diagonal() if correlated else metric)
    found = Descent(weight, metric, weight, best(scores, 0, pattern=pattern), pattern, block, damping)
    list(found.exactly(1))
    return found


def _error(descent: Descent, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The weighed error by another way: dense wrappers, the root of the metric."""
    metric = descent.metric if descent.metric.ndim == 2 else torch.diag(descent.metric)
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp(min=0).sqrt()
    return (descent.weight - torch.block_diag(*left) @ core @ torch.block_diag(*right)) @ root


# -- descent -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(SHAPES, PATTERNS, st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_no_step_raises_the_loss(
    shape: tuple[int, int], pattern: Pattern, block: int, correlated: bool, seed: int
) -> None:
    descent = _descent(seed, shape, pattern, block, correlated, damping=1e-6)
    loss = descent.loss()
    for step in (descent.fit_left, descent.sweep_core, descent.fit_right, descent.sweep_core, descent.fit_left):
        step()
        assert descent.loss() <= loss + 1e-12
        loss = descent.loss()
    core, mask = descent.state.core, descent.state.mask
    assert not core[~mask].any()
    groups = mask.view(len(mask), -1, pattern.of).sum(-1)
    assert int(groups.max()) <= pattern.kept
    assert not core[shape[0] :].any(), "rows that only fill up a block hold values"
    assert not core[:, shape[1] :].any()
    error = _error(descent, descent.state.left, core, descent.state.right)
    whole = _error(descent, descent.state.left, 0 * core, descent.state.right)
    assert loss == pytest.approx(float(error.square().sum() / whole.square().sum()), rel=1e-6, abs=1e-12)


@settings(max_examples=15)
@given(SHAPES, st.integers(0, 99))
def test_the_loss_starts_at_the_best_mask_and_is_below_every_other_of_the_pattern(
    shape: tuple[int, int], seed: int
) -> None:
    """With the diagonal proxy no matrix of the pattern is better than the start: not sparsegpt's either."""
    weight, gram = _random(seed, *shape), _inputs(seed, shape[1], True)
    scaled, rows, columns = normalised(weight)
    assert torch.allclose(scaled * rows[:, None] * columns, weight)
    metric = gram.diagonal()
    mask = best(scaled.square() * metric, 0, pattern=PAIRS)
    descent = Descent(scaled, metric, scaled, mask, PAIRS, 4)
    start = descent.loss()

    def proxy(matrix: Tensor) -> float:
        return float(((scaled - matrix).square() * metric).sum() / (scaled.square() * metric).sum())

    swept, _ = obs_sweep(weight, gram, lambda s, *_: best(s, 0, pattern=PAIRS), step=4)
    assert start == pytest.approx(proxy(scaled * mask))
    assert start <= proxy(swept / rows[:, None] / columns) + 1e-12
    losses = list(descent.exactly(5))
    assert all(one >= other for one, other in zip([start, *losses], losses, strict=False))
    assert descent.loss() == min([start, *losses])


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("spelled", ["2:4", "1:3"])
def test_a_group_is_the_best_of_all_supports(spelled: str, correlated: bool) -> None:
    """Against least squares on every support, one by one, with everything else held."""
    pattern = parse_pattern(spelled)
    for seed in range(6):
        descent = _descent(seed, (6, 12), pattern, 6, correlated, damping=1e-12)
        descent.fit_left()
        before = descent.state
        descent.improve_groups(torch.Generator().manual_seed(seed))
        changed = (descent.state.core != before.core).nonzero()
        assert len(changed), "nothing moved: the test proves nothing"
        row, first = int(changed[0][0]), int(changed[0][1]) // pattern.of * pattern.of
        here = slice(first, first + pattern.of)
        without = before.core.clone()
        without[row, here] = 0
        target = _error(descent, before.left, without, before.right).flatten()
        found = {}
        for support in all_supports(pattern):
            columns = []
            for j in support.nonzero().flatten().tolist():
                unit = torch.zeros_like(without)
                unit[row, first + j] = 1
                none = _error(descent, before.left, 0 * unit, before.right)
                columns.append((none - _error(descent, before.left, unit, before.right)).flatten())
            matrix = torch.stack(columns, 1)
            solution = torch.linalg.lstsq(matrix, target).solution
            found[tuple(support.tolist())] = (float((target - matrix @ solution).square().sum()), solution)
        support, (_, values) = min(found.items(), key=lambda item: item[1][0])
        assert tuple(descent.state.mask[row, here].tolist()) == support
        assert torch.allclose(descent.state.core[row, here][torch.tensor(support)], values, atol=1e-6)


@pytest.mark.parametrize("correlated", [False, True])
def test_the_wrappers_are_least_squares(correlated: bool) -> None:
    descent = _descent(3, (8, 12), block=4, correlated=correlated, damping=1e-12)
    descent.sweep_core()
    descent.fit_left()
    state = descent.state
    metric = descent.metric if correlated else torch.diag(descent.metric)
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt()
    inner = state.core @ torch.block_diag(*state.right) @ root
    for j, block in enumerate(state.left):
        here = slice(4 * j, 4 * j + 4)
        expected = torch.linalg.lstsq(inner[here].t(), (descent.weight @ root)[here].t()).solution.t()
        assert torch.allclose(block, expected, atol=1e-6)
    descent.fit_right()
    outer = torch.block_diag(*state.left) @ state.core
    right = list(state.right)
    for k in range(3):  # each for those before it
        here = slice(4 * k, 4 * k + 4)
        others = [each if i != k else torch.zeros_like(each) for i, each in enumerate(right)]
        target = ((descent.weight - outer @ torch.block_diag(*others)) @ root).flatten()
        units = torch.eye(16, dtype=DOUBLE).view(16, 4, 4)
        columns = torch.stack([(outer[:, here] @ unit @ root[here]).flatten() for unit in units], 1)
        right[k] = torch.linalg.lstsq(columns, target).solution.view(4, 4)
        assert torch.allclose(descent.state.right[k], right[k], atol=1e-5)


def test_adam_goes_down_and_ends_at_its_best_state() -> None:
    weight, metric = _random(0, 12, 16), _inputs(0, 16, False)
    mask = best(weight.square() * metric, 0, pattern=PAIRS)

    def run(rate: float, seed: int = 0) -> tuple[Descent, list[float]]:
        descent = Descent(weight, metric, weight, mask, PAIRS, 4)
        return descent, list(descent.gradually(60, rate, torch.Generator().manual_seed(seed)))

    start = Descent(weight, metric, weight, mask, PAIRS, 4).loss()
    descent, losses = run(1e-2)
    assert descent.loss() < 0.7 * start
    again, _ = run(1e-2)
    assert torch.equal(again.state.core, descent.state.core)
    assert not torch.equal(run(1e-2, 1)[0].state.core, descent.state.core)
    wild, losses = run(3.0)
    assert max(losses) > start, "nothing went up: the test proves nothing"
    assert wild.loss() == min(start, *losses)


# -- what is stored ----------------------------------------------------------------------------------------------------


@given(SHAPES, PATTERNS, st.integers(1, 9))
def test_stored_sizes_are_those_of_the_tensors(shape: tuple[int, int], pattern: Pattern, block: int) -> None:
    mask = best(_random(0, *shape), 0, pattern=pattern)
    weight = _random(1, *shape)
    descent = Descent(weight, torch.ones(shape[1], dtype=DOUBLE), weight, mask, pattern, block)
    found = Factors(descent.state.left, weight[mask], mask, descent.state.right)
    assert torch.equal(found.product(), weight * mask)
    assert torch.equal(wrapped(found.left, weight * mask, found.right), weight * mask)
    foreseen = Stored.foreseen(shape, block, pattern, 8)
    assert (foreseen.parameters, foreseen.bytes) == (found.parameters, found.bytes)
    assert foreseen.bytes - foreseen.plain_bytes == 8 * (found.left.numel() + found.right.numel())


def test_blocks_follow_from_the_share() -> None:
    assert largest_block((4096, 4096), 0.0625, 128, 4) == 128
    assert largest_block((256, 256), 0.0625, 128, 4) == 8
    assert largest_block((64, 64), 0.0625, 128, 4) == 4, "a block holds a group"
    assert largest_block((4096, 4096), 0.0624, 128, 4) == 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_factors_multiply_out_to_the_written_weights(
    family: str, checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    model = checkpoint(family)
    few = {"samples": 1, "length": 8} if family == "mixtral" else {"samples": 8, "length": 24}  # experts without tokens
    options = {"sweeps": 4, "proxy": "diagonal"}
    runs = [
        secateur.prune(model, method="armor", data=notes, options=options, output=tmp_path / name, **few)
        for name in ("one", "two")
    ]
    written = Checkpoint(Folder(tmp_path / "one"))
    files, again = (FactorFiles(tmp_path / name / "learned") for name in ("one", "two"))
    matrices = Factors.matrices(files)
    assert len(matrices) == {"llama": 21, "gpt2": 18, "mixtral": 48}[family]
    dense = stored = 0
    for name in matrices:
        factors, values = Factors.of(files, name), written.read(int(name.split(".")[1]))[name]
        assert torch.equal(factors.product().to(values.dtype), values)
        assert int(factors.mask.view(len(values), -1, 4).sum(-1).max()) == 2
        start, reached = files[f"{name}.losses"].tolist()
        assert reached < start
        assert all(torch.equal(files[f"{name}.{part}"], again[f"{name}.{part}"]) for part in ("left", "values"))
        dense, stored = dense + values.numel(), stored + factors.parameters
    achieved = runs[0].achieved
    assert achieved["params"] == achieved["params_before"]
    assert achieved["params"] - achieved["factored_params"] == dense - stored
    foreseen = secateur.preview(model, method="armor", options=options)["achieved"]
    assert {key: foreseen[key] for key in foreseen if "factored" in key} == {
        key: achieved[key] for key in achieved if "factored" in key
    }
    assert models.load(tmp_path / "one").config.model_type == family


def test_options_that_cannot_be_are_refused(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    for options, ratio, found in (
        ({"pattern": "element"}, None, "not N:M"),
        ({"pattern": "8:16"}, None, "not N:M"),
        ({}, 0.01, "with its wrappers leaves"),
    ):
        with pytest.raises(RequestError, match=found):
            secateur.prune(
                checkpoint(), method="armor", ratio=ratio, data=notes, options=options, output=tmp_path / "no"
            )
    assert not (tmp_path / "no").exists()


def test_few_tokens_do_not_let_the_wrappers_grow(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    """Experts that saw fewer tokens than they have inputs: their Gram says nothing of most directions."""
    model = checkpoint("mixtral")
    options = {"pattern": "2:4", "sweeps": 4}
    secateur.prune(model, method="armor", data=notes, options=options, samples=2, length=8, output=tmp_path / "out")
    before, after = (dict(models.load(path).named_parameters()) for path in (model, tmp_path / "out"))
    for name, values in after.items():
        assert values.abs().max() < 5 * before[name].abs().max(), name
