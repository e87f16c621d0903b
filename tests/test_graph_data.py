"""Data, losses and mends of methods for any network: what is asked for, what is refused, what a method is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import secateur
from graph_nets import net
from secateur import SecateurError
from secateur.budgets.channels import Units
from secateur.budgets.targets import Target
from secateur.evidence.batches import Batches, noise
from secateur.evidence.losses import cross_entropy, losses_of
from secateur.methods import registry
from secateur.methods.base import Data
from secateur.methods.channels import ChannelStudy, Choose, GraphMethod


class Plain(GraphMethod):
    """Scores from the norm; keeps what it was handed."""

    name = "plain_for_tests"
    title = "Plain"
    seen: ClassVar[list[ChannelStudy]] = []

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        self.seen.append(study)
        return {s.name: torch.arange(s.size, dtype=torch.float64) + 1 for s in study.spaces}


class Needing(Plain):
    """Needs labels; goes half of the way, silences, then the rest; mends."""

    name = "needing_for_tests"
    data: ClassVar[Data] = "labels"  # type: ignore[assignment]

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        half = study.silenced(choose(self.score(study), target, 0.5))
        self.seen.append(half)
        return choose(self.score(half), target)

    def mend(self, study: ChannelStudy, units: Units) -> dict[str, Tensor]:
        assert set(units) <= {space.name for space in study.spaces}
        return {"head.bias": torch.full((4,), 7.0)}


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> list[ChannelStudy]:
    for kind in (Plain, Needing):
        monkeypatch.setitem(registry._OURS, kind.name, f"{__name__}:{kind.__name__}")  # type: ignore[misc]
    Plain.seen.clear()
    return Plain.seen


def pruned(method: str, data: Any = None, **more: Any) -> secateur.api.channels.ModuleResult:  # type: ignore[name-defined]
    module, inputs = net("residual")
    return secateur.prune(  # type: ignore[return-value]
        module, method=method, ratio=0.3, tolerance=0.1, example_inputs=inputs, data=data, **more
    )


def labelled(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 3, 8, 8), torch.randint(4, (3,))) for _ in range(count)]


def test_a_study_has_data_losses_and_silence(methods: list[ChannelStudy]) -> None:
    result = pruned("needing_for_tests", labelled())
    whole, half, _ = methods
    assert [tuple(b.inputs.shape) for b in whole.data()] == [(3, 3, 8, 8)] * 2  # type: ignore[union-attr]
    assert len(list(whole.data())) == 2  # once more
    outputs = torch.randn(3, 4)
    labels = torch.randint(4, (3,))
    assert torch.equal(whole.loss(outputs, labels), nn.functional.cross_entropy(outputs, labels))
    assert half.gone
    for name, units in half.gone.items():
        for entry in half.graph.space(name).entries:
            silent = half.tensor(entry.name).movedim(entry.dim, 0)[entry.index[units].ravel()]
            assert not silent.any()
    assert all(whole.tensor(e.name).any() for s in whole.spaces for e in s.entries if e.dim)
    assert result.model is not None
    assert torch.equal(result.model.head.bias, torch.full((4,), 7.0))  # type: ignore[union-attr]
    assert sum(map(len, half.gone.values())) < sum(map(len, result.removed.values()))


@pytest.mark.usefixtures("methods")
def test_in_place_writes_the_mends() -> None:
    module, inputs = net("residual")
    values = {"method": "needing_for_tests", "data": labelled(), "tolerance": 0.1}
    result = secateur.prune(module, ratio=0.3, example_inputs=inputs, inplace=True, **values)  # type: ignore[arg-type]
    assert result.model is module
    assert torch.equal(module.head.bias, torch.full((4,), 7.0))  # type: ignore[union-attr,arg-type]


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    ("method", "data", "more", "code"),
    [
        ("needing_for_tests", lambda: None, {}, "no-data"),
        ("needing_for_tests", lambda: [torch.randn(3, 3, 8, 8)], {}, "bad-data"),
        ("plain_for_tests", list, {}, "bad-data"),
        ("plain_for_tests", lambda: iter(labelled()), {}, "bad-data"),
        ("plain_for_tests", lambda: torch.randn(5, 3, 8, 8), {}, "bad-data"),
        ("plain_for_tests", lambda: [torch.randn(3, 8, 8)], {}, "bad-data"),
        ("plain_for_tests", lambda: [torch.zeros(1, 3, 8, 8, dtype=torch.long)], {}, "bad-data"),
        ("plain_for_tests", lambda: "images", {}, "bad-data"),
        ("plain_for_tests", labelled, {"loss": 3}, "bad-loss"),
        ("plain_for_tests", labelled, {"loss": {}}, "bad-loss"),
    ],
)
def test_data_is_refused_clearly(method: str, data: Callable[[], Any], more: Mapping[str, Any], code: str) -> None:
    with pytest.raises(SecateurError) as failure:
        pruned(method, data(), **more)
    assert (failure.value.code, failure.value.exit_code) == (code, 2)


def test_labels_are_told_from_inputs() -> None:
    example, two = torch.randn(1, 3), (torch.randn(1, 3), torch.randn(1, 2))
    (only,) = Batches([torch.randn(4, 3)], example)
    assert only.labels is None
    (pair,) = Batches([[torch.randn(4, 3).numpy(), torch.zeros(4).numpy()]], example)
    assert isinstance(pair.labels, Tensor)
    (both,) = Batches([(torch.randn(4, 3), torch.randn(4, 2))], two)
    assert both.labels is None
    (more,) = Batches([((torch.randn(4, 3), torch.randn(4, 2)), 5)], two)
    assert more.labels == 5
    (named,) = Batches([({"x": torch.randn(4, 3)}, {"a": 1, "b": 2})], {"x": example})
    assert named.labels == {"a": 1, "b": 2}


def test_losses_by_name() -> None:
    assert list(losses_of(None)) == ["cross_entropy"]
    assert list(losses_of(cross_entropy)) == ["loss"]
    assert list(losses_of({"a": cross_entropy, "b": cross_entropy})) == ["a", "b"]
    with pytest.raises(SecateurError, match="loss"):
        cross_entropy((torch.randn(2, 3), torch.randn(2, 3)), torch.zeros(2).long())


def test_noise_follows_the_seed() -> None:
    example = {"x": torch.randn(2, 3), "n": 4}
    first, again = (noise(example, 2, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first[1].inputs["x"], again[1].inputs["x"])  # type: ignore[call-overload]
    assert not torch.equal(first[0].inputs["x"], first[1].inputs["x"])  # type: ignore[call-overload]
    with pytest.raises(SecateurError, match="noise"):
        noise(torch.zeros(1, 2, dtype=torch.long), 1, torch.Generator())
