"""N:M patterns over input channels in another order: RIA's channel permutation, for every score of single weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from secateur.cuts.orders import best_order
from secateur.methods.base import Study
from secateur.methods.elementwise import Elementwise
from secateur.plans import Mend, Plan
from secateur.spaces import BlockView, positions
from secateur.spaces.weights import matrices_of


class Permuted(Elementwise):
    """Zero the weights that score lowest in an N:M pattern, of channels that are dealt out to its groups."""

    permute: Literal["none", "fold", "free"] = Field(
        "none",
        description="order in which input channels are grouped by N:M: as they stand (none); FFN neurons dealt out by "
        "importance and stored in that order, in gate and up as well, so that the file is N:M (fold); or the channels "
        "of every matrix in an order of its own, which the file does not have: for evaluation only (free)",
    )
    search: Literal["deal", "assign"] = Field(
        "deal", description="permute: channels by importance in turns, or improved by linear assignment (scipy)"
    )

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.permute != "none" and not self.shape.fixed:
            raise ValueError(f"permute={self.permute} is for patterns N:M: pattern {self.pattern} has no groups")
        if self.permute == "fold" and self.part == "attention":
            raise ValueError("permute=fold is about what reads FFN neurons: part=attention leaves them alone")
        return self

    def decide(self, study: Study) -> Plan:
        plan = super().decide(study)
        if self.permute == "none":
            return plan
        weights = {**plan.notes["weights"], "permute": f"{self.permute}, {self.search}"}
        return replace(plan, notes={**plan.notes, "weights": weights})

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        if self.permute == "none":
            return super().mend(view, evidence, plan, stage)
        matrices = matrices_of(view.architecture, view.place, self.part)
        scores = {matrix.name: self.weigh(view, matrix, evidence) for matrix in matrices}
        if self.permute == "free":
            return Mend(masks={name: self._mask_of_any_order(each) for name, each in scores.items()})
        edits: dict[str, Tensor] = {}
        for space in view.spaces("ffn"):
            reader = view.reader(space).name
            if reader not in scores:
                continue  # of another part
            order = self._order(scores[reader])
            for member in view.members(space):
                name, index = member.tensor.name, positions(order, member.span)
                edits[name] = member.values.index_select(member.axis, index.to(member.values.device))
                if name in scores:
                    scores[name] = scores[name].index_select(member.axis, index)
        masks = {name: self.mask(each, plan.counts[name]) for name, each in scores.items()}
        return Mend(edits=edits, masks=masks)

    def _order(self, scores: Tensor) -> Tensor:
        return best_order(scores, self.shape, self.search == "assign")

    def _mask_of_any_order(self, scores: Tensor) -> Tensor:
        order = self._order(scores)
        mask = self.mask(scores[:, order], 0)
        return mask[:, torch.argsort(order)]
