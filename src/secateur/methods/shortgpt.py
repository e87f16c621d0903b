"""ShortGPT: the blocks that change their input least go (arXiv:2403.03853); or one run of them (arXiv:2403.17887)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.methods.base import Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.plans import Plan
from secateur.scores.depth import run_distances
from secateur.spaces import BlockView, Kind

_METRICS: Final = ("cosine", "angular", "relative")


class ShortGpt(Method):
    """Rank the blocks of the dense model once by block influence and drop the lowest."""

    name = "shortgpt"
    title = "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
    paper = "arXiv:2403.03853"
    data = "text"
    evidence = frozenset({"influence", "ends"})

    metric: Literal["cosine", "angular", "relative"] = Field(
        "cosine",
        description="how much a block changes its input, mean over tokens: 1 - cos (block influence), the angle, or "
        "the relative length of the change",
    )
    contiguous: bool = Field(
        False,
        description="drop one run of blocks, that between whose ends the last token of a window turns least; "
        "the last block always stays (Gromov et al.)",
    )

    @property
    def cuts(self) -> Kind:
        return "blocks"

    def foresees(self, budget: Budget) -> bool:
        return budget.sizes.alike

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.contiguous and view.place is not None:
            return {"ends": evidence["ends"]}
        return {} if view.place is None else {"influence": evidence["influence"]}

    def decide(self, study: Study) -> Plan:
        before = study.budget.sizes
        depth = len(before.blocks)
        if self.contiguous:
            ends = torch.stack(list(study.summaries["ends"]))
            distances = [run_distances(ends, gone) for gone in range(1, depth)]
            runs = [_without_run(depth, int(found.argmin()), gone) for gone, found in enumerate(distances, 1)]
            kept = torch.tensor(self._nearest(study.budget, [list(range(depth)), *runs]))
            angles = {"distances": [round(float(found.min()), 6) for found in distances]}
            return Plan(before, before.kept_blocks(kept.tolist()), {"blocks": kept}, notes=angles)
        influence = torch.stack(list(study.summaries["influence"]))[:, _METRICS.index(self.metric)]
        kept = torch.tensor(
            self._nearest(study.budget, [keep_best(influence, n).tolist() for n in range(depth, 0, -1)])
        )
        gone = [int(block) for block in influence.argsort(stable=True) if block not in kept]
        notes: dict[str, Any] = {"influence": [round(float(value), 6) for value in influence], "removed": gone}
        charts = score_charts({"blocks": influence}, {"blocks": kept})
        return Plan(before, before.kept_blocks(kept.tolist()), {"blocks": kept}, notes=notes, charts=charts)

    def _nearest(self, budget: Budget, kept_of: list[list[int]]) -> list[int]:
        """What stays, given what would stay without 0, 1, 2... blocks: as many as asked, or nearest to the target."""
        if self.sparsity is not None:
            return kept_of[len(kept_of) - len(self.sizes(budget).blocks)]
        depths = [sizes for sizes in map(budget.sizes.kept_blocks, kept_of) if not budget.problems(sizes)]
        after = budget.solve_among(sorted(depths, key=budget.costs.params), "blocks")
        return kept_of[len(kept_of) - len(after.blocks)]


def _without_run(depth: int, start: int, length: int) -> list[int]:
    return [block for block in range(depth) if not start <= block < start + length]
