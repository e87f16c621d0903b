"""SliceGPT: delete directions of the residual stream after a PCA rotation (ICLR 2024, arXiv:2401.15024).

The paper rotates every interface (what a norm reads) by a PCA of its own and pays with a shortcut matrix from each to
the next: the per-layer layout. In the native layout one rotation is shared by all: the PCA of the sum of the
interfaces' trace-normalised Grams. No shortcut is left and the result is a stock model with a smaller ``hidden_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.cuts.gauge import estimate_savings
from secateur.cuts.stream import SHARED, interfaces, triangular
from secateur.errors import refuse
from secateur.families import Layout, Sizes, place_name
from secateur.methods.base import Method, Study, keep_best
from secateur.methods.charts import spectrum_charts
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

    rotation: Literal["auto", "shared", "each"] = Field(
        "auto",
        description="one rotation for all interfaces, or each its own with shortcuts between them (per-layer layout "
        "only, and the default there)",
    )

    @property
    def cuts(self) -> Kind:
        return "residual"

    def in_layout(self, layout: Layout) -> Self:
        if self.rotation == "each" and layout == "native":
            asked = "slicegpt with rotation=each in the native layout"
            refuse("not-native", asked, "stock classes have no place for shortcuts", "--layout per-layer")
        if self.rotation != "auto":
            return self
        return self.model_copy(update={"rotation": "each" if layout == "per-layer" else "shared"})

    def _selects(self, budget: Budget) -> bool:
        return self.basis == "subset" and self.rotation != "each" and budget.architecture.family.norm == "rms"

    def _keeps_tie(self, budget: Budget) -> bool:
        """Whether one table goes on serving as embedding and head."""
        if not budget.sizes.tied or budget.sizes.mean_free or self.rotation == "each":
            return False
        return self.tie == "keep" or self.basis == "subset"

    def sizes(self, budget: Budget) -> Sizes:
        base = budget.sizes if self._keeps_tie(budget) else budget.sizes.untied()
        base = replace(base, shortcuts=base.shortcuts or self.rotation == "each")
        if self.sparsity is None:
            return budget.solve("residual", base)
        width = int((1 - self.sparsity) * budget.sizes.residual)
        return budget.at("residual", width - width % _ROUNDING or width, base)

    def interface_weight(self, gram: Tensor) -> float:
        """Weight of one interface in the sum: its inverse energy, so that each counts the same."""
        return 1 / max(float(gram.trace()), 1e-30)

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Grams of the place's norm inputs, [width, width] each, or their weighted sum where one rotation is shared."""
        if self.rotation == "each":
            return {f"{place_name(view.place)}.{norm}": gram for norm, gram in evidence.items()}
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
        count = after.residual - after.mean_free
        if self.rotation == "each":
            savings = estimate_savings(budget.architecture, after)
            numbers = {f"{key}_shortcut_numbers": savings[key] for key in ("square", "stored", "saved")}
            turned = _Rotations(self, study, after)
            return Plan(budget.sizes, after, bases=turned, notes=numbers, charts=spectrum_charts(turned.mean(), count))
        gram = torch.zeros(budget.sizes.residual, budget.sizes.residual, dtype=torch.float64)
        for part in study.summaries["stream"]:
            gram += part
        if self._selects(budget):
            kept = {"residual": keep_best(gram.diagonal(), after.residual)}
            return Plan(budget.sizes, after, kept, charts=spectrum_charts(gram, after.residual))
        if after.mean_free:
            gram = _centred(gram)
        directions = self.basis_of(gram, count, study.generator)
        explained = float(torch.einsum("dk,de,ek->", directions, gram, directions) / gram.trace())
        if self.orientation == "random":
            directions = directions @ _random_orthogonal(directions.shape[1], study.generator)
        bases = {SHARED: directions.contiguous()}
        notes = {"kept_energy": round(explained, 6)}
        return Plan(budget.sizes, after, bases=bases, notes=notes, charts=spectrum_charts(gram, directions.shape[1]))


class _Rotations(Mapping[str, Tensor]):
    """The rotation of every interface, computed when asked for; asked in order, each is computed once.

    Each is in the gauge that makes the shortcut from the one before lower triangular: half of it need not be stored.
    """

    def __init__(self, method: SliceGpt, study: Study, after: Sizes) -> None:
        self._method, self._study, self._after = method, study, after
        self._names = interfaces(study.budget.architecture)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            index = self._names.index(name)
            before = self[self._names[index - 1]] if index else None
            self._last = (name, self._rotation(name, before))
        return self._last[1]

    def _gram(self, name: str) -> Tensor:
        gram = torch.stack(list(self._study.summaries[name])).sum(0)
        return _centred(gram) if self._study.budget.sizes.mean_free else gram

    def mean(self) -> Tensor:
        """Gram of all interfaces together, each weighed as where one rotation is shared: what the report draws."""
        total = torch.zeros(())
        for name in self._names:
            gram = self._gram(name)
            total = total + gram * self._method.interface_weight(gram) / len(self._names)
        return total

    def _rotation(self, name: str, before: Tensor | None) -> Tensor:
        gram = self._gram(name)
        directions = self._method.basis_of(gram, self._after.directions(name), self._study.generator)
        return directions.contiguous() if before is None else triangular(directions, before)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _centred(gram: Tensor) -> Tensor:
    """Gram of a signal without its mean: what a LayerNorm sees."""
    gram = gram - gram.mean(0)
    return gram - gram.mean(1, keepdim=True)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrix."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * r.diagonal().sign()
    return signed
