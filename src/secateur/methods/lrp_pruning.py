"""Pruning by explaining (arXiv:1912.08881): the filters through which least of the true classes' logits came about."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from secateur.evidence.relevance import Rule, relevance
from secateur.methods.base import Data
from secateur.methods.channels import ChannelStudy
from secateur.methods.rescored import Rescored
from secateur.scores.channels import Aggregation, Normaliser, aggregated, counted, normalised


class LrpPruning(Rescored):
    """Delete the units of least relevance, some at a time; it is conserved from layer to layer, so all compare."""

    name = "lrp_pruning"
    title = "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning"
    paper = "arXiv:1912.08881"

    steps: int = Field(
        10, ge=1, description="how often what is left is scored anew; 10 take 5 % each on the way to half"
    )
    rule: Rule = Field(
        "alpha1beta0", description="contributions that count in a layer: positive ones, or all (epsilon)"
    )
    aggregation: Aggregation = Field("sum", description="how the relevances of what makes a unit become one")
    normaliser: Normaliser = Field("none", description="how the scores of a space are made comparable with others")

    @property
    def data(self) -> Data:  # type: ignore[override]
        return "labels"

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """The signed sum over samples; a space that nothing with a weight makes is left alone."""
        found, scores = relevance(study.host, study.data(), self.rule), {}
        for space in study.spaces:
            makers = [entry for entry in counted(space, ("producer",)) if entry.name in found]
            makers = [entry for entry in makers if study.tensor(entry.name).shape[entry.dim] == len(found[entry.name])]
            if makers:
                parts = [found[entry.name][entry.index].sum(1) for entry in makers]
                scores[space.name] = normalised(aggregated(parts, self.aggregation), self.normaliser)
        return scores
