"""FASP: columns of the later of two interlinked matrices go, with the rows that feed them (arXiv:2501.09412)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.shares import narrowed, solve_shares, why_not
from secateur.errors import refuse
from secateur.families import Layout, Sizes, canonical_name
from secateur.mends import DAMPING, absorb, centred, refit
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Mend, Plan
from secateur.scores.columns import ColumnMetric, column_scores
from secateur.spaces import BlockView, all_spaces, columns_of_values


class Fasp(Method):
    """Behind the cuts so far: score the columns of ``out``, then of ``down``, keep as many in every block, refit."""

    name = "fasp"
    timed = True
    title = "FASP: Fast and Accurate Structured Pruning of Large Language Models"
    paper = "arXiv:2501.09412"
    data = "text"
    order = "sequential"

    targets: Literal["ffn", "ffn+vo"] = Field(
        "ffn",
        description="what is narrowed: the FFN, or also values and what reads them, as in the paper, by as many "
        "dimensions of every head (per-layer layout)",
    )
    metric: ColumnMetric = Field(
        "wanda",
        description="column score: the paper's summed Wanda score, or (ours) Optimal Brain Surgeon, or leverage",
    )
    restore: bool = Field(True, description="refit the surviving columns by least squares (sec. 3.3)")
    damping: PositiveFloat = Field(
        DAMPING, description="ridge of the least squares over the mean of the Gram's diagonal"
    )

    def in_layout(self, layout: Layout) -> Self:
        if self.targets == "ffn+vo" and layout == "native":
            found = "stock classes have one size for queries, keys and values"
            refuse("not-native", "fasp with targets=ffn+vo in the native layout", found, "--layout per-layer")
        return self

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        ffn = frozenset({"down.gram"})
        return (ffn,) if self.targets == "ffn" else (frozenset({"out.gram"}), ffn)

    def sizes(self, budget: Budget) -> Sizes:
        if self.targets == "ffn":
            return self._solve(budget, "ffn")
        if reasons := why_not(budget, "value"):
            refuse("not-exact", "fasp with targets=ffn+vo", "; ".join(reasons), "--set targets=ffn")
        blocks = len(budget.sizes.blocks)
        if self.sparsity is not None:
            return narrowed(budget, [1 - self.sparsity] * blocks, ("ffn", "value"), exact=True)
        return solve_shares(budget, lambda share: [share] * blocks, ("ffn", "value"))

    def foresees(self, budget: Budget) -> bool:
        return True

    def decide(self, study: Study) -> Plan:
        return Plan(study.budget.sizes, self.sizes(study.budget))

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        part = self._neurons if "down.gram" in self.mends[stage] else self._heads
        return part(view, evidence, plan)

    def _neurons(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        kept: dict[str, Tensor] = {}
        edits: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        after = {space.name: space.size for space in all_spaces(plan.after, "ffn")}
        for space in view.spaces("ffn"):
            reader = view.reader(space)
            scores[space.name] = self._scores(view, reader.name, evidence, reader.key)
            kept[space.name] = keep_best(scores[space.name], after[space.name])
            edits.update(self._restored(view, reader.name, evidence, reader.key, kept[space.name]))
        return Mend(kept, edits, scores)

    def _heads(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Of every value head the same number of dimensions; one is read by all query heads of its group."""
        assert view.place is not None
        count, head = plan.after.narrowed("value", view.place), plan.before.head
        if not count:
            return Mend()
        block, out = plan.before.blocks[view.place], canonical_name(view.place, "out", "weight")
        scores = self._scores(view, out, evidence, "out").reshape(block.kv, block.group, head).sum(1)
        rows = torch.cat([keep_best(of, count) + head * group for group, of in enumerate(scores)])
        columns = columns_of_values(rows, head, block.group)
        return Mend({f"blocks.{view.place}.value": rows}, self._restored(view, out, evidence, "out", columns))

    def _gram(self, view: BlockView, reader: str, evidence: Mapping[str, Tensor], key: str) -> Tensor:
        """Gram of the reader's inputs; of their deviations from the mean where a bias can take over the mean."""
        gram = evidence[f"{key}.gram"]
        if _bias(reader) not in view.tensors:
            return gram
        return centred(gram, evidence[f"{key}.sum"], evidence[f"{key}.count"])

    def _scores(self, view: BlockView, reader: str, evidence: Mapping[str, Tensor], key: str) -> Tensor:
        gram = evidence[f"{key}.gram"] if self.metric == "wanda" else self._gram(view, reader, evidence, key)
        return column_scores(view.tensors[reader], gram, self.metric, self.damping)

    def _restored(
        self, view: BlockView, reader: str, evidence: Mapping[str, Tensor], key: str, kept: Tensor
    ) -> dict[str, Tensor]:
        """The refitted reader, and its bias where it has one."""
        if not self.restore:
            return {}
        old, bias = view.tensors[reader], view.tensors.get(_bias(reader))
        new = refit(old, self._gram(view, reader, evidence, key), kept, self.damping)
        if bias is None:
            return {reader: new}
        mean = evidence[f"{key}.sum"] / evidence[f"{key}.count"].clamp(min=1)
        return {reader: new, _bias(reader): absorb(bias, old.to(new) - new, mean)}


def _bias(reader: str) -> str:
    return reader.removesuffix("weight") + "bias"
