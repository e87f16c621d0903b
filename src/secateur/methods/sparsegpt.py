"""SparseGPT: weights go where the others can best make up for them, and these do (arXiv:2301.00774)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.errors import refuse
from secateur.families import CanonicalTensor, Layout
from secateur.mends import DAMPING
from secateur.mends.obs import obs_sweep, shares_of
from secateur.methods.elementwise import Elementwise
from secateur.plans import Mend, Plan
from secateur.scores.weights import obs_scores
from secateur.spaces import BlockView
from secateur.spaces.weights import input_key, matrices_of


class SparseGpt(Elementwise):
    """Behind the cuts so far, sweep every matrix: column block by column block, prune and compensate."""

    name = "sparsegpt"
    title = "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
    paper = "arXiv:2301.00774"
    data = "text"
    signals = "gram"

    damping: PositiveFloat = Field(DAMPING, description="ridge of the Hessian over the mean of its diagonal")
    columns: int = Field(128, ge=1, description="columns whose weights compete and are swept together")
    act_order: bool = Field(False, description="sweep the columns with the largest inputs first")

    def in_layout(self, layout: Layout) -> SparseGpt:
        if self.act_order and self.shape.fixed:
            asked = f"sparsegpt with act_order and pattern={self.pattern}"
            refuse("bad-option", asked, "the groups of the pattern are of neighbours", "leave act_order out")
        return self

    def weigh(self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
        gram = evidence[f"{input_key(view.architecture, matrix)}.gram"]
        return obs_scores(view.tensors[matrix.name], gram, self.damping)

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        edits, masks = {}, {}
        for matrix in matrices_of(view.architecture, view.place, self.part):
            gram = evidence[f"{input_key(view.architecture, matrix)}.gram"]
            edits[matrix.name], masks[matrix.name] = self._swept(
                view.tensors[matrix.name], gram, plan.counts[matrix.name]
            )
        return Mend(edits=edits, masks=masks)

    def _swept(self, weight: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
        unit = self.shape.of or self.shape.columns
        width = -(-self.columns // unit) * unit
        share = shares_of(count, weight.shape[1])

        def choose(scores: Tensor, start: int, stop: int) -> Tensor:
            return self.mask(scores, share(start, stop))

        order = torch.argsort(gram.diagonal(), descending=True, stable=True) if self.act_order else None
        step = self.shape.of or None
        return obs_sweep(weight, gram, choose, damping=self.damping, width=width, step=step, order=order)
