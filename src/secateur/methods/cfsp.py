"""CFSP: coarse importance of the blocks sets their widths, fine importance picks their channels (arXiv:2409.13199)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.layer_maps import sigmoid_map
from secateur.budgets.shares import narrowed, solve_shares
from secateur.families import Sizes
from secateur.methods.base import Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.plans import Plan
from secateur.spaces import BlockView, Space, all_spaces

_ANGLE = 1  # of what ``influence`` holds


class Cfsp(Method):
    """One dense pass: angles between what enters and leaves each block, squares of what ``down`` reads."""

    name = "cfsp"
    title = "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information"
    paper = "arXiv:2409.13199"
    data = "text"
    evidence = frozenset({"influence", "down.moments"})

    fine: Literal["relative", "matrix", "activation"] = Field(
        "relative",
        description="channel score: weights relative to what competes with them for each residual dimension, or to "
        "the whole matrix, times the activation; or the activation alone, which is what the released code computes",
    )
    slope: NonNegativeFloat = Field(
        13.1, description="how strongly the blocks' angles set their widths (per-layer layout); 0: as many in all"
    )

    def sizes(self, budget: Budget) -> Sizes:
        return self._sizes(budget, torch.ones(len(budget.sizes.blocks)))

    def foresees(self, budget: Budget) -> bool:
        return budget.layout == "native"

    def _sizes(self, budget: Budget, coarse: Tensor) -> Sizes:
        """Widths by coarse importance; one for all blocks where the layout has only one."""
        if budget.layout == "native":
            return self._solve(budget, "ffn")

        def shares(mean: float) -> list[float]:
            found: list[float] = sigmoid_map(coarse, self.slope, mean).tolist()
            return found

        if self.sparsity is not None:
            return narrowed(budget, shares(1 - self.sparsity), ("ffn",), exact=True)
        return solve_shares(budget, shares, ("ffn",))

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if view.place is None:
            return {}
        found = {space.name: self.fine_score(view, space, evidence) for space in view.spaces("ffn")}
        return {"coarse": evidence["influence"][_ANGLE], **found}

    def fine_score(self, view: BlockView, space: Space, evidence: Mapping[str, Tensor]) -> Tensor:
        """Importance of every channel, [size]: what its three matrices hold of it, times its activation.

        The released code divides by the sums over each channel itself, whose mean is then the same for all of them.
        """
        reader = view.reader(space)
        activation = evidence[f"{reader.key}.squares"].sqrt()
        if self.fine == "activation":
            return activation
        parts = [reader.values.to(activation).abs() * activation]
        for role in ("up", "gate"):
            writer = view.matrix(role, space.expert)
            if writer is not None:
                parts.append(writer.to(activation).abs().t())
        across = (0, 1) if self.fine == "matrix" else (1,)
        shares = [(part / part.sum(across, keepdim=True).clamp(min=1e-300)).sum(0) for part in parts]
        return torch.stack(shares).sum(0) * activation

    def decide(self, study: Study) -> Plan:
        coarse = torch.stack(list(study.summaries["coarse"]))
        after = self._sizes(study.budget, coarse)
        scores = {space.name: next(iter(study.summaries[space.name])) for space in study.spaces("ffn")}
        kept = {space.name: keep_best(scores[space.name], space.size) for space in all_spaces(after, "ffn")}
        notes = {"coarse importance (angle / pi)": [round(float(value), 4) for value in coarse]}
        return Plan(study.budget.sizes, after, kept, notes=notes, charts=score_charts(scores, kept))
