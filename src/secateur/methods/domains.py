"""Methods that keep what one domain needs, without losing what is general: two texts, one score."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from pydantic import Field
from torch import Tensor

from secateur.errors import refuse
from secateur.families import Block, place_name
from secateur.methods.base import Gradients, Study
from secateur.methods.saliency import Saliency
from secateur.plans import Edits


class Domain(Saliency):
    """``--data`` is the general text; the domain's stands beside it."""

    data = "text"
    group = "domain"

    domain: str | None = Field(None, description="text of the domain, needed: what --data takes")

    def texts(self) -> dict[str, str]:
        if self.domain is None:
            found = "it needs a text of the domain beside --data, and none is given"
            refuse("no-data", f"method {self.name}", found, "--set domain=law.txt")
        return {"domain": self.domain}


def places_of(found: Iterator[Gradients], names: Collection[str]) -> Iterator[tuple[Block, Gradients, list[str]]]:
    """Gradients of the places with matrices whose weights can go, and their names."""
    for each in found:
        here = [name for name in each.mean if name in names]
        if here:
            yield each.place, each, here


def stored_gradients(study: Study, text: str | None, weights: Mapping[str, Tensor], label: str) -> tuple[Edits, Edits]:
    """Mean gradients on a text, and the mean over windows of their squares, on disk.

    Args:
        text: name of a text; None for the calibration text.
        weights: the matrices whose weights can go, as they are now.
        label: what they are stored under.
    """
    assert study.store is not None
    trials = study.trials if text is None else study.trials_on(text)
    means, squares = study.store(f"{label}-mean"), study.store(f"{label}-squares")
    for place, each, here in places_of(trials.gradients(weights, wanted=("mean", "squares")), weights):
        means.write(place_name(place), {name: each.mean[name].float() for name in here})
        squares.write(place_name(place), {name: each.squares[name].float() for name in here})
    return means, squares
