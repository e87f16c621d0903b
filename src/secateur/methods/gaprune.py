"""GAPrune: Fisher information of a domain less that of the general text, where gradients agree (arXiv:2509.10844)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional

from secateur.methods.base import Study
from secateur.methods.domains import Domain
from secateur.methods.saliency import Moment, stored_gradients
from secateur.plans import Edits
from secateur.plans.lazy import OneAtATime
from secateur.spaces.weights import PARTS, Part

_RANGE = (0.8, 1.2)


class GaPrune(Domain):
    """Domain-alignment importance of every weight, one ranking of all.

    As released, the alignment is a product of two unit vectors and the Fisher information a small number beside
    sqrt|w|, so that neither changes the order; here every signal is first divided by its mean in the matrix.
    """

    name = "gaprune"
    title = "GAPrune: Gradient-Alignment Pruning for Domain-Aware Embeddings"
    paper = "arXiv:2509.10844"

    part: Part = Field("ffn", description=PARTS)
    allocation: Literal["uniform", "block", "global", "lamp"] = Field(
        "global", description="how much every matrix keeps: what one ranking leaves, or the same share"
    )
    general: NonNegativeFloat = Field(1.0, description="beta: weight of the general Fisher information")
    size: NonNegativeFloat = Field(0.5, description="gamma: weight of the square root of |w|")
    alignment: NonNegativeFloat = Field(0.2, description="alpha: how much agreeing gradients count")
    literal: bool = Field(False, description="signals as the released code scales them")

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        both: tuple[Moment, ...] = ("mean", "squares")
        own, fisher = stored_gradients(study, study.trials_on("domain"), weights, "domain", both)
        other, general = stored_gradients(study, study.trials, weights, "general", both)

        def score(name: str) -> Tensor:
            return self.importance(weights[name].float(), own[name], other[name], fisher[name], general[name])

        into.write_all(OneAtATime(list(weights), score))

    def importance(self, weight: Tensor, own: Tensor, other: Tensor, fisher: Tensor, general: Tensor) -> Tensor:
        """The score of every weight of a matrix, [out, in].

        Args:
            own, other: mean gradients on the domain and on the general text.
            fisher, general: means of squared gradients on the same.
        """
        size = weight.abs()
        if self.literal:
            agreement = (own / own.norm().clamp(min=1e-30)) * (other / other.norm().clamp(min=1e-30))
            agreement = functional.avg_pool2d(agreement[None, None], 3, 1, 1)[0, 0]
            factor = (1 + self.alignment * agreement).clamp(*_RANGE)
            return (fisher - self.general * general) * size * factor + self.size * size.sqrt()
        cosine = functional.cosine_similarity(own, other, dim=1, eps=1e-30)[:, None]  # of what every neuron asks for
        first, second, size = (_relative(each) for each in (fisher, general, size))
        return (first - self.general * second) * size * (1 + self.alignment * cosine) + self.size * size.sqrt()


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)
