"""SliceGPT: delete directions of the residual stream after a PCA rotation (ICLR 2024, arXiv:2401.15024).

The paper rotates every block's interface by its own PCA and pays with two shortcut matrices per block. In the native
layout one rotation is shared by all blocks: the PCA of the sum of the interfaces' trace-normalised Grams. No shortcut
is left and the result is a stock model with a smaller ``hidden_size``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Sizes
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Plan
from secateur.spaces import BlockView, Kind

_ROUNDING = 8  # the published code floors the width to a multiple of it


class SliceGpt(Method):
    """Rotate the residual stream to its principal directions and keep the largest.

    ``interface_weight``, ``basis_of`` and ``sizes`` are the hooks: how much each interface counts, which
    directions survive, and how wide the stream stays.
    """

    name = "slicegpt"
    title = "SliceGPT: Compress Large Language Models by Deleting Rows and Columns"
    paper = "arXiv:2401.15024"
    data = "text"
    evidence = frozenset({"stream"})

    basis: Literal["pca", "random", "subset"] = Field(
        "pca",
        description="directions that survive: principal ones, random ones, or plain dimensions (keeps a tied head)",
    )
    tie: Literal["untie", "keep"] = Field(
        "untie",
        description="a tied head: give it a table of its own (exact), or keep one for both by least squares (ours)",
    )
    orientation: Literal["pca", "random"] = Field(
        "pca", description="orientation inside the surviving subspace; random spreads energy, the function is the same"
    )

    @property
    def cuts(self) -> Kind:
        return "residual"

    def _selects(self, budget: Budget) -> bool:
        return self.basis == "subset" and budget.architecture.family.norm == "rms"

    def _keeps_tie(self, budget: Budget) -> bool:
        """Whether one table goes on serving as embedding and head."""
        if not budget.sizes.tied or budget.architecture.family.norm == "layer":
            return False
        return self.tie == "keep" or self.basis == "subset"

    def sizes(self, budget: Budget) -> Sizes:
        base = budget.sizes if self._keeps_tie(budget) else budget.sizes.untied()
        if self.sparsity is None:
            return budget.solve("residual", base)
        width = int((1 - self.sparsity) * budget.sizes.residual)
        return budget.at("residual", width - width % _ROUNDING or width, base)

    def interface_weight(self, gram: Tensor) -> float:
        """Weight of one interface in the sum: its inverse energy, so that each counts the same."""
        return 1 / max(float(gram.trace()), 1e-30)

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted sum of the Grams of the place's norm inputs, [width, width]."""
        return {"stream": torch.stack([gram * self.interface_weight(gram) for gram in evidence.values()]).sum(0)}

    def basis_of(self, gram: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The ``count`` directions that survive, [width, count], orthonormal columns."""
        width = gram.shape[0]
        if self.basis == "random":
            return _random_orthogonal(width, generator)[:, :count]
        if self.basis == "subset":
            return torch.eye(width, dtype=torch.float64)[:, keep_best(gram.diagonal(), count)]
        _, vectors = torch.linalg.eigh(gram)  # ascending
        directions: Tensor = vectors.flip(1)[:, :count]
        # the sign of an eigenvector is arbitrary: make its largest entry positive
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return directions * largest.sign()

    def decide(self, study: Study) -> Plan:
        budget, after = study.budget, self.sizes(study.budget)
        gram = torch.zeros(budget.sizes.residual, budget.sizes.residual, dtype=torch.float64)
        for part in study.summaries["stream"]:
            gram += part
        if self._selects(budget):
            return Plan(budget.sizes, after, {"residual": keep_best(gram.diagonal(), after.residual)})
        mean_free = budget.architecture.family.norm == "layer"
        if mean_free:  # what a LayerNorm sees has no mean
            gram = gram - gram.mean(0)
            gram = gram - gram.mean(1, keepdim=True)
        directions = self.basis_of(gram, after.residual - int(mean_free), study.generator)
        explained = float(torch.einsum("dk,de,ek->", directions, gram, directions) / gram.trace())
        if self.orientation == "random":
            directions = directions @ _random_orthogonal(directions.shape[1], study.generator)
        return Plan(budget.sizes, after, basis=directions.contiguous(), notes={"kept_energy": round(explained, 6)})


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrix."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed
