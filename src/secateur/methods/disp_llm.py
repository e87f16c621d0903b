"""DISP-LLM: every branch selects its own part of the residual stream (NeurIPS 2024, arXiv:2410.11988).

Five selections per block: what attention and FFN read and write of the stream, and the neurons in between. The stream
keeps its width, no weight changes, no matrix is added. A hypernetwork generates the logits of all selections and is
trained on the loss of the gated network and a penalty on its size. The export is deterministic and exact: one
threshold over all logits, found by bisection for the size asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget, parse_target
from secateur.errors import refuse
from secateur.families import Kind, Layout, Sizes
from secateur.gates import GatedNetwork, Gates, LearningOptions, fisher, learn
from secateur.gates.vectors import pooled
from secateur.methods.base import Method, Study, keep_best
from secateur.plans import Artifact, Chart, Plan, points_of

LOGITS = "disp-llm-logits"


class DispLlm(Method, LearningOptions):
    """Learn which entries each selection keeps, cut exactly to size."""

    name = "disp_llm"
    title = "DISP-LLM: Dimension-Independent Structural Pruning for Large Language Models"
    paper = "arXiv:2410.11988"
    data = "text"
    output = "dense-per-layer"

    constrained: Literal["none", "same", "structural"] = Field(
        "none",
        description="a selection for every branch; or one of the stream for the whole model, whose output is a stock "
        "checkpoint; or that, other numbers of neurons and key/value groups in every block",
    )
    mode: Literal["learned", "fisher"] = Field(
        "learned",
        description="train the hypernetwork, or (ours, no training) take squared gradients of open gates",
    )
    logits: str | None = Field(None, description=f"{LOGITS}.safetensors of an earlier run: reuse it, at any ratio")

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        return self.mode == "learned" and self.logits is None

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native" and self.constrained != "same":
            found = "stock classes have no place for selections that differ"
            hint = "--layout per-layer, or --set constrained=same"
            refuse("not-native", f"disp_llm with constrained={self.constrained} in the native layout", found, hint)
        return self

    @property
    def cuts(self) -> Kind:
        return "ffn" if self.constrained == "none" else "residual"

    def files(self) -> dict[str, str]:
        return {} if self.logits is None else {LOGITS: self.logits}

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes that keep the same share of every selection."""
        gates = self._gates(budget)
        every = {name: torch.linspace(0, 1, gate.size, dtype=torch.float64) for name, gate in gates.gates.items()}
        return self._solved(budget, gates, every)

    def decide(self, study: Study) -> Plan:
        budget = study.budget
        gates = self._gates(budget)
        notes: dict[str, float] = {}
        logits, charts = self._logits(study, gates, notes)
        after = self._solved(budget, gates, logits)
        counts = _counts_of(after, gates)
        kept = {name: keep_best(values, counts[name]) for name, values in logits.items() if counts[name] < len(values)}
        settings = {"constrained": self.constrained, "mode": self.mode}
        return Plan(
            budget.sizes,
            after,
            kept,
            notes=notes | {"kept_share": round(float(gates.params(counts)) / gates.dense, 6)},
            artifacts={LOGITS: Artifact({name: values.float() for name, values in logits.items()}, settings)},
            charts=charts,
        )

    # -- logits ----------------------------------------------------------------------------------------------------

    def _gates(self, budget: Budget) -> Gates:
        budget.reachable("ffn", budget.sizes)  # refuses what the layout cannot hold
        if self.constrained != "none":
            budget.reachable("residual", budget.sizes)
            if budget.sizes.mean_free:
                found = "its norms subtract the mean, which a selection of the stream changes"
                refuse("not-exact", f"constrained={self.constrained}", found, "--set constrained=none")
        return Gates(budget.architecture, self.constrained)

    def _logits(
        self, study: Study, gates: Gates, notes: dict[str, float]
    ) -> tuple[dict[str, Tensor], tuple[Chart, ...]]:
        if LOGITS in study.artifacts:
            return self._learned_before(study.artifacts[LOGITS], gates), ()
        with study.trials.network() as model:
            network = GatedNetwork(model, gates)
            if self.mode == "fisher":  # relative to what an entry costs
                found = fisher(network, study.ids, lambda i: study.progress(i + 1, len(study.ids), "gradients"))
                costs = gates.unit_costs()
                return {name: (f.clamp(min=1e-300) / costs[name]).log() for name, f in found.items()}, ()
            curve: list[tuple[float, float]] = []

            def told(step: int, loss: float, share: float) -> None:
                curve.append((loss, share))
                study.progress(step + 1, self.steps, "learn")

            counts = _counts_of(self.sizes(study.budget), gates)
            wanted = float(gates.params(counts)) / gates.dense
            options = LearningOptions(**{key: getattr(self, key) for key in LearningOptions.model_fields})
            logits = learn(network, study.ids, wanted, options, study.generator, told)
        losses, shares = torch.tensor(curve, dtype=torch.float64).unbind(1)
        notes.update(wanted_share=round(wanted, 6), learned_share=round(float(shares[-20:].mean()), 6))
        charts = (
            Chart("Learning: loss", "step", "nats per token", {"loss": points_of(losses, 1)}),
            Chart("Learning: size", "step", "share of the gated parameters", {"share": points_of(shares, 1)}),
        )
        return logits, charts

    def _learned_before(self, artifact: Artifact, gates: Gates) -> dict[str, Tensor]:
        sizes = {name: gate.size for name, gate in gates.gates.items()}
        found = {name: len(values) for name, values in artifact.tensors.items()}
        if found != sizes:
            refuse("bad-artifact", f"logits {self.logits!r}", "they are of another model, or of other selections")
        return {name: artifact.tensors[name] for name in sizes}

    # -- sizes -----------------------------------------------------------------------------------------------------

    def _solved(self, budget: Budget, gates: Gates, logits: Mapping[str, Tensor]) -> Sizes:
        """Sizes at the threshold over all logits that comes nearest to the target, at least one step of each."""
        every, groups = pooled(logits), gates.groups()
        kinds: tuple[Kind, ...] = ("residual", "ffn") if budget.layout == "native" else ()
        native = {kind: budget.reachable(kind, budget.sizes) for kind in kinds}  # one size of each for all blocks

        def at(share: float) -> Sizes:
            gone = round((1 - share) * len(every))
            threshold = every[gone - 1] if gone else -torch.inf
            open_ = {name: int((values > threshold).sum()) for name, values in logits.items()}
            counts: dict[str, int] = {}
            for names in groups.values():
                gate = gates.gates[names[0]]
                mean = sum(open_[name] for name in names) / len(names)
                counts |= dict.fromkeys(names, budget.rounded(gate.kind, mean, gate.size))
            if native:
                widths = [counts[name] for name, gate in gates.gates.items() if gate.field == "ffn"]
                chosen = {"residual": counts["residual"], "ffn": sum(widths) / len(widths)}
                sizes = budget.sizes
                for kind, admitted in native.items():
                    sizes = sizes.resized(kind, min(admitted, key=lambda n: (abs(n - chosen[kind]), n)))
                return sizes
            return gates.sizes(counts)

        if self.sparsity is not None:
            budget = replace(budget, targets=(parse_target(f"block_params={100 * (1 - self.sparsity):.9g}%"),))
        return budget.solve_along(at, "selections")


def _counts_of(sizes: Sizes, gates: Gates) -> dict[str, int]:
    """Entries of every selection that some sizes leave."""
    counts = {}
    for name, gate in gates.gates.items():
        value = sizes.residual if gate.place is None else int(getattr(sizes.blocks[gate.place], gate.field))
        counts[name] = value or gate.size
    return counts
