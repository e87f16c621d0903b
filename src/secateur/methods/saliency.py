"""Scores of weights from gradients, one ranking of all, in rounds: the methods that prune at initialisation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from secateur.cuts.masks import masked
from secateur.families import Block, CanonicalTensor, place_name
from secateur.methods.base import Gradients, Study, Trials
from secateur.methods.elementwise import Elementwise
from secateur.methods.ranked import summary_of
from secateur.plans import Edits, Plan
from secateur.plans.lazy import OneAtATime

Moment = Literal["mean", "squares"]


class Saliency(Elementwise):
    """Keep the weights of the highest saliency; with rounds, more and more go, and what stays is scored again."""

    allocation: Literal["uniform", "block", "global", "lamp"] = Field(
        "global", description="how much every matrix keeps: what one ranking leaves, or the same share"
    )
    steps: int = Field(1, ge=1, description="rounds, after each of which the share kept is the same factor smaller")

    @property
    def roles(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        """Write the score of every weight, place by place.

        Args:
            weights: of all matrices, those that went already as zeros.
            into: where they go.
        """

    def scores_of(self, study: Study, matrix: CanonicalTensor) -> Tensor:
        return summary_of(study, matrix.name)

    def decide(self, study: Study) -> Plan:
        store = study.store("saliency")
        names, kept = list(self.shapes(study.budget.architecture)), self.kept(study.budget)
        weights: Mapping[str, Tensor] = OneAtATime(names, partial(_weight, study))
        plan: Plan | None = None
        for step in range(self.steps):
            study.progress(step + 1, self.steps, "saliency")
            if plan is not None:
                before = dict(plan.masks)  # bits of a round, as large as the model's weights over their width in bits
                weights = OneAtATime(names, partial(_masked_weight, study, before))
            self.saliencies(study, weights, store)
            scored = replace(study, summaries=_Scores(store, self))
            share = (kept / self.prunable(study.budget.architecture)) ** ((step + 1) / self.steps)
            last = step == self.steps - 1
            here = self if last or self.shape.fixed else self.model_copy(update={"sparsity": 1 - share})
            plan = super(Saliency, here).decide(scored)
        assert plan is not None
        return plan


def places_of(found: Iterator[Gradients], names: Collection[str]) -> Iterator[tuple[Block, Gradients, list[str]]]:
    """Gradients of the places with matrices whose weights can go, and their names."""
    for each in found:
        here = [name for name in each.mean if name in names]
        if here:
            yield each.place, each, here


def stored_gradients(
    study: Study, trials: Trials, weights: Mapping[str, Tensor], label: str, wanted: tuple[Moment, ...]
) -> list[Edits]:
    """Mean gradients of the weights that can go, or means over windows of their squares, on disk.

    Args:
        trials: on the text that is meant.
        weights: the matrices, as they are now.
        label: what they are stored under.
        wanted: which of the two, in the order in which they are returned.
    """
    stores = [study.store(f"{label}-{kind}") for kind in wanted]
    for place, each, names in places_of(trials.gradients(weights, wanted), weights):
        for kind, store in zip(wanted, stores, strict=True):
            store.write(place_name(place), {name: getattr(each, kind)[name].float() for name in names})
    return stores


class _Scores(Mapping[str, Iterable[Tensor]]):
    """Stored scores as summaries, as they are ranked."""

    def __init__(self, store: Edits, method: Elementwise) -> None:
        self._store, self._method = store, method

    def __getitem__(self, name: str) -> Iterable[Tensor]:
        return [self._method.normalised(self._store[name])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


def _masked_weight(study: Study, masks: Mapping[str, Tensor], name: str) -> Tensor:
    return masked(_weight(study, name), masks[name])


def _weight(study: Study, name: str) -> Tensor:
    matrix = study.budget.architecture.tensors[name]
    return study.block(matrix.block).tensors[name]
