"""LLM-Pruner: coupled groups go by Taylor importance, as many in every block but the first and last (arXiv:2305.11627).

Block-wise, a group lies in a block; channel-wise, it is a dimension of the residual stream with all that meets it.
Recovery, which the paper adds, is ``secateur recover``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from secateur.budgets import Budget
from secateur.budgets.shares import sizes_at_shares, with_ffn_of
from secateur.errors import refuse
from secateur.families import Kind, Layout, Sizes
from secateur.methods.base import Study
from secateur.methods.selection import dimensions_base
from secateur.methods.taylor import Groups, TaylorGroups
from secateur.plans import Plan

_PAPER_DEPTH, _PAPER_FIRST, _PAPER_LAST = 32, 4, 2  # blocks 4 to 29 of 32 are cut
_PER_LAYER: Final = "--layout per-layer"
_OF_BLOCKS: Final = frozenset({"allocation", "targets", "first", "last"})


class LlmPruner(TaylorGroups):
    """The same share of every block's neurons and key/value groups, the ends protected; or one ranking of all."""

    name = "llm_pruner"
    title = "LLM-Pruner: On the Structural Pruning of Large Language Models"
    paper = "arXiv:2305.11627"

    mode: Literal["block", "channel"] = Field(
        "block", description="groups of every block, or dimensions of the residual stream, the same for all blocks"
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform", description="the same share in every block, or what one ranking of all groups leaves (per-layer)"
    )
    first: NonNegativeInt | None = Field(
        None, description="leading blocks left whole; default the paper's 4 of 32, scaled (per-layer layout)"
    )
    last: NonNegativeInt | None = Field(
        None, description="closing blocks left whole; default the paper's 2 of 32, scaled (per-layer layout)"
    )
    iterative_steps: PositiveInt = Field(1, description="sweeps of gradients, a part of the groups going after each")

    @property
    def cuts(self) -> Kind:
        return "residual" if self.mode == "channel" else "ffn"

    def kinds(self, budget: Budget) -> list[Kind]:
        return ["residual"] if self.mode == "channel" else super().kinds(budget)

    def in_layout(self, layout: Layout) -> Self:
        if self.mode == "channel":
            self._require_no_blocks()
            return self
        if layout == "native":
            asked = [f"first={self.first}"] if self.first else []
            asked += [f"last={self.last}"] if self.last else []
            asked += ["allocation=global"] if self.allocation == "global" else []
            if asked:
                found = "stock classes give all blocks one size"
                refuse("not-native", f"{self.name} with {', '.join(asked)} in the native layout", found, _PER_LAYER)
            return self.model_copy(update={"first": 0, "last": 0})
        return self

    def _require_no_blocks(self) -> None:
        """Refuse, channel-wise, what only groups of blocks have."""
        asked = f"{self.name} with mode=channel"
        if idle := sorted(self.model_fields_set & _OF_BLOCKS):
            refuse("bad-option", f"{asked} and {idle[0]}", "the stream is one for all blocks", f"leave {idle[0]} out")
        if self.reduction == "prod":
            found = "the product over the matrices of all blocks is too small for a number"
            refuse("bad-option", f"{asked} and reduction=prod", found, "--set reduction=sum")

    def whole(self, depth: int) -> set[int]:
        """Blocks that are left whole."""
        if self.mode == "channel":
            return set()
        first = round(depth * _PAPER_FIRST / _PAPER_DEPTH) if self.first is None else self.first
        last = round(depth * _PAPER_LAST / _PAPER_DEPTH) if self.last is None else self.last
        if first + last >= depth:
            found, hint = f"the model has {depth} blocks", "lower first or last"
            refuse("bad-option", f"{self.name} with {first} + {last} blocks left whole", found, hint)
        return {*range(first), *range(depth - last, depth)}

    def sizes(self, budget: Budget) -> Sizes:
        """The same share everywhere; heads come in few, so the neurons make up for how their number is rounded."""
        if self.mode == "channel":
            return self._solve(budget, "residual", dimensions_base(budget))
        kinds, depth = self.kinds(budget), len(budget.sizes.blocks)
        whole = self.whole(depth)

        def at(share: float, of: list[Kind]) -> Sizes:
            shares = [1.0 if block in whole else share for block in range(depth)]
            return sizes_at_shares(budget, dict.fromkeys(of, shares))

        if self.sparsity is not None:
            return at(1 - self.sparsity, kinds)
        what = " and ".join(kinds)
        if len(kinds) == 1:
            return budget.solve_along(lambda share: at(share, kinds), what)
        both = replace(budget, tolerance=None).solve_along(lambda share: at(share, kinds), what)
        return budget.solve_along(lambda share: with_ffn_of(both, at(share, ["ffn"])), what)

    def foresees(self, budget: Budget) -> bool:
        return self.allocation == "uniform"

    def decide(self, study: Study) -> Plan:
        groups, steps = Groups(study, self), self.iterative_steps
        after = self.sizes(study.budget)
        for step in range(steps):
            study.progress(step + 1, steps, "gradients")
            groups.measure()
            if self.allocation == "global":
                after = self._ranked(study.budget, groups)
            groups.shrink(after, 1 / (steps - step))
        whole = sorted(self.whole(len(after.blocks)))
        return groups.plan(after, {"left_whole": whole, "cut": groups.kinds, "steps": steps})

    def _ranked(self, budget: Budget, groups: Groups) -> Sizes:
        """What remains when the lowest of all groups go, whichever block they are in."""
        depth = len(budget.sizes.blocks)
        whole = self.whole(depth)
        open_to_cut = [space for space in groups.spaces if space.place not in whole]
        pooled = torch.cat([groups.scores[s.name][groups.alive[s.name]] for s in open_to_cut]).sort().values

        def at(share: float) -> Sizes:
            least = pooled[min(len(pooled) - 1, int((1 - share) * len(pooled)))]
            shares: dict[Kind, list[float]] = {kind: [1.0] * depth for kind in groups.kinds}
            for kind in groups.kinds:
                for place in range(depth):
                    here = [s for s in open_to_cut if s.place == place and s.kind == kind]
                    stay = sum(int((groups.scores[s.name][groups.alive[s.name]] >= least).sum()) for s in here)
                    if here:
                        shares[kind][place] = stay / sum(s.size for s in here)
            return sizes_at_shares(budget, shares)

        if self.sparsity is not None:
            return at(1 - self.sparsity)
        return budget.solve_along(at, "one ranking of " + " and ".join(groups.kinds))
