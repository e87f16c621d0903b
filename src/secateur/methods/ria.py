"""RIA: weights by their share of their row and of their column, times what they read (ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from secateur.cuts.masks import Group
from secateur.families import CanonicalTensor
from secateur.methods.elementwise import squares_of
from secateur.methods.permuted import Permuted
from secateur.scores.weights import ria_scores
from secateur.spaces import BlockView


class Ria(Permuted):
    """Wanda's rule with relative importance, so that no row and no column is wiped out."""

    name = "ria"
    title = "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models (RIA)"
    paper = "ICLR 2024"
    data = "text"
    signals = "moments"

    within: Group = Field("row", description="what the weights of a matrix compete in: each row, or the whole matrix")
    power: NonNegativeFloat = Field(0.5, description="how much the inputs count: norm to this power (a); 0 is RI alone")

    def weigh(self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
        return ria_scores(view.tensors[matrix.name], squares_of(view, matrix, evidence), self.power)
