"""BlockPruner: the attention or FFN branch without which the loss stays lowest goes, one after the other.

arXiv:2406.10594. With whole blocks as units it is the greedy search of SLEB (arXiv:2402.09025). What a trial is judged
by may also be how far its predictions are from those of the dense model (ours).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.errors import refuse
from secateur.families import Layout, Sizes
from secateur.methods.base import Method, Study
from secateur.methods.branch import WRITERS, Branch, without
from secateur.plans import Chart, Plan
from secateur.spaces import Kind


class BlockPruner(Method):
    """Leave one out, on the calibration text, of all that is still there; no gradients and no second thoughts."""

    name = "blockpruner"
    title = "BlockPruner: Fine-grained Pruning for Large Language Models"
    paper = "arXiv:2406.10594"
    data = "text"

    units: Literal["auto", "branches", "attention", "ffn", "blocks"] = Field(
        "auto",
        description="what goes at once: attention and FFN branches (per-layer layout, and the default there), those of "
        "one sort, or whole blocks (the default in the native layout)",
    )

    objective: Literal["perplexity", "kl"] = Field(
        "perplexity",
        description="what a trial is judged by: the perplexity of the text, or (ours) how far the predictions are from "
        "those of the dense model, KL(dense || cut)",
    )

    @property
    def cuts(self) -> Kind:
        return "blocks"

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native" and self.units not in ("auto", "blocks"):
            asked = f"{self.name} with units={self.units} in the native layout"
            found = "stock classes have no blocks without attention or without FFN"
            refuse("not-native", asked, found, "--layout per-layer, or --set units=blocks")
        auto = "blocks" if layout == "native" else "branches"
        return self.model_copy(update={"units": auto}) if self.units == "auto" else self

    def candidates(self, sizes: Sizes) -> list[Branch]:
        """All that could go, in the order of the blocks."""
        if self.units == "blocks":
            return [Branch(block, ("attention", "ffn")) for block in range(len(sizes.blocks))]
        parts = (self.units,) if self.units in WRITERS else ("attention", "ffn")
        return [Branch(i, (part,)) for i, block in enumerate(sizes.blocks) for part in parts if block.has(part)]

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes that some order of removal comes to; which branches go, and so the sizes, is up to the trials."""
        path, units = [budget.sizes], self.candidates(budget.sizes)
        gone: list[Branch] = []
        while not self._enough(budget, path[-1], len(gone), len(units)):
            found = next(self._admitted(budget, reversed(units), gone), None)
            if found is None:
                break
            gone.append(found)
            path.append(without(budget.sizes, gone))
        return self._nearest(budget, path)

    def foresees(self, budget: Budget) -> bool:
        return self.units == "blocks" and budget.sizes.alike

    def _enough(self, budget: Budget, sizes: Sizes, gone: int, units: int) -> bool:
        return budget.met(sizes) if self.sparsity is None else gone >= int(self.sparsity * units)

    def _nearest(self, budget: Budget, path: list[Sizes]) -> Sizes:
        if self.sparsity is not None:
            return path[-1]
        return budget.solve_among(path[::-1], self.units)

    def _admitted(self, budget: Budget, units: Iterable[Branch], gone: list[Branch]) -> Iterator[Branch]:
        for unit in units:
            after = None if unit in gone else without(budget.sizes, [*gone, unit])
            if after and after.blocks and not budget.problems(after):
                yield unit

    def decide(self, study: Study) -> Plan:
        budget, before = study.budget, study.budget.sizes
        units, gone, path = self.candidates(before), list[Branch](), [before]
        silent = {unit: unit.silent(study) for unit in units}
        edits: dict[str, Tensor] = {}
        losses, judged = [study.trials.settle()], list[float]()
        judge = study.trials.divergence if self.objective == "kl" else study.trials.loss
        while not self._enough(budget, path[-1], len(gone), len(units)):
            left = list(self._admitted(budget, units, gone))
            if not left:
                break
            found = []
            for number, unit in enumerate(left, 1):
                study.progress(number, len(left), f"trial without {len(gone) + 1}")
                found.append(judge({**edits, **silent[unit]}))
            best = min(range(len(left)), key=found.__getitem__)
            gone.append(left[best])
            judged.append(found[best])
            edits |= silent[left[best]]
            losses.append(study.trials.settle(edits))
            path.append(without(before, gone))
        after = self._nearest(budget, path)
        taken = path.index(after)
        removed = {unit.block for unit in gone[:taken] if len(unit.parts) > 1}
        kept = torch.tensor([block for block in range(len(before.blocks)) if block not in removed])
        notes: dict[str, Any] = {
            "path": [str(unit) for unit in gone],
            "losses": [round(loss, 6) for loss in losses],
            "taken": taken,
            "trials": study.trials.count,
        }
        if self.objective == "kl":
            notes["divergences"] = [round(value, 6) for value in judged]
        return Plan(before, after, {"blocks": kept} if removed else {}, notes=notes, charts=(_chart(losses, taken),))


def _chart(losses: list[float], taken: int) -> Chart:
    points = [(float(count), float(f"{math.exp(min(loss, 99)):.6g}")) for count, loss in enumerate(losses)]
    mark = (float(taken), f"{taken} taken")
    return Chart("Calibration perplexity along the path", "removed", "perplexity", {"path": points}, mark=mark)
