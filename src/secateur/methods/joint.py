"""Joint (ours): neurons, key/value groups, value dimensions and whole branches against one budget, mended on the way.

What an error of a branch costs is read from the Fisher matrix F of what it gives: half of tr(F E) nats per token for an
error of covariance E. Backward elimination in that metric gives every space its loss-versus-size curve; one price per
parameter allocates the budget over all of them. The sweep that follows cuts block by block, and refits every matrix by
least squares on the signals behind the cuts before it, towards what the dense model computes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets import Budget
from secateur.cuts.stream import SHARED
from secateur.errors import refuse
from secateur.families import Layout, Sizes
from secateur.methods import refitting
from secateur.methods.allocating import Curves
from secateur.methods.base import Method, Study
from secateur.methods.choosing import Choosing
from secateur.methods.narrowing import ffn_spaces, may_narrow, mean_gram, stream_summary
from secateur.methods.refitting import bases_of
from secateur.plans import Mend, Plan
from secateur.scores.elimination import eliminate
from secateur.spaces import BlockView

_READERS = (("q", "k", "v"), ("gate", "up"))


class Joint(Method):
    """Choose between all spaces at once by what each costs the loss per parameter, and mend behind the cuts."""

    name = "joint"
    title = "Joint allocation over all spaces, mended behind the cuts"
    data = "text"
    evidence = frozenset({"stream", "out.gram", "down.gram", "fisher"})
    order = "sequential"
    seeded = True  # the labels behind the Fisher matrices are drawn

    passes: int | None = Field(
        None, ge=1, le=4, description="rounds of statistics, allocation and cuts (default: 2 per-layer, 1 native)"
    )
    trials: int = Field(
        30, ge=0, le=30, description="end-to-end losses, at most; each branch that would go is tried before it does"
    )
    values: bool = Field(True, description="also drop dimensions of value heads (per-layer layout)")
    branches: bool = Field(True, description="also drop whole branches (per-layer layout) or blocks (native)")
    stream: bool = Field(True, description="also narrow the residual stream (RMSNorm, and a head of its own)")
    damping: PositiveFloat = Field(1e-3, description="ridge of the least squares, over the Gram's mean diagonal")

    @property
    def rounds(self) -> int:
        return self.passes or 1

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (
            frozenset({"q.gram", "q.cross"}),
            frozenset({"out.gram", "out.target", "fisher"}),
            frozenset({"up.gram", "up.cross"}),
            frozenset({"down.gram", "down.target", "fisher"}),
        )

    @property
    def stem_mends(self) -> frozenset[str]:
        return frozenset({"head.gram", "head.cross"})

    def in_layout(self, layout: Layout) -> Self:
        if self.sparsity is not None:
            found = "it cuts several kinds of units, and none has a share of its own"
            refuse("bad-option", "joint with sparsity", found, "--ratio says how much of all parameters goes")
        return self.model_copy(update={"passes": self.passes or (2 if layout == "per-layer" else 1)})

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes of about the same cost; which blocks give how much is known only from the text."""
        return self._solve(budget, "ffn")

    # -- curves ----------------------------------------------------------------------------------------------------

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every space of a block loses with its size, in nats per token."""
        narrows = self.stream and may_narrow(view.architecture)
        found = stream_summary(view, evidence) if narrows else {}
        if view.place is None:
            return found
        found[f"ffn.{view.place}"] = self._ffn_curve(view, evidence)
        if "out.gram" in evidence:  # low-rank attention has no heads of its own
            (space,) = view.spaces("kv")
            reader, gram = view.reader(space), mean_gram(view, space, evidence)
            metric = evidence["fisher.attention"]
            found[f"kv.{view.place}"] = eliminate(reader.values, gram, metric, reader.span).costs
            tails = [basis.costs for basis in bases_of(view, reader.values.to(gram), gram, metric).groups]
            found[f"value.{view.place}"] = torch.stack(tails).mean(0)
        return found

    def _ffn_curve(self, view: BlockView, evidence: Mapping[str, Tensor]) -> Tensor:
        curves = [
            eliminate(view.reader(space).values, mean_gram(view, space, evidence), evidence["fisher.ffn"]).costs
            for space in ffn_spaces(view)
        ]
        return torch.stack(curves).sum(0)

    # -- allocation ------------------------------------------------------------------------------------------------

    def decide(self, study: Study) -> Plan:
        names = [name for name in study.summaries if name.split(".")[0] in ("ffn", "kv", "value")]
        curves = Curves({name: next(iter(study.summaries[name])) for name in names})
        last = study.round == self.rounds - 1
        choosing = Choosing(study, curves, self.values and last, self.branches, self.trials)
        choice = choosing.first() if study.previous is None else choosing.again(study.previous)
        return choice.plan((study.round + 1) / self.rounds)

    # -- cut and mend ----------------------------------------------------------------------------------------------

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        if view.place is None:
            return refitting.head(view, evidence, self.damping)
        if stage in (0, 2):
            return refitting.stream_readers(view, evidence, _READERS[stage // 2], self.damping)
        cut = refitting.attention if stage == 1 else refitting.ffn
        made = cut(view, evidence, plan, self.damping)
        return refitting.projected(view, made, plan.bases[SHARED]) if SHARED in plan.bases else made
