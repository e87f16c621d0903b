"""MoDeGPT: each pair of matrices in a block is decomposed together (ICLR 2025, arXiv:2408.09632)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets import Budget
from secateur.budgets.layer_maps import softmax_map
from secateur.budgets.shares import narrowed, solve_shares, why_not
from secateur.errors import refuse
from secateur.families import Layout, Sizes, canonical_name
from secateur.families.rotary import rotary_partners
from secateur.mends import absorb, narrowed_values, refit
from secateur.methods.base import Fraction, Method, Study, keep_best
from secateur.plans import Mend, Plan
from secateur.scores.columns import column_scores
from secateur.scores.heads import best_pairs, output_moments, pair_scores
from secateur.spaces import BlockView, all_spaces

Modules = Literal["auto", "ffn", "ffn+vo", "ffn+qk", "ffn+qk+vo", "vo", "qk", "qk+vo"]
_PARTS: Final = {"ffn": "ffn", "qk": "qk", "vo": "value"}
_INFLUENCE = 0  # of what ``influence`` holds


class MoDeGpt(Method):
    """Nystrom for the FFN, CR for queries and keys, SVD for values and what reads them; entropic allocation."""

    name = "modegpt"
    title = "MoDeGPT: Modular Decomposition for Large Language Model Compression"
    paper = "arXiv:2408.09632"
    data = "text"
    evidence = frozenset({"influence"})

    modules: Modules = Field(
        "auto",
        description="what is decomposed (auto: all that layout and model can hold; in the native layout the FFN, "
        "with one width for all blocks)",
    )
    temperature: PositiveFloat = Field(
        0.15, description="eps of the allocation: low cuts blocks of little influence more, high cuts all alike"
    )
    cap: Fraction = Field(0.8, description="largest share that a block may lose")
    leverage: PositiveFloat = Field(
        1e-2, description="ridge of the leverage scores over the mean of the Gram's diagonal"
    )
    damping: PositiveFloat = Field(1e-2, description="ridge of the least squares over the mean of the Gram's diagonal")
    sequential: bool = Field(
        False, description="(ours) statistics behind the cuts so far, instead of the dense model's"
    )

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native" and self.modules not in ("auto", "ffn"):
            asked, found = f"modegpt with modules={self.modules} in the native layout", "stock heads have one size"
            refuse("not-native", asked, found, "--layout per-layer, or --set modules=ffn")
        return self.model_copy(update={"modules": "ffn"}) if layout == "native" else self

    @property
    def order(self) -> Literal["dense", "sequential"]:  # type: ignore[override]
        return "sequential" if self.sequential else "dense"

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        heads, ffn = frozenset({"q.gram"}), frozenset({"down.gram"})
        return (ffn,) if self.modules == "ffn" else (heads, ffn)

    # -- how much --------------------------------------------------------------------------------------------------

    def parts(self, budget: Budget) -> tuple[list[str], dict[str, str]]:
        """Sizes that are narrowed, and why others are not.

        Raises:
            RequestError: a module was asked for by name and cannot be narrowed.
        """
        asked = list(_PARTS) if self.modules == "auto" else self.modules.split("+")
        found, skipped = [], {}
        for module in asked:
            reasons = why_not(budget, _PARTS[module]) if module != "ffn" else []
            if not reasons:
                found.append(_PARTS[module])
            elif self.modules == "auto":
                skipped[module] = "; ".join(reasons)
            else:
                refuse("not-exact", f"modegpt with module {module}", "; ".join(reasons), "leave it out of modules")
        return found, skipped

    def sizes(self, budget: Budget) -> Sizes:
        return self._sizes(budget, torch.ones(len(budget.sizes.blocks)))

    def foresees(self, budget: Budget) -> bool:
        return budget.layout == "native"

    def _sizes(self, budget: Budget, influence: Tensor) -> Sizes:
        if budget.layout == "native":
            return self._solve(budget, "ffn")
        parts, _ = self.parts(budget)

        def shares(removed: float) -> list[float]:
            found: list[float] = (1 - softmax_map(influence, self.temperature, removed, self.cap)).tolist()
            return found

        if self.sparsity is not None:
            return narrowed(budget, shares(self.sparsity), parts, exact=True)
        return solve_shares(budget, lambda point: shares(self.cap * (1 - point)), parts)

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if view.place is None else {"influence": evidence["influence"][_INFLUENCE]}

    def decide(self, study: Study) -> Plan:
        influence = torch.stack(list(study.summaries["influence"]))
        notes: dict[str, Any] = {"block influence": [round(float(value), 4) for value in influence]}
        if skipped := self.parts(study.budget)[1]:
            notes["not decomposed"] = skipped
        return Plan(study.budget.sizes, self._sizes(study.budget, influence), notes=notes)

    # -- which, and what of them -----------------------------------------------------------------------------------

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        if "down.gram" in self.mends[stage]:
            return self._nystrom(view, evidence, plan)
        queries, values = self._cr(view, evidence, plan), self._svd(view, evidence, plan)
        return Mend({**queries.kept, **values.kept}, values.edits)

    def _nystrom(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Type I: neurons of the highest leverage, the reader refitted."""
        kept: dict[str, Tensor] = {}
        edits: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        after = {space.name: space.size for space in all_spaces(plan.after, "ffn")}
        for space in (space for space in view.spaces("ffn") if after[space.name] < space.size):
            reader = view.reader(space)
            gram = evidence[f"{reader.key}.gram"]
            scores[space.name] = column_scores(reader.values, gram, "leverage", self.leverage)
            kept[space.name] = keep_best(scores[space.name], after[space.name])
            edits[reader.name] = refit(reader.values, gram, kept[space.name], self.damping)
        return Mend(kept, edits, scores)

    def _moments(self, view: BlockView, evidence: Mapping[str, Tensor], role: str, bias: bool = True) -> Tensor:
        """E[y y^T] of the outputs of queries, keys or values."""
        weight = view.tensors[canonical_name(view.place, role, "weight")]
        shift = view.tensors.get(canonical_name(view.place, role, "bias")) if bias else None
        return output_moments(weight, shift, evidence["q.gram"], evidence["q.sum"], evidence["q.count"])

    def _cr(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Type II: dimensions of queries and keys, rotated pairs together, the same for all queries of a key."""
        assert view.place is not None
        count, head, block = plan.after.narrowed("qk", view.place), plan.before.head, plan.before.blocks[view.place]
        if not count:
            return Mend()
        queries = self._moments(view, evidence, "q").diagonal().reshape(block.kv, block.group, head)
        keys = self._moments(view, evidence, "k").diagonal().reshape(block.kv, head)
        partners = rotary_partners(view.architecture, view.place)
        scores = pair_scores(queries, keys, partners)
        rows = [best_pairs(of, partners, count) + head * group for group, of in enumerate(scores)]
        return Mend({f"blocks.{view.place}.qk": torch.cat(rows)})

    def _svd(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Type III: values and the readers of all their query heads at a lower rank, in the first dimensions."""
        assert view.place is not None
        count, head, block = plan.after.narrowed("value", view.place), plan.before.head, plan.before.blocks[view.place]
        if not count:
            return Mend()
        names = {f"{r}.{k}": canonical_name(view.place, r, k) for r in ("v", "out") for k in ("weight", "bias")}
        names = {key: name for key, name in names.items() if name in view.tensors}
        given = {key: view.tensors[name].to(evidence["q.gram"]) for key, name in names.items()}
        # attention weights sum to one, sinks apart: a bias of the values is one of the output
        folds = {"v.bias", "out.bias"} <= set(given) and "sinks" not in view.architecture.roles
        if folds:
            constant = given["v.bias"].reshape(block.kv, 1, head).expand(-1, block.group, -1).flatten()
            given["out.bias"] = absorb(given["out.bias"], given["out.weight"], constant)
            given["v.bias"] = torch.zeros_like(given["v.bias"])
        edits = {**given, **narrowed_values(given, self._moments(view, evidence, "v", bias=not folds), head, count)}
        rows = (torch.arange(block.kv)[:, None] * head + torch.arange(count)).flatten()
        return Mend({f"blocks.{view.place}.value": rows}, {names[key]: tensor for key, tensor in edits.items()})
