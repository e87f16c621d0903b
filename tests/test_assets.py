"""Trained models: the methods do what their papers say they do. Skipped where the models are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur

pytestmark = pytest.mark.assets

RATIOS = (0.1, 0.2, 0.3)
SEEDS = (0, 1, 2)
REFERENCE = {56: 9.4, 48: 23.5, 40: 59.3}
"""Perplexities of one shared rotation at these widths of stories260k, as recorded beside the models."""


class Stories:
    """Prunes the small model of stories and measures the result on its test text."""

    def __init__(self, assets: Path, folder: Path) -> None:
        self.model, self.folder = assets / "lm" / "stories260k-llama", folder
        self.texts = assets / "text" / "tinystories-sample"
        self.count = 0

    def __call__(self, method: str, **request: Any) -> tuple[int, float]:
        """Parameters and perplexity."""
        self.count += 1
        output = self.folder / str(self.count)
        if secateur.methods(method)[method]["data"] == "text":
            request = {"data": self.texts / "train.txt", "samples": 96, "length": 256, **request}
        result = secateur.prune(self.model, method=method, output=output, **request)
        figures = secateur.evaluate(output, text=self.texts / "test.txt", context=256)
        return result.achieved["params"], float(figures["perplexity"])


@pytest.fixture(scope="module")
def stories(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Stories:
    return Stories(assets, tmp_path_factory.mktemp("stories"))


@pytest.mark.parametrize("width", REFERENCE)
def test_slicegpt_meets_the_reference(width: int, stories: Stories) -> None:
    """Within a few per cent at equal size, or better."""
    _, found = stories("slicegpt", options={"sparsity": 1 - (width + 0.5) / 64})
    assert found < 1.05 * REFERENCE[width]


@pytest.mark.parametrize("ratio", RATIOS)
def test_slicegpt_is_far_better_than_plain_slicing(ratio: float, stories: Stories) -> None:
    """At no more parameters than random and magnitude slicing of the residual stream keep."""
    size, sliced = stories("slicegpt", ratio=ratio)
    others = [stories("magnitude", ratio=ratio, options={"spaces": "residual"})]
    others += [stories("random", ratio=ratio, seed=seed, options={"spaces": "residual"}) for seed in SEEDS]
    for _, other in others:
        assert sliced < 0.75 * other, (size, sliced, others)


@pytest.mark.parametrize("ratio", RATIOS)
def test_magnitude_of_neurons_is_better_than_random(ratio: float, stories: Stories) -> None:
    """Row norm of gate_proj against the mean of three random draws, at equal parameters."""
    size, found = stories("magnitude", ratio=ratio, options={"of": "first"})
    drawn = [stories("random", ratio=ratio, seed=seed) for seed in SEEDS]
    assert {other for other, _ in drawn} == {size}
    assert found < sum(value for _, value in drawn) / len(drawn)


@pytest.mark.parametrize("name", ["llama-docs-8m", "mixtral-docs-9m", "stories260k-llama"])
def test_trained_models_reload(name: str, assets: Path, tmp_path: Path) -> None:
    """Every trained model goes through, bf16 and experts included."""
    import grid

    result = secateur.prune(assets / "lm" / name, method="magnitude", ratio=0.1, output=tmp_path / "out")
    grid.check_counts(result, tmp_path / "out")
    assert abs(1 - result.achieved["params"] / result.achieved["params_before"] - 0.1) < 0.01
