"""FASP: columns of the later of two interlinked matrices go, with the rows that feed them (arXiv:2501.09412)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.mends import DAMPING, refit
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Mend, Plan
from secateur.scores.columns import ColumnMetric, column_scores
from secateur.spaces import BlockView, all_spaces


class Fasp(Method):
    """Score the columns of ``down`` behind the cuts so far, keep as many in every block, refit them."""

    name = "fasp"
    title = "FASP: Fast and Accurate Structured Pruning of Large Language Models"
    paper = "arXiv:2501.09412"
    data = "text"
    order = "sequential"

    metric: ColumnMetric = Field(
        "wanda",
        description="column score: the paper's summed Wanda score, or (ours) Optimal Brain Surgeon, or leverage",
    )
    restore: bool = Field(True, description="refit the surviving columns by least squares (sec. 3.3)")
    damping: PositiveFloat = Field(
        DAMPING, description="ridge of the least squares over the mean of the Gram's diagonal"
    )

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (frozenset({"down.gram"}),)

    def decide(self, study: Study) -> Plan:
        return Plan(study.budget.sizes, self.sizes(study.budget))

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        kept: dict[str, Tensor] = {}
        edits: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        after = {space.name: space.size for space in all_spaces(plan.after, "ffn")}
        for space in view.spaces("ffn"):
            reader = view.reader(space)
            gram = evidence[f"{reader.key}.gram"]
            scores[space.name] = column_scores(reader.values, gram, self.metric, self.damping)
            kept[space.name] = keep_best(scores[space.name], after[space.name])
            if self.restore:
                edits[reader.name] = refit(reader.values, gram, kept[space.name], self.damping)
        return Mend(kept, edits, scores)
