"""Joint (ours): neurons, key/value groups, value dimensions and whole branches against one budget, mended on the way.

What an error of a branch costs is read from the Fisher matrix F of what it gives: half of tr(F E) nats per token for an
error of covariance E. Backward elimination in that metric gives every space its loss-versus-size curve; one price per
parameter allocates the budget over all of them. The sweep that follows cuts block by block, and refits every matrix by
least squares on the signals behind the cuts before it, towards what the dense model computes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets import Budget
from secateur.cuts.stream import SHARED
from secateur.errors import RequestError, refuse
from secateur.families import Layout, Sizes
from secateur.families.limits import refusals
from secateur.families.roles import TABLES, writes_stream
from secateur.mends import aim, refit, silenced
from secateur.mends.gains import aim_gains
from secateur.mends.values import HeadBases, head_bases
from secateur.methods.allocating import Allocation, Curves
from secateur.methods.base import Method, Study
from secateur.methods.branch import Branch
from secateur.methods.narrowing import ffn_spaces, may_narrow, mean_gram, stream_curve, stream_summary, stream_widths
from secateur.plans import Mend, Plan
from secateur.scores.elimination import Elimination, eliminate
from secateur.spaces import BlockView, positions

_READERS = (("q", "k", "v"), ("gate", "up"))


@dataclass(frozen=True)
class _Start:
    """What the other spaces are cut beside: the blocks that stay and the stream, its basis, the embedding in it.

    Attributes:
        sizes: with the stream and the blocks alone cut.
        blocks: which blocks stay.
        lost: what that costs, in nats per token.
    """

    sizes: Sizes
    blocks: Sequence[int]
    lost: float = 0.0
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Mapping[str, Tensor] = field(default_factory=dict)


class Joint(Method):
    """Choose between all spaces at once by what each costs the loss per parameter, and mend behind the cuts."""

    name = "joint"
    title = "Joint allocation over all spaces, mended behind the cuts"
    data = "text"
    evidence = frozenset({"stream", "out.gram", "down.gram", "fisher"})
    order = "sequential"

    passes: int | None = Field(
        None, ge=1, le=4, description="rounds of statistics, allocation and cuts (default: 2 per-layer, 1 native)"
    )
    trials: int = Field(
        30, ge=0, le=30, description="losses without a whole branch, the cheapest first, that calibrate the curves"
    )
    values: bool = Field(True, description="also drop dimensions of value heads (per-layer layout)")
    branches: bool = Field(True, description="also drop whole branches (per-layer layout) or blocks (native)")
    stream: bool = Field(True, description="also narrow the residual stream (RMSNorm, and a head of its own)")
    damping: PositiveFloat = Field(1e-3, description="ridge of the least squares, over the Gram's mean diagonal")

    @property
    def rounds(self) -> int:
        return self.passes or 1

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        return (
            frozenset({"q.gram", "q.cross"}),
            frozenset({"out.gram", "out.target", "fisher"}),
            frozenset({"up.gram", "up.cross"}),
            frozenset({"down.gram", "down.target", "fisher"}),
        )

    @property
    def stem_mends(self) -> frozenset[str]:
        return frozenset({"head.gram", "head.cross"})

    def in_layout(self, layout: Layout) -> Self:
        if self.sparsity is not None:
            hint = "--ratio says how much of all parameters goes"
            refuse(
                "bad-option",
                "joint with sparsity",
                "it cuts several kinds of units, and none has a share of its own",
                hint,
            )
        return self.model_copy(update={"passes": self.passes or (2 if layout == "per-layer" else 1)})

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes of about the same cost; which blocks give how much is known only from the text."""
        return self._solve(budget, "ffn")

    # -- curves ----------------------------------------------------------------------------------------------------

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What every space of a block loses with its size, in nats per token."""
        narrows = self.stream and may_narrow(view.architecture)
        found = stream_summary(view, evidence) if narrows else {}
        if view.place is None:
            return found
        found[f"ffn.{view.place}"] = self._ffn_curve(view, evidence)
        if "out.gram" in evidence:  # low-rank attention has no heads of its own
            (space,) = view.spaces("kv")
            reader, gram = view.reader(space), mean_gram(view, space, evidence)
            metric = evidence["fisher.attention"]
            found[f"kv.{view.place}"] = eliminate(reader.values, gram, metric, reader.span).costs
            tails = [basis.costs for basis in _bases(view, reader.values.to(gram), gram, metric).groups]
            found[f"value.{view.place}"] = torch.stack(tails).mean(0)
        return found

    def _ffn_curve(self, view: BlockView, evidence: Mapping[str, Tensor]) -> Tensor:
        curves = [
            eliminate(view.reader(space).values, mean_gram(view, space, evidence), evidence["fisher.ffn"]).costs
            for space in ffn_spaces(view)
        ]
        return torch.stack(curves).sum(0)

    # -- allocation ------------------------------------------------------------------------------------------------

    def decide(self, study: Study) -> Plan:
        names = [name for name in study.summaries if name.split(".")[0] in ("ffn", "kv", "value")]
        curves = Curves({name: next(iter(study.summaries[name])) for name in names})
        last, previous = study.round == self.rounds - 1, study.previous
        make = partial(Allocation, study.budget, values=self.values and last, branches=self.branches)
        if previous is None:
            curves = curves.measured(self._tried(study, curves))
            start, allocation = self._started(study, curves, partial(make, curves))
        else:
            curves = replace(curves, factors=previous.notes["calibration"])
            sizes = replace(study.budget.sizes.kept_blocks(previous.blocks), residual=previous.after.residual)
            sizes = replace(sizes, tied=previous.after.tied)
            start = _Start(sizes, previous.blocks, bases=previous.bases)
            allocation = make(curves, base=sizes, places=previous.blocks)
        after = allocation.solve((study.round + 1) / self.rounds)
        notes = {
            "predicted_loss": round(start.lost + allocation.predicted(after), 4),
            "calibration": {name: round(factor, 4) for name, factor in curves.factors.items()},
        }
        whole = len(start.blocks) == len(study.budget.sizes.blocks)
        kept = {} if whole else {"blocks": torch.tensor(start.blocks)}
        return Plan(study.budget.sizes, after, kept, bases=start.bases, edits=start.edits, notes=notes)

    def _tried(self, study: Study, curves: Curves) -> dict[str, float]:
        """What the network loses without a whole branch, by the name of its curve."""
        parts = {"ffn": "ffn", "kv": "attention"}
        ends = {name: float(curve[-1]) for name, curve in curves.lost.items() if name.split(".")[0] in parts}
        chosen = sorted(ends, key=ends.__getitem__)[: max(0, self.trials - 1)]
        if not chosen:
            return {}
        dense, found = study.trials.settle(), {}
        for number, name in enumerate(chosen, 1):
            study.progress(number, len(chosen), "trial")
            kind, _, block = name.partition(".")
            found[name] = study.trials.loss(Branch(int(block), (parts[kind],)).silent(study)) - dense
        return found

    def _started(self, study: Study, curves: Curves, make: Callable[..., Allocation]) -> tuple[_Start, Allocation]:
        """Of all widths of the stream and numbers of blocks that with which everything is expected to lose least."""
        budget, sizes = study.budget, study.budget.sizes
        directions, stream = stream_curve(study) if "stream" in study.summaries else (torch.zeros(0), torch.zeros(0))
        best: tuple[_Start, Allocation] | None = None
        least = float("inf")
        for blocks, lost in self._depths(budget, curves):
            base = sizes.kept_blocks(blocks)
            bases = [(base, lost)]
            if len(directions):
                narrow = replace(base, tied=False)
                bases += [(replace(narrow, residual=w), lost + float(stream[w])) for w in stream_widths(budget, narrow)]
            for each, cost in bases:
                if cost >= least:
                    continue
                allocation = make(base=each, places=blocks)
                with suppress(RequestError):  # the target lies elsewhere
                    expected = cost + allocation.predicted(allocation.solve(1))
                    if expected < least:
                        best, least = (_Start(each, blocks, cost), allocation), expected
        if best is None:  # says what is reached
            allocation = make()
            best = _Start(allocation.solve(1), list(range(len(sizes.blocks)))), allocation
        start, allocation = best
        width = start.sizes.residual
        if width == sizes.residual:
            return best
        basis = directions[:, :width].contiguous()
        tables = study.view(None, TABLES).tensors
        projected = {name: table.double() @ basis @ basis.t() for name, table in tables.items()}
        return replace(start, bases={SHARED: basis}, edits=projected), allocation

    def _depths(self, budget: Budget, curves: Curves) -> Iterator[tuple[list[int], float]]:
        """Which blocks stay without 0, 1, 2... of them, and what that costs."""
        blocks, lost = list(range(len(budget.sizes.blocks))), 0.0
        yield blocks, lost
        if not self.branches or budget.layout != "native" or refusals(budget.architecture, "blocks", "native"):
            return
        for gone in sorted(blocks, key=curves.whole)[:-1]:
            blocks, lost = [block for block in blocks if block != gone], lost + curves.whole(gone)
            if not budget.problems(budget.sizes.kept_blocks(blocks)):
                yield blocks, lost

    # -- cut and mend ----------------------------------------------------------------------------------------------

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        if view.place is None:
            return self._head(view, evidence)
        if stage in (0, 2):
            return self._readers(view, evidence, _READERS[stage // 2])
        made = self._attention(view, evidence, plan) if stage == 1 else self._ffn(view, evidence, plan)
        return made if SHARED not in plan.bases else _projected(view, made, plan.bases[SHARED])

    def _readers(self, view: BlockView, evidence: Mapping[str, Tensor], roles: tuple[str, ...]) -> Mend:
        """Matrices that read the stream give on the cut stream what the dense ones gave on theirs."""
        edits = {}
        key = roles[0] if f"{roles[0]}.cross" in evidence else roles[-1]
        for role in roles:
            now, name = view.matrix(role), f"blocks.{view.place}.{role}.weight"
            if f"{key}.cross" in evidence and now is not None and name in view.dense:
                gram = evidence[f"{key}.gram"]
                target = view.dense[name].to(gram) @ evidence[f"{key}.cross"]
                edits[name] = aim(now, gram, target, self.damping)
        return Mend(edits=edits)

    def _attention(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Which key/value groups stay, in how many value dimensions; what reads them aims at the dense stream."""
        if view.place is None or "out.gram" not in evidence:
            return Mend()
        (space,), after = view.spaces("kv"), plan.sizes_of(view.place)
        reader = view.reader(space)
        if not after.kv:
            return Mend(edits={reader.name: torch.zeros_like(reader.values)})
        count, prior = float(evidence["out.count"]), plan.kept.get(space.name)
        gram, target = silenced(evidence["out.gram"], _target(view, evidence, "out"), prior, reader.span)
        metric = evidence["fisher.attention"]
        weight = reader.values.to(gram) if target is None else aim(reader.values, gram, target, self.damping)
        chosen = eliminate(weight, gram / count, metric, reader.span, left=after.kv)
        kept, edits, scores = {}, {}, {}
        columns = torch.arange(len(gram), device=gram.device)
        if after.kv < space.size:
            kept[space.name] = chosen.kept(after.kv)
            scores[space.name] = _ranks(chosen)
            columns = positions(kept[space.name], reader.span).to(columns)
        if after.value:
            head, bases = view.architecture.sizes.head, _bases(view, weight, gram, metric)
            for name in (f"blocks.{view.place}.v.weight", f"blocks.{view.place}.v.bias"):
                if name in view.tensors:
                    edits[name] = bases.narrowed(view.tensors[name].to(gram), after.value)
            turn, weight = bases.reduce, weight @ bases.restore
            gram, target = turn @ gram @ turn.t(), None if target is None else target @ turn.t()
            first = torch.arange(space.size)[:, None] * head + torch.arange(after.value)
            kept[f"blocks.{view.place}.value"] = first.flatten()
            columns = columns[columns % head < after.value]
        edits[reader.name] = refit(weight, gram, columns, self.damping, target)
        return Mend(kept, edits, scores)

    def _ffn(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan) -> Mend:
        """Which neurons stay; what reads them aims at the dense stream."""
        kept, edits, scores = {}, {}, {}
        assert view.place is not None
        after = plan.sizes_of(view.place)
        for space in view.spaces("ffn"):
            reader = view.reader(space)
            left = after.shared if space.expert == "shared" else after.ffn
            if not left:
                edits[reader.name] = torch.zeros_like(reader.values)
                continue
            count, prior = float(evidence[f"{reader.key}.count"]), plan.kept.get(space.name)
            gram, target = silenced(evidence[f"{reader.key}.gram"], _target(view, evidence, reader.key), prior, 1)
            weight = reader.values.to(gram) if target is None else aim(reader.values, gram, target, self.damping)
            chosen = eliminate(weight, gram / max(count, 1.0), evidence["fisher.ffn"], left=left)
            kept[space.name] = chosen.kept(left)
            scores[space.name] = _ranks(chosen)
            edits[reader.name] = refit(weight, gram, kept[space.name], self.damping, target)
        return Mend(kept, edits, scores)

    def _head(self, view: BlockView, evidence: Mapping[str, Tensor]) -> Mend:
        """The head gives on the cut stream what it gave on the dense one; a tied one by the gains of its norm."""
        if "head.cross" not in evidence:
            return Mend()
        gram, cross = evidence["head.gram"], evidence["head.cross"]
        head = view.matrix("head")
        if head is not None and not view.architecture.sizes.tied:
            target = view.dense["stem.head.weight"].to(gram) @ cross
            return Mend(edits={"stem.head.weight": aim(head, gram, target, self.damping)})
        norm, bias = view.matrix("final_norm"), view.tensors.get("stem.final_norm.bias")
        if norm is None or bias is not None:
            return Mend()
        offset = view.architecture.family.norm_offset
        tables = (view.tensors["stem.embedding.weight"], view.dense["stem.embedding.weight"])
        found = aim_gains(norm.to(gram) + offset, tables, gram, cross, self.damping)
        return Mend(edits={"stem.final_norm.weight": found - offset})


def _projected(view: BlockView, made: Mend, basis: Tensor) -> Mend:
    """What writes the stream stays within the directions that survive."""
    edits = dict(made.edits)
    for name, tensor in view.tensors.items():
        if writes_stream(view.architecture.tensors[name].role):
            wide = edits.get(name, tensor).to(basis)
            edits[name] = basis @ (basis.t() @ wide)
    return Mend(made.kept, edits, made.scores)


def _target(view: BlockView, evidence: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Y X^T of a matrix that writes the stream, its bias taken out of Y; None where none was gathered."""
    target = evidence.get(f"{key}.target")
    bias = view.tensors.get(f"blocks.{view.place}.{key}.bias")
    if target is None or bias is None:
        return target
    return target - torch.outer(bias.to(target), evidence[f"{key}.sum"])


def _ranks(chosen: Elimination) -> Tensor:
    """Place of every unit in the order in which they go, [units]: what stays longest is highest."""
    ranks = torch.empty(len(chosen.order), dtype=torch.float64)
    ranks[chosen.order] = torch.arange(1, len(chosen.order) + 1, dtype=torch.float64)
    return ranks


def _bases(view: BlockView, weight: Tensor, gram: Tensor, metric: Tensor) -> HeadBases:
    block = view.architecture.sizes.blocks[view.place or 0]
    return head_bases(weight, gram, block.kv, block.group, metric)
