"""Methods that narrow the residual stream in bases of their own: one engine with two hooks.

``basis_of`` says which directions survive where a norm reads the stream, ``schedule`` how many at each. In the
per-layer layout every interface has its own basis and a shortcut leads from each to the next; in the native layout one
basis serves all, and all keep as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.schedule import redundancy, slices
from secateur.cuts.gauge import estimate_savings
from secateur.cuts.stream import SHARED, interfaces
from secateur.errors import refuse
from secateur.families import Layout, Sizes
from secateur.methods.base import Fraction, Method, Study, keep_best
from secateur.methods.charts import spectrum_charts
from secateur.methods.rotations import Rotations, Signal, summarised
from secateur.methods.widths import at_shares, floored, uneven_problems
from secateur.plans import Plan
from secateur.scores.directions import principal, random_orthogonal
from secateur.spaces import BlockView, Kind

_OTHER = "--layout per-layer"


class Slicing(Method):
    """Narrow the stream to the directions that ``basis_of`` chooses."""

    data = "text"

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
    schedule: Literal["constant", "redundancy"] = Field(
        "constant", description="as wide at every layer, or narrower where a layer changes its input less (each only)"
    )
    amount: float = Field(
        2 / 3, ge=0, le=1, description="how much of the mean slice follows the redundancy: 0 none, 1 all"
    )
    base: Fraction | None = Field(
        None, description="the slice that every layer loses anyway (the paper's S_B), instead of amount"
    )
    most: Fraction = Field(0.8, description="the slice that no layer exceeds")
    head: Literal["mean", "whole"] = Field(
        "mean", description="what the head reads where layers differ: the mean width, or all (as the paper)"
    )

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.cuts == "residual" and self.basis_name == "random"

    # -- hooks -----------------------------------------------------------------------------------------------------

    @property
    def basis_name(self) -> str:
        """Which of the bases ``pca``, ``random``, ``subset`` it is, or another."""
        return "pca"

    def basis_of(self, signal: Signal, count: int, generator: torch.Generator) -> Tensor:
        """The ``count`` directions that survive, [width, count], orthonormal columns."""
        gram = signal.gram
        if self.basis_name == "random":
            return random_orthogonal(gram.shape[0], generator)[:, :count]
        if self.basis_name == "subset":
            return torch.eye(gram.shape[0], dtype=torch.float64)[:, keep_best(gram.diagonal(), count)]
        return principal(gram, count)

    def layer_weights(self, study: Study) -> list[float]:
        """How much more of each layer goes than of the others: its redundancy."""
        return redundancy([float(part[0]) for part in study.summaries["influence"]])

    def widths(self, study: Study) -> Sizes:
        """Sizes with as many directions at each norm as the schedule says, nearest to the target.

        The norms of a layer keep as many; with ``sparsity``, the mean slice over the layers is that.
        """
        budget = study.budget
        if self.schedule == "constant":
            return self.sizes(budget)
        base, weights = self.base_sizes(budget), self.layer_weights(study)

        def at(mean: float) -> Sizes:
            start = self.base if self.base is not None else (1 - self.amount) * mean
            shares = slices(weights, mean, start, max(self.most, mean))
            return at_shares(budget, base, shares, 0.0 if self.head == "whole" else mean, self.sparsity is not None)

        if self.sparsity is not None:
            return at(self.sparsity)
        return budget.solve_along(lambda share: at(1 - share), "residual")

    @property
    def evidence(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"stream"} if self.schedule == "constant" else {"stream", "influence"})

    # -- the engine ------------------------------------------------------------------------------------------------

    @property
    def cuts(self) -> Kind:
        return "residual"

    def in_layout(self, layout: Layout) -> Self:
        if self.rotation == "each" and layout == "native":
            asked = f"{self.name} with rotation=each in the native layout"
            refuse("not-native", asked, "stock classes have no place for shortcuts", _OTHER)
        if self.schedule != "constant" and (layout == "native" or self.rotation == "shared"):
            asked, found = f"{self.name} with schedule={self.schedule}", "its layers differ in width"
            if layout == "native":
                refuse("not-native", f"{asked} in the native layout", f"{found}, and stock classes do not", _OTHER)
            refuse("bad-option", f"{asked} and rotation=shared", f"{found}, and one rotation has one", "rotation=each")
        if self.rotation != "auto":
            return self
        return self.model_copy(update={"rotation": "each" if layout == "per-layer" else "shared"})

    def _selects(self, budget: Budget) -> bool:
        return self.basis_name == "subset" and self.rotation != "each" and budget.architecture.family.norm == "rms"

    def _keeps_tie(self, budget: Budget) -> bool:
        """Whether one table goes on serving as embedding and head."""
        if not budget.sizes.tied or budget.sizes.mean_free or self.rotation == "each":
            return False
        return self.tie == "keep" or self.basis_name == "subset"

    def base_sizes(self, budget: Budget) -> Sizes:
        """The dense sizes with what a basis costs however wide it is: a head of its own, shortcuts."""
        base = budget.sizes if self._keeps_tie(budget) else budget.sizes.untied()
        return replace(base, shortcuts=base.shortcuts or self.rotation == "each")

    def sizes(self, budget: Budget) -> Sizes:
        base = self.base_sizes(budget)
        if self.schedule != "constant" and (reasons := uneven_problems(budget, base)):
            asked = f"{self.name} with schedule={self.schedule}"
            refuse("not-exact", asked, "; ".join(reasons), "--set schedule=constant")
        if self.sparsity is None:
            return budget.solve("residual", base)
        return budget.at("residual", floored((1 - self.sparsity) * budget.sizes.residual), base)

    def foresees(self, budget: Budget) -> bool:
        return self.schedule == "constant" or self.cuts != "residual"

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return summarised(view, evidence, each=self.rotation == "each")

    def signal(self, study: Study, name: str) -> Signal:
        """What the summaries say of one interface, or of all together (``stream``); centred for a LayerNorm."""
        found = Signal.of(study.summaries, name)
        selects = name == "stream" and self._selects(study.budget)
        return found.centred() if study.budget.sizes.mean_free and not selects else found

    def _rotations(self, study: Study, after: Sizes) -> Rotations:
        def directions(name: str, signal: Signal) -> Tensor:
            return self.basis_of(signal, after.directions(name), study.generator)

        return Rotations(interfaces(study.budget.architecture), lambda name: self.signal(study, name), directions)

    def decide(self, study: Study) -> Plan:
        budget, after = study.budget, self.widths(study)
        count = after.residual - after.mean_free
        if self.rotation == "each":
            savings = estimate_savings(budget.architecture, after)
            numbers = {f"{key}_shortcut_numbers": savings[key] for key in ("square", "stored", "saved")}
            turned = self._rotations(study, after)
            return Plan(budget.sizes, after, bases=turned, notes=numbers, charts=spectrum_charts(turned.mean(), count))
        signal = self.signal(study, "stream")
        gram = signal.gram
        if self._selects(budget):
            kept = {"residual": keep_best(gram.diagonal(), after.residual)}
            return Plan(budget.sizes, after, kept, charts=spectrum_charts(gram, after.residual))
        directions = self.basis_of(signal, count, study.generator)
        explained = float(torch.einsum("dk,de,ek->", directions, gram, directions) / gram.trace())
        if self.orientation == "random":
            directions = directions @ random_orthogonal(directions.shape[1], study.generator)
        bases = {SHARED: directions.contiguous()}
        notes = {"kept_energy": round(explained, 6)}
        return Plan(budget.sizes, after, bases=bases, notes=notes, charts=spectrum_charts(gram, directions.shape[1]))
