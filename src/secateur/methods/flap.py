"""FLAP: what fluctuates little is replaced by its mean (AAAI 2024, arXiv:2312.11983)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget, Target
from secateur.budgets.shares import solve_shares
from secateur.errors import refuse
from secateur.families import Layout, Sizes, canonical_name
from secateur.families.limits import refusals
from secateur.mends import absorb
from secateur.methods.base import Fraction, Method, Study, keep_best
from secateur.methods.charts import score_charts
from secateur.plans import Plan
from secateur.spaces import BlockView, Kind, all_spaces

_ROLES: Mapping[Kind, str] = {"ffn": "down", "kv": "out", "heads": "out"}


class Flap(Method):
    """One dense pass: mean and variance of what ``out`` and ``down`` read."""

    name = "flap"
    title = "Fluctuation-based Adaptive Structured Pruning for Large Language Models"
    paper = "arXiv:2312.11983"
    data = "text"
    evidence = frozenset({"down.moments", "out.moments"})

    metric: Literal["wifv", "ifv", "wifn"] = Field(
        "wifv",
        description="channel score: variance times the squared norm of the column that reads it, the variance, or "
        "the column's weights times the root mean square",
    )
    structure: Literal["auto", "al-am", "al-mm", "ul-um"] = Field(
        "auto",
        description="one standardised ranking of heads and neurons of all blocks; the same with the share of heads "
        "given; or the same share in every block, all that the native layout holds (auto: al-am where it can)",
    )
    heads: Fraction | None = Field(
        None, description="share of the heads (key/value groups) to remove with structure=al-mm; none: no heads"
    )
    square: bool = Field(False, description="square the score of attention channels first, as the released code does")
    bias: bool = Field(
        True,
        description="put the mean of what goes into the biases; the per-layer layout adds them where missing",
    )

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native" and self.structure in ("al-am", "al-mm"):
            asked = f"flap with structure={self.structure} in the native layout"
            refuse("not-native", asked, "stock classes give all blocks one size", "--layout per-layer")
        if self.heads is not None and self.structure != "al-mm":
            refuse(
                "bad-option", f"flap with heads={self.heads}", "only structure=al-mm has a share of heads of its own"
            )
        chosen = "ul-um" if layout == "native" else "al-am"
        return self.model_copy(update={"structure": chosen}) if self.structure == "auto" else self

    # -- how much --------------------------------------------------------------------------------------------------

    def kinds(self, budget: Budget) -> list[Kind]:
        """Kinds of units that go: FFN neurons, and groups of heads (or heads of the one group) where they can."""
        kinds: tuple[Kind, ...] = ("kv", "heads")
        attention = [kind for kind in kinds if not refusals(budget.architecture, kind, budget.layout)]
        return ["ffn", *attention[:1]]

    def sizes(self, budget: Budget) -> Sizes:
        budget, base = self._own_ratio(budget), self._with_biases(budget)
        blocks, kinds = len(base.blocks), self.kinds(budget)
        return solve_shares(budget, lambda share: [share] * blocks, kinds, base)

    def foresees(self, budget: Budget) -> bool:
        return self.structure == "ul-um"

    def _own_ratio(self, budget: Budget) -> Budget:
        """The paper's ratio counts the parameters of the blocks."""
        if self.sparsity is None:
            return budget
        return replace(budget, targets=(Target("block_params", fraction=1 - self.sparsity),))

    def _with_biases(self, budget: Budget) -> Sizes:
        """The dense sizes with every bias that the layout can add where units go."""
        sizes = budget.sizes
        if not self.bias or budget.layout == "native":
            return sizes
        for flag in dict.fromkeys(f"{_ROLES[kind]}_bias" for kind in self.kinds(budget)):
            for index, block in enumerate(sizes.blocks):
                change: dict[str, Any] = {flag: True}
                blocks = (*sizes.blocks[:index], replace(block, **change), *sizes.blocks[index + 1 :])
                if not budget.problems(replace(sizes, blocks=blocks)):
                    sizes = replace(sizes, blocks=blocks)
        return sizes

    def _allocated(self, study: Study, scores: Mapping[Kind, Mapping[str, Tensor]]) -> Sizes:
        budget = self._own_ratio(study.budget)
        base = self._with_biases(budget)
        if self.structure == "ul-um":
            return self.sizes(study.budget)
        if self.structure == "al-am":
            return budget.solve_ranked(scores, base=base)
        for kind in [kind for kind in scores if kind != "ffn"]:
            if self.heads is not None:
                base = budget.solve_ranked({kind: scores[kind]}, 1 - self.heads, base)
        return budget.solve_ranked({"ffn": scores["ffn"]}, base=base)

    # -- which -----------------------------------------------------------------------------------------------------

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Metric, and mean, of every channel that the readers of FFN neurons and of heads read."""
        found = {}
        kinds: tuple[Kind, ...] = ("ffn", "kv") if view.place is not None else ()
        for space in (space for kind in kinds for space in view.spaces(kind)):
            key = canonical_name(view.place, _ROLES[space.kind], "weight", space.expert)
            if key in view.tensors:
                reader = view.reader(space)
                named = {n: evidence[f"{reader.key}.{n}"] for n in ("squares", "sum", "count")}
                found[key] = self.channel_scores(reader.values, **named)
                found[f"{key}.mean"] = named["sum"] / named["count"].clamp(min=1)
        return found

    def channel_scores(self, weight: Tensor, squares: Tensor, sum: Tensor, count: Tensor) -> Tensor:
        """One number per column of ``weight``, from sums over tokens of what it reads and of its squares."""
        wide = weight.to(squares)
        if self.metric == "wifn":
            return wide.abs().mean(0) * (squares / count.clamp(min=1)).sqrt()
        variance = ((squares - sum.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)).clamp(min=0)
        return variance if self.metric == "ifv" else variance * wide.square().sum(0)

    def unit_scores(self, channels: Tensor, units: int, attention: bool) -> Tensor:
        """Standardised over the channels, then averaged over those of each unit, [units]."""
        values = channels.square() if attention and self.square else channels
        spread = values.std()
        standard = (values - values.mean()) / spread if float(spread) > 0 else torch.zeros_like(values)
        return standard.reshape(units, -1).mean(1)

    def decide(self, study: Study) -> Plan:
        kinds = self.kinds(study.budget)
        scores: dict[Kind, dict[str, Tensor]] = {}
        plain: dict[str, Tensor] = {}
        for space in (space for kind in kinds for space in study.spaces(kind)):
            key = canonical_name(space.place, _ROLES[space.kind], "weight", space.expert)
            channels = next(iter(study.summaries[key]))
            plain[space.name] = channels.reshape(space.size, -1).mean(1)
            scores.setdefault(space.kind, {})[space.name] = self.unit_scores(channels, space.size, space.kind != "ffn")
        after = self._allocated(study, scores)
        left = {space.name: space.size for kind in kinds for space in all_spaces(after, kind)}
        kept = {name: keep_best(found, left[name]) for of in scores.values() for name, found in of.items()}
        notes = (
            {}
            if len(kinds) > 1
            else {"attention": "; ".join(refusals(study.budget.architecture, "kv", study.budget.layout))}
        )
        plan = Plan(study.budget.sizes, after, kept, notes=notes, charts=score_charts(plain, kept))
        return self._compensated(study, plan, kinds) if self.bias else plan

    def _compensated(self, study: Study, plan: Plan, kinds: list[Kind]) -> Plan:
        """The plan with the means of what goes in the biases of what reads it; no bias where nothing goes."""
        edits, blocks = {}, list(plan.after.blocks)
        for space in (space for kind in kinds for space in study.spaces(kind)):
            assert space.place is not None
            role, count = _ROLES[space.kind], len(plan.kept[space.name])
            view = study.view(space.place, (role,))
            bias = canonical_name(space.place, role, "bias", space.expert)
            flag: dict[str, Any] = {f"{role}_bias": False}
            if count == space.size:
                blocks[space.place] = replace(blocks[space.place], **flag)
            elif bias in view.tensors or getattr(plan.sizes_of(space.place), f"{role}_bias"):
                reader = view.reader(space)
                gone = torch.ones(space.size, dtype=torch.bool)
                gone[plan.kept[space.name]] = False
                mean = next(iter(study.summaries[f"{reader.name}.mean"]))
                edits[bias] = absorb(view.tensors.get(bias), reader.values, mean * gone.repeat_interleave(reader.span))
        return replace(plan, after=replace(plan.after, blocks=tuple(blocks)), edits=edits)
