"""ARMOR: matrices as an N:M core between two block-diagonal wrappers (arXiv:2510.05528)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from secateur.budgets import Budget
from secateur.cuts.factors import Factors, Stored, largest_block
from secateur.cuts.masks import PatternName, best, parse_pattern
from secateur.families import Architecture, CanonicalTensor, Sizes
from secateur.mends import DAMPING
from secateur.mends.obs import obs_sweep
from secateur.mends.wrapped import Descent, normalised, supports
from secateur.methods.base import Method, Study
from secateur.methods.charts import density_chart
from secateur.methods.elementwise import squares_of
from secateur.plans import Mend, Plan
from secateur.spaces import BlockView
from secateur.spaces.weights import INPUTS, PARTS, Part, all_matrices, input_key, matrices_of

_LARGEST_BLOCK = 128
_MOST_SUPPORTS = 100
_SWEEPS = {"gram": 4, "diagonal": 40}


def _few_supports(text: str) -> str:
    pattern = parse_pattern(text)
    if not pattern.fixed or supports(pattern) > _MOST_SUPPORTS:
        raise ValueError(f"not N:M as in 2:4 with at most {_MOST_SUPPORTS} ways to choose N of M: each is tried")
    return text


class Armor(Method):
    """Behind the cuts so far, fit W ~ A (S o M) B to every matrix, M in an N:M pattern, A and B block diagonal.

    The loss starts at that of the best mask alone (NoWag-P) and never rises.
    """

    name = "armor"
    title = "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization"
    paper = "arXiv:2510.05528"
    data = "text"
    output = "factors"
    group = "factors"

    pattern: Annotated[PatternName, AfterValidator(_few_supports)] = Field(
        "2:4", description="N:M, of the core: N of every M consecutive inputs stay; the pattern is the size"
    )
    part: Part = Field("all", description=PARTS)
    block: PositiveInt | None = Field(
        None,
        description=f"side of the wrappers' blocks; left out: for each matrix the largest power of two up to "
        f"{_LARGEST_BLOCK} whose wrappers take no more than the share of the matrix (at least M)",
    )
    share: PositiveFloat = Field(0.0625, le=1, description="of the matrix that its wrappers may take")
    proxy: Literal["diagonal", "gram"] = Field(
        "gram",
        description="what the loss knows of the inputs: their mean squares, on normalised weights (the paper's), or "
        "(ours) all their products, from sparsegpt's result on",
    )
    statistics: Literal["sequential", "dense"] = Field(
        "sequential", description="inputs seen behind the cuts of the blocks before, or those of the dense model"
    )
    optimiser: Literal["exact", "adam"] = Field(
        "exact", description="least squares for one factor after the other (ours), or the paper's steps of Adam"
    )
    sweeps: PositiveInt | None = Field(
        None,
        description="exact: rounds over both wrappers and all groups of the core, at most; left out: "
        f"{_SWEEPS['gram']} with proxy=gram, where one costs ten times as much, else {_SWEEPS['diagonal']}",
    )
    steps: PositiveInt = Field(3000, description="adam: steps, at most")
    rate: PositiveFloat = Field(1e-4, description="adam: learning rate")
    damping: PositiveFloat = Field(1e-6, description="ridge of every least-squares step over the mean of its diagonal")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.sparsity is not None:
            raise ValueError(f"pattern {self.pattern} says by itself what every matrix keeps: leave sparsity")
        return self

    @property
    def sized(self) -> bool:
        return True

    @property
    def order(self) -> Literal["dense", "sequential"]:  # type: ignore[override]
        return self.statistics

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """The paper's form draws the groups."""
        return self.optimiser == "adam"

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (frozenset({f"{INPUTS}.{'gram' if self.proxy == 'gram' else 'moments'}"}),)

    def foresees(self, budget: Budget) -> bool:
        return True

    def sizes(self, budget: Budget) -> Sizes:
        stored = self.stored(budget.architecture, budget.itemsize).values()
        if budget.targets:
            kept, dense = (sum(each) for each in zip(*((s.parameters, s.dense) for s in stored), strict=True))
            budget.require_weights(dense, kept, f"pattern {self.pattern} with its wrappers")
        return budget.sizes

    def foreseen(self, budget: Budget) -> dict[str, int]:
        stored = self.stored(budget.architecture, budget.itemsize).values()
        params, size = budget.costs.params(budget.sizes), budget.costs.bytes(budget.sizes)
        return {
            "factored_params": params - sum(each.dense - each.parameters for each in stored),
            "factored_bytes": size - sum(each.dense_bytes - each.bytes for each in stored),
            "factored_params_before": params,
            "factored_bytes_before": size,
        }

    def stored(self, architecture: Architecture, itemsize: int) -> dict[str, Stored]:
        """What every matrix will take, from the shapes alone."""
        pattern, found = parse_pattern(self.pattern), {}
        for matrix in all_matrices(architecture, self.part):
            rows, columns = architecture.shapes[matrix.name]
            found[matrix.name] = Stored.foreseen((rows, columns), self.side((rows, columns)), pattern, itemsize)
        return found

    def side(self, shape: tuple[int, int]) -> int:
        """Side of the wrappers' blocks of a matrix."""
        return self.block or largest_block(shape, self.share, _LARGEST_BLOCK, parse_pattern(self.pattern).of)

    def decide(self, study: Study) -> Plan:
        sizes, architecture = study.budget.sizes, study.budget.architecture
        by_name = self.stored(architecture, study.budget.itemsize)
        stored = by_name.values()
        shares = {
            architecture.tensors[name]: each.parameters / math.prod(architecture.shapes[name])
            for name, each in by_name.items()
        }
        notes = {
            "pattern": self.pattern,
            "parameters": sum(each.parameters for each in stored),
            "of them in the wrappers": sum(each.wrappers for each in stored),
            "bytes": sum(each.bytes for each in stored),
            "bytes without wrappers": sum(each.plain_bytes for each in stored),
            "bytes dense": sum(each.dense_bytes for each in stored),
        }
        seed = {"seed": int(torch.randint(2**31, (), generator=study.generator))} if self.seeded else {}
        return Plan(sizes, sizes, notes={"factors": notes, **seed}, charts=(density_chart(shares),))

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        edits: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for number, matrix in enumerate(matrices_of(view.architecture, view.place, self.part)):
            generator = torch.Generator().manual_seed(plan.notes.get("seed", 0) + number)
            found, losses = self.fitted(view, matrix, evidence, generator)
            edits[matrix.name] = found.product()
            factors |= {**found.named(matrix.name), f"{matrix.name}.{LOSSES}": losses}
        return Mend(edits=edits, factors=factors)

    def fitted(
        self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor], generator: torch.Generator
    ) -> tuple[Factors, Tensor]:
        """The factors of a matrix in its own data type, and the loss before and after, [2]."""
        weight, stored = view.tensors[matrix.name], view.tensors[matrix.name].dtype
        descent, rows, columns = self._start(view, matrix, evidence)
        before = descent.loss()
        for _ in self._run(descent, generator):
            pass
        state, (height, width) = descent.state, weight.shape
        mask = state.mask[:height, :width]
        left = state.left * _filled(rows, state.left)[:, :, None]
        right = state.right * _filled(columns, state.right)[:, None, :]
        values = state.core[:height, :width][mask]
        found = Factors(left.to(stored), values.to(stored), mask, right.to(stored))
        return found, torch.tensor([before, descent.loss()], dtype=torch.float64)

    def _start(
        self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]
    ) -> tuple[Descent, Tensor, Tensor]:
        """The masked matrix to descend from, and what its rows and columns were divided by; where the evidence is."""
        pattern, weight = parse_pattern(self.pattern), view.tensors[matrix.name]
        block = self.side((weight.shape[0], weight.shape[1]))
        if self.proxy == "gram":
            key = input_key(view.architecture, matrix)
            gram = evidence[f"{key}.gram"]
            gram = gram / evidence[f"{key}.count"].clamp(min=1).to(gram)
            weight = weight.to(gram)
            if not bool((gram.diagonal() > 0).any()):
                gram = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)  # an expert that saw nothing
            start, mask = obs_sweep(weight, gram, lambda s, *_: best(s, 0, pattern=pattern), step=pattern.of)
            # few tokens leave directions of which they say nothing: what held the sweep there holds the descent too
            gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            descent = Descent(weight, gram, start, mask, pattern, block, self.damping)
            return descent, weight.new_ones(weight.shape[0]), weight.new_ones(weight.shape[1])
        squares = squares_of(view, matrix, evidence)
        weight = weight.to(squares)
        seen = (squares > 0) & squares.isfinite()
        squares = torch.where(seen, squares, squares[seen].mean() if bool(seen.any()) else 1.0)
        scaled, rows, columns = normalised(weight)
        mask = best(scaled.square() * squares, 0, pattern=pattern)
        return Descent(scaled, squares, scaled, mask, pattern, block, self.damping), rows, columns

    def _run(self, descent: Descent, generator: torch.Generator) -> Iterator[float]:
        if self.optimiser == "adam":
            return descent.gradually(self.steps, self.rate, generator)
        return descent.exactly(self.sweeps or _SWEEPS[self.proxy])


LOSSES = "losses"


def _filled(scale: Tensor, blocks: Tensor) -> Tensor:
    """Factors of rows or columns, in blocks, one where these reach beyond the matrix: [blocks, side]."""
    found = scale.new_ones(blocks.shape[0] * blocks.shape[1])
    found[: len(scale)] = scale
    return found.view(blocks.shape[:2])
