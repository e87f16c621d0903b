"""STUN: experts that behave alike become one, and single weights go in those that are left (arXiv:2409.06211)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from secateur.budgets import Budget
from secateur.errors import refuse
from secateur.families import Block, Sizes
from secateur.families.roles import EXPERT_ROLES
from secateur.mends.experts import means_of_clusters, names_of_means
from secateur.methods.base import Fraction, Method, Study
from secateur.methods.chain import Chain
from secateur.methods.elementwise import WeightOptions
from secateur.methods.magnitude import MagnitudeOfWeights
from secateur.methods.ria import Ria
from secateur.methods.sparsegpt import SparseGpt
from secateur.methods.wanda import Wanda
from secateur.plans import Chart, PlaceAtATime, Plan, points_of
from secateur.plans.chart import MAX_SERIES
from secateur.scores.experts import (
    Join,
    clusters_after,
    coactivation_distances,
    complete_linkage,
    gram_of_rows,
    lesser_shares,
    nearest_to_mean,
    router_distances,
)
from secateur.spaces import BlockView, Kind
from secateur.spaces.weights import PARTS, Part

_ROLES = ("router", *EXPERT_ROLES)
_METHODS: Final[Mapping[str, type[WeightOptions]]] = {
    "wanda": Wanda,
    "ria": Ria,
    "sparsegpt": SparseGpt,
    "magnitude": MagnitudeOfWeights,
}
Scores = Literal["wanda", "ria", "sparsegpt", "magnitude"]
Clusters = Mapping[str, list[list[int]]]
"""Of every space of experts."""


class ExpertOptions(Method):
    """Which experts are alike, and which of them stays."""

    name = "stun"
    title = "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning"
    paper = "arXiv:2409.06211"

    similarity: Literal["router", "coactivation", "mix", "traffic"] = Field(
        "router",
        description="what makes experts alike: near rows of the router (no data), tokens that visit both, or both; "
        "traffic (ours): near rows, times the share of the router's weight that the lesser of the two gets",
    )
    mix: NonNegativeFloat = Field(1.0, description="with similarity=mix, weight of the tokens beside the rows")
    together: Literal["alike", "unlike"] = Field(
        "alike", description="whether experts that tokens visit together are alike (the paper), or do different work"
    )
    representative: Literal["medoid", "busiest"] = Field(
        "medoid",
        description="the member of a cluster that stays: the one whose weights are nearest to their mean (the paper), "
        "or (ours, needs data) the one that the router gives most weight",
    )
    average: NonNegativeInt = Field(
        2,
        description="a block that ends with at most so many clusters takes the means of their members, rows of the "
        "router included, instead of one member each (the paper's code: 2); 0: none does",
    )

    @property
    def cuts(self) -> Kind:
        return "experts"


class StunOfWeights(Chain, ExpertOptions, WeightOptions):
    """Both halves: experts that behave alike become one, then the matrices that are left lose single weights."""

    output = "dense-zeros"
    group = "mixed"

    weights: Scores = Field("wanda", description="method by which single weights go, with its own defaults")
    experts: Fraction | None = Field(
        None, description="share of the experts that goes first; left out: as many as make half of what goes in all"
    )
    sparsity: Fraction | None = Field(
        None, description="share of the weights that goes then, in the matrices that part names, instead of --ratio"
    )
    part: Part = Field("experts", description=PARTS)

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        if self.sized and self.experts is None:
            raise ValueError("sparsity and pattern say only how many weights go: give experts, too")
        return self

    @property
    def chain(self) -> tuple[Method, ...]:
        alike, weights = (
            {name: getattr(self, name) for name in schema.model_fields} for schema in (ExpertOptions, WeightOptions)
        )
        first = _HalfOfStun if self.experts is None else Stun
        return first(**{**alike, "sparsity": self.experts}), _METHODS[self.weights](**weights)


class Stun(ExpertOptions):
    """Cluster the experts of each block by behaviour (O(1) forward passes) and keep one expert of every cluster."""

    variants: ClassVar = {("weights", score): StunOfWeights for score in _METHODS}
    share: ClassVar[float] = 1.0

    weights: Literal["none"] = Field(
        "none", description=f"whether single weights go then, in what is left: {', '.join(_METHODS)}"
    )

    @property
    def data(self) -> Literal["none", "text"]:  # type: ignore[override]
        return "none" if (self.similarity, self.representative) == ("router", "medoid") else "text"

    @property
    def evidence(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"routes"}) if self.data == "text" else frozenset()

    @property
    def roles(self) -> tuple[str, ...] | None:
        return _ROLES

    def sizes(self, budget: Budget) -> Sizes:
        if budget.layout == "native":
            return self._solve(budget.part(self.share), "experts")
        blocks = budget.sizes.blocks
        most = max(block.experts for block in blocks)
        return self._after(
            budget, [i for turn in range(most) for i, block in enumerate(blocks) if turn < block.experts]
        )

    def foresees(self, budget: Budget) -> bool:
        return budget.layout == "native"

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Distances of the experts of a block, products of their weights, and what the router gives each."""
        found = {}
        for space in view.spaces("experts"):
            found[f"{space.name}.distances"] = self._distances(view, evidence)
            if self.representative == "medoid":
                members = [member.values for member in view.members(space) if member.in_experts]
                found[f"{space.name}.weights"] = gram_of_rows(members)
            else:
                found[f"{space.name}.mass"] = evidence["router.mass"]
        return found

    def _distances(self, view: BlockView, evidence: Mapping[str, Tensor]) -> Tensor:
        """D = w D_coactivation + D_router (sec. 4.2), each over its mean."""
        router = view.matrix("router")
        assert router is not None
        if self.similarity == "router":
            return router_distances(router)
        if self.similarity == "traffic":
            return router_distances(router) * lesser_shares(evidence["router.mass"].cpu())
        counts = coactivation_distances(evidence["router.coactivation"].cpu(), self.together == "alike")
        return counts if self.similarity == "coactivation" else self.mix * counts + router_distances(router)

    def decide(self, study: Study) -> Plan:
        """One threshold for all blocks (per-layer), or as many clusters in each (native); one expert of each stays."""
        budget, spaces = study.budget, study.spaces("experts")
        summaries = {name: next(iter(study.summaries[name])) for name in study.summaries}
        joins = {space.name: complete_linkage(summaries[f"{space.name}.distances"]) for space in spaces}
        if budget.layout == "native":
            after = self.sizes(budget)
        else:
            ranked = sorted((join.height, s.place or 0) for s in spaces for join in joins[s.name])
            after = self._after(budget, [place for _, place in ranked])
        clusters: dict[str, list[list[int]]] = {}
        for space in spaces:
            left = after.blocks[space.place or 0].experts
            clusters[space.name] = clusters_after(joins[space.name][: space.size - left], space.size)
        kept = {name: [self._representative(summaries, name, c) for c in of] for name, of in clusters.items()}
        return Plan(
            budget.sizes,
            after,
            {name: torch.tensor(sorted(experts)) for name, experts in kept.items()},
            edits=self._means(study, clusters, kept),
            notes=_notes(joins, clusters),
            charts=[_chart(joins, clusters)],
        )

    def _means(self, study: Study, clusters: Clusters, kept: Mapping[str, list[int]]) -> Mapping[str, Tensor]:
        """Light reconstruction: in blocks of few clusters, their means in the places of those that stay."""
        few = {
            space.place: space.name for space in study.spaces("experts") if len(clusters[space.name]) <= self.average
        }
        architecture = study.budget.architecture
        names = {place: names_of_means(architecture, place, clusters[s], kept[s]) for place, s in few.items()}

        def means(place: Block) -> dict[str, Tensor]:
            return means_of_clusters(study.view(place, _ROLES), clusters[few[place]], kept[few[place]])

        return PlaceAtATime(names, means)

    def _after(self, budget: Budget, order: Sequence[int]) -> Sizes:
        """The sizes nearest to the target when the blocks lose one expert each in an order, none too many."""
        blocks = list(budget.sizes.blocks)
        path = [budget.sizes]
        for place in order:
            if blocks[place].experts > budget.sizes.active_experts:
                blocks[place] = replace(blocks[place], experts=blocks[place].experts - 1)
                path.append(replace(budget.sizes, blocks=tuple(blocks)))
        budget.reachable("experts", budget.sizes)  # refuses what the layout cannot hold
        if self.sparsity is None:
            return budget.part(self.share).solve_among(path[::-1], "experts")
        total = sum(block.experts for block in budget.sizes.blocks)
        gone = total - int((1 - self.sparsity) * total)
        if gone >= len(path):
            found = f"{total - len(path) + 1} of {total} have to stay: every token visits {budget.sizes.active_experts}"
            refuse("out-of-reach", f"{gone} of {total} experts removed", found, "lower the sparsity")
        return path[gone]

    def _representative(self, summaries: Mapping[str, Tensor], space: str, cluster: list[int]) -> int:
        if self.representative == "busiest":
            return cluster[int(summaries[f"{space}.mass"][cluster].argmax())]
        return nearest_to_mean(summaries[f"{space}.weights"], cluster)


class _HalfOfStun(Stun):
    """The same for half of what shall go."""

    share = 0.5


def _notes(joins: Mapping[str, list[Join]], clusters: Clusters) -> dict[str, Any]:
    """The clusters, and the height of the highest join that was made."""
    made = [join.height for name, of in clusters.items() for join in joins[name][: len(joins[name]) + 1 - len(of)]]
    return {"clusters": {**clusters}, "threshold": round(max(made), 6) if made else None}


def _chart(joins: Mapping[str, list[Join]], clusters: Clusters) -> Chart:
    """Heights of the joins of every block."""
    lines = {name: points_of(torch.tensor([join.height for join in of]), 1) for name, of in joins.items() if of}
    counts = {len(joins[name]) + 1 - len(of) for name, of in clusters.items()}
    mark = (float(max(counts)), "most experts joined")
    shown = dict(list(lines.items())[:MAX_SERIES])
    return Chart("How far apart the joined experts are", "experts joined", "largest distance", shown, mark=mark)
