"""DOTResize: merge neurons onto a few of them by optimal transport (arXiv:2507.04517v2). Experimental.

There is no public code and no table of the paper could be verified. What is known of it: an entropic transport plan T
from all neurons to the k largest, and its QR factorisation so that the merge commutes with RMSNorm. With the
pseudo-inverse to undo the merge, only the span of T matters (derived): in the residual stream this is SliceGPT with
another subspace. The FFN variant merges neurons into their reader and needs no rotation (derived).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Layout, Sizes
from secateur.methods.base import Study
from secateur.methods.rotations import Signal
from secateur.methods.slicing import Slicing
from secateur.plans import Mend, Plan
from secateur.scores.directions import in_hyperplane
from secateur.scores.transport import Cost, directions_of, pair_costs, targets, transport
from secateur.spaces import BlockView, Kind, all_spaces


class DotResize(Slicing):
    """Transport every neuron to the largest ones and keep the directions that the plan spans."""

    name = "dotresize"
    title = "DOTResize: Reducing LLM Width via Discrete Optimal Transport-based Neuron Merging"
    paper = "arXiv:2507.04517"

    spaces: Literal["residual", "ffn"] = Field("residual", description="what is merged; ffn is ours")
    basis: Literal["ot", "pca", "random", "subset"] = Field(
        "ot", description="directions that survive in the stream: the span of the transport plan, or those of slicegpt"
    )
    strength: PositiveFloat = Field(0.1, description="lambda, weight of the entropy against a cost of mean 1")
    cost: Cost = Field("l1", description="distance of two neurons: l1 on sampled tokens, or squared from the Gram")
    normalise: bool = Field(True, description="compare neurons of unit norm: the same shape is near")
    scaled: bool = Field(True, description="merge a neuron in proportion to its size, not one to one (ours)")
    signed: bool = Field(False, description="neurons of opposite sign are near too, and merge negatively (ours)")
    iterations: PositiveInt = Field(500, description="Sinkhorn iterations at most")

    @property
    def evidence(self) -> frozenset[str]:  # type: ignore[override]
        return super().evidence | {"samples"} if self.spaces == "residual" else frozenset()

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (frozenset({"down.gram", "down.samples"}),) if self.spaces == "ffn" else ()

    @property
    def basis_name(self) -> str:
        return self.basis

    @property
    def cuts(self) -> Kind:
        return self.spaces

    def in_layout(self, layout: Layout) -> Self:
        return self if self.spaces == "ffn" else super().in_layout(layout)

    def sizes(self, budget: Budget) -> Sizes:
        return super().sizes(budget) if self.spaces == "residual" else self._solve(budget, "ffn")

    def basis_of(self, signal: Signal, count: int, generator: torch.Generator) -> Tensor:
        """Q of the merge map's QR factorisation (sec. 3)."""
        if self.basis != "ot":
            return super().basis_of(signal, count, generator)
        kept, plan, signs = self._merge(signal, count)
        size = signal.gram.diagonal().clamp(min=0).sqrt()
        directions = directions_of(plan * signs * (size[:, None] if self.scaled and self.normalise else 1), kept)
        return in_hyperplane(directions, signal.gram) if signal.mean_free else directions

    def decide(self, study: Study) -> Plan:
        if self.spaces == "residual":
            return super().decide(study)
        return Plan(study.budget.sizes, self.sizes(study.budget))

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        """Every neuron's column goes to the kept ones in the shares of its row of the plan: W*_j = sum_i W_i T'_ij."""
        kept, edits = {}, {}
        after = {space.name: space.size for space in all_spaces(plan.after, "ffn")}
        for space in view.spaces("ffn"):
            reader = view.reader(space)
            gram, rows = evidence[f"{reader.key}.gram"].cpu(), evidence.get(f"{reader.key}.samples")
            seen = Signal(gram, torch.zeros(1, len(gram)) if rows is None else rows)  # an expert that nothing visits
            kept[space.name], shares, signs = self._merge(seen, after[space.name])
            shares = shares / shares.sum(1, keepdim=True) * signs
            if self.scaled:  # h_i is nearest to s_ij h_j with s_ij = <h_i, h_j> / <h_j, h_j>
                chosen = gram[:, kept[space.name]]
                energy = gram.diagonal()[kept[space.name]]
                shares = shares * torch.where(energy > 0, chosen / energy.clamp(min=1e-300), 1.0).abs()
            merged = torch.zeros(reader.values.shape, dtype=torch.float64)
            merged[:, kept[space.name]] = reader.values.cpu().double() @ shares
            edits[reader.name] = merged
        return Mend(kept, edits)

    def _merge(self, signal: Signal, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The neurons that stay, the transport plan to them, [n, count], and the sign of each pair."""
        gram = signal.gram.cpu()
        cost, signs = pair_costs(signal.samples, gram, self.cost, self.normalise, self.signed)
        kept = targets(signal.samples, cost, count)
        return kept, transport(cost[:, kept], self.strength, self.iterations), signs[:, kept]
