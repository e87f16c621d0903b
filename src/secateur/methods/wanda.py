"""Wanda: weights by their size times the norm of what they read (arXiv:2306.11695)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from secateur.cuts.masks import Group
from secateur.families import CanonicalTensor
from secateur.methods.elementwise import squares_of
from secateur.methods.permuted import Permuted
from secateur.scores.weights import wanda_scores
from secateur.spaces import BlockView


class Wanda(Permuted):
    """Behind the cuts so far, keep the weights of every row with the largest |W_ij| sqrt(mean x_j^2)."""

    name = "wanda"
    title = "Wanda: A Simple and Effective Pruning Approach for Large Language Models"
    paper = "arXiv:2306.11695"
    data = "text"
    signals = "moments"

    within: Group = Field("row", description="what the weights of a matrix compete in: each row, or the whole matrix")

    def weigh(self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
        return wanda_scores(view.tensors[matrix.name], squares_of(view, matrix, evidence))
