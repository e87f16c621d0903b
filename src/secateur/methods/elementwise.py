"""Methods whose units are single weights: a score for every entry, a density for every matrix, a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from secateur.budgets import Budget, densities
from secateur.cuts.masks import Group, Pattern, PatternName, best, parse_pattern
from secateur.families import Architecture, CanonicalTensor, Sizes
from secateur.families.roles import MATRICES
from secateur.methods.base import Method, Study
from secateur.methods.charts import density_chart
from secateur.methods.ranked import ranked
from secateur.plans import Mend, Plan
from secateur.plans.lazy import OneAtATime
from secateur.scores.weights import lamp_scores
from secateur.spaces import BlockView
from secateur.spaces.weights import INPUTS, PARTS, Part, all_matrices, block_of, input_key, matrices_of, units_of

Allocation = Literal["uniform", "uniform+", "erk", "block", "global", "lamp", "owl"]
_RANKED = ("block", "global", "lamp")
_OUTLIERS = "outliers"


class WeightOptions(Method):
    """Which single weights compete with which, and how many of each matrix stay."""

    pattern: PatternName = Field(
        "element",
        description="shape in which weights go: element, N:M (N of every M consecutive inputs stay, e.g. 2:4; the "
        "pattern is the size, no --ratio is needed) or RxC blocks (e.g. 16x16)",
    )
    allocation: Allocation = Field(
        "uniform",
        description="how much every matrix keeps: the same share (uniform), the first block whole and a fifth of the "
        "last (uniform+), in proportion to inputs plus outputs (erk), what one ranking of a block or of all weights "
        "leaves (block, global), the same with LAMP's normalised scores (lamp), less where few scores stand out (owl)",
    )
    part: Part = Field("all", description=PARTS)
    floor: NonNegativeFloat = Field(
        0.0,
        le=100,
        description="percent of all these weights that every matrix keeps in a ranking",
    )
    outlier: PositiveFloat = Field(5.0, description="owl: a score stands out above this many times its block's mean")
    spread: NonNegativeFloat = Field(0.08, le=1, description="owl: how far a block's share may be from the mean")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.shape.fixed and (self.allocation != "uniform" or self.sparsity is not None):
            raise ValueError(
                f"pattern {self.pattern} says by itself what every matrix keeps: leave allocation and sparsity"
            )
        return self

    @property
    def shape(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def sized(self) -> bool:
        return self.shape.fixed or super().sized


class Elementwise(WeightOptions):
    """Zero the weights of the blocks' matrices that score lowest.

    Class attributes:
        signals: statistics of a matrix's inputs that its score reads, ``moments`` or ``gram``; empty for none.
    """

    output = "zeros"
    group = "unstructured"
    order = "sequential"
    signals: ClassVar[Literal["", "moments", "gram"]] = ""

    within: Group = Field(
        "matrix", description="what the weights of a matrix compete in: each row, or the whole matrix"
    )

    @property
    def _summarised(self) -> bool:
        return self.allocation in (*_RANKED, "owl")

    @property
    def roles(self) -> tuple[str, ...] | None:
        return tuple(MATRICES) if self._summarised and not self.signals else ()

    @property
    def evidence(self) -> frozenset[str]:  # type: ignore[override]
        return self._statistics if self._summarised else frozenset()

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (self._statistics,) if self.signals else ()

    @property
    def rewrites(self) -> bool:
        return self.part in ("all", "attention")

    @property
    def _statistics(self) -> frozenset[str]:
        return frozenset({f"{INPUTS}.{self.signals}"}) if self.signals else frozenset()

    # -- what a method says ----------------------------------------------------------------------------------------

    def weigh(self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
        """Scores of the weights of a matrix, [out, in], higher = keep."""
        raise NotImplementedError

    def scores_of(self, study: Study, matrix: CanonicalTensor) -> Tensor:
        """The same in the decision, of methods that have no statistics of signals to wait for."""
        return self.weigh(study.block(matrix.block), matrix, {})

    # -- how many ---------------------------------------------------------------------------------------------------

    def sizes(self, budget: Budget) -> Sizes:
        self.kept(budget)  # refuses what cannot be reached
        return budget.sizes

    def zeros(self, budget: Budget) -> int:
        return self.prunable(budget.architecture) - self.kept(budget)

    def foresees(self, budget: Budget) -> bool:
        return True

    def kept(self, budget: Budget) -> int:
        """How many of the weights that can go stay."""
        shapes, prunable = self.shapes(budget.architecture), self.prunable(budget.architecture)
        if self.shape.fixed:
            count = sum(self.shape.count(shape) for shape in shapes.values())
            budget.require_weights(prunable, count, f"pattern {self.pattern}")
            return count
        return budget.weights(prunable) if self.sparsity is None else prunable - int(self.sparsity * prunable + 1e-9)

    def prunable(self, architecture: Architecture) -> int:
        """Weights that can go one by one."""
        return sum(rows * columns for rows, columns in self.shapes(architecture).values())

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, int]]:
        """Shapes of the matrices whose weights can go."""
        found = {}
        for matrix in all_matrices(architecture, self.part):
            rows, columns = architecture.shapes[matrix.name]
            found[matrix.name] = (rows, columns)
        return found

    def counts(self, study: Study) -> dict[str, int]:
        """How many weights every matrix keeps."""
        architecture, total = study.budget.architecture, self.kept(study.budget)
        shapes = self.shapes(architecture)
        if self.shape.fixed:
            return {name: self.shape.count(shape) for name, shape in shapes.items()}
        if self.allocation in _RANKED:
            units = units_of(shapes, "block") if self.allocation == "block" else [list(shapes)]
            return ranked(study, shapes, total, units, self.floor / 100)
        if self.allocation == "owl":
            keep = total / self.prunable(architecture)
            blocks = densities.owl_shares([float(each) for each in study.summaries[_OUTLIERS]], keep, self.spread)
            return densities.mapped(shapes, total, {name: blocks[block_of(name)] for name in shapes})
        if self.allocation == "uniform+":
            last = max(map(block_of, shapes))
            first, end = ([name for name in shapes if block_of(name) == block] for block in (0, last))
            return densities.uniform_plus(shapes, total, first, end)
        return (densities.erk if self.allocation == "erk" else densities.uniform)(shapes, total)

    # -- what is gathered and decided ---------------------------------------------------------------------------------

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        matrices = matrices_of(view.architecture, view.place, self.part)
        scores = {matrix.name: self.weigh(view, matrix, evidence).float() for matrix in matrices}
        if self.allocation == "owl" and scores:
            every = torch.cat([each.flatten() for each in scores.values()])
            return {_OUTLIERS: (every > self.outlier * every.mean(dtype=torch.float64)).double().mean()}
        return {name: self.normalised(each) for name, each in scores.items()}

    def normalised(self, scores: Tensor) -> Tensor:
        """Scores of a matrix as they are ranked among those of others."""
        return lamp_scores(scores).float() if self.allocation == "lamp" else scores

    def decide(self, study: Study) -> Plan:
        sizes, architecture = study.budget.sizes, study.budget.architecture
        counts, shapes = self.counts(study), self.shapes(architecture)
        chart = density_chart({architecture.tensors[n]: counts[n] / (shapes[n][0] * shapes[n][1]) for n in shapes})
        notes = {"prunable": self.prunable(architecture), "kept": sum(counts.values()), "pattern": self.pattern}
        plan = Plan(sizes, sizes, counts=counts, notes={"weights": notes}, charts=(chart,))
        if self.mends:
            return plan

        def mask(name: str) -> Tensor:
            return self.mask(self.scores_of(study, architecture.tensors[name]), counts[name])

        return replace(plan, masks=OneAtATime(list(counts), mask))

    def mask(self, scores: Tensor, count: int) -> Tensor:
        """Which weights of a matrix stay."""
        return best(scores, count, self.within, self.shape)

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        found = {}
        for matrix in matrices_of(view.architecture, view.place, self.part):
            found[matrix.name] = self.mask(self.weigh(view, matrix, evidence), plan.counts[matrix.name])
        return Mend(masks=found)


def squares_of(view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
    """Mean over tokens of the squared inputs of a matrix, [in]; zero where none came."""
    key = input_key(view.architecture, matrix)
    return evidence[f"{key}.squares"] / evidence[f"{key}.count"].clamp(min=1).to(evidence[f"{key}.squares"].device)
