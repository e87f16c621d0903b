"""Cut one place behind the cuts before it, and refit what stays towards the dense model (ours, for ``joint``).

All refits are ridge least squares towards the present weights; ``damping`` is the ridge over the Gram's mean diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.families.roles import writes_stream
from secateur.mends import aim, refit, silenced
from secateur.mends.gains import aim_gains
from secateur.mends.values import HeadBases, head_bases
from secateur.plans import Mend, Plan
from secateur.scores.elimination import Elimination, eliminate
from secateur.spaces import BlockView, positions


def stream_readers(view: BlockView, evidence: Mapping[str, Tensor], roles: tuple[str, ...], damping: float) -> Mend:
    """Matrices that read the stream give on the cut stream what the dense ones gave on theirs."""
    edits = {}
    key = roles[0] if f"{roles[0]}.cross" in evidence else roles[-1]
    for role in roles:
        now, name = view.matrix(role), f"blocks.{view.place}.{role}.weight"
        if f"{key}.cross" in evidence and now is not None and name in view.dense:
            gram = evidence[f"{key}.gram"]
            target = view.dense[name].to(gram) @ evidence[f"{key}.cross"]
            edits[name] = aim(now, gram, target, damping)
    return Mend(edits=edits)


def attention(view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, damping: float) -> Mend:
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
    weight = reader.values.to(gram) if target is None else aim(reader.values, gram, target, damping)
    chosen = eliminate(weight, gram / count, metric, reader.span, left=after.kv)
    kept, edits, scores = {}, {}, {}
    columns = torch.arange(len(gram), device=gram.device)
    if after.kv < space.size:
        kept[space.name] = chosen.kept(after.kv)
        scores[space.name] = _ranks(chosen)
        columns = positions(kept[space.name], reader.span).to(columns)
    if after.value:
        head, bases = view.architecture.sizes.head, bases_of(view, weight, gram, metric)
        for name in (f"blocks.{view.place}.v.weight", f"blocks.{view.place}.v.bias"):
            if name in view.tensors:
                edits[name] = bases.narrowed(view.tensors[name].to(gram), after.value)
        turn, weight = bases.reduce, weight @ bases.restore
        gram, target = turn @ gram @ turn.t(), None if target is None else target @ turn.t()
        first = torch.arange(space.size)[:, None] * head + torch.arange(after.value)
        kept[f"blocks.{view.place}.value"] = first.flatten()
        columns = columns[columns % head < after.value]
    edits[reader.name] = refit(weight, gram, columns, damping, target)
    return Mend(kept, edits, scores)


def ffn(view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, damping: float) -> Mend:
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
        weight = reader.values.to(gram) if target is None else aim(reader.values, gram, target, damping)
        chosen = eliminate(weight, gram / max(count, 1.0), evidence["fisher.ffn"], left=left)
        kept[space.name] = chosen.kept(left)
        scores[space.name] = _ranks(chosen)
        edits[reader.name] = refit(weight, gram, kept[space.name], damping, target)
    return Mend(kept, edits, scores)


def head(view: BlockView, evidence: Mapping[str, Tensor], damping: float) -> Mend:
    """The head gives on the cut stream what it gave on the dense one; a tied one by the gains of its norm."""
    if "head.cross" not in evidence:
        return Mend()
    gram, cross = evidence["head.gram"], evidence["head.cross"]
    head = view.matrix("head")
    if head is not None and not view.architecture.sizes.tied:
        target = view.dense["stem.head.weight"].to(gram) @ cross
        return Mend(edits={"stem.head.weight": aim(head, gram, target, damping)})
    norm, bias = view.matrix("final_norm"), view.tensors.get("stem.final_norm.bias")
    if norm is None or bias is not None:
        return Mend()
    offset = view.architecture.family.norm_offset
    tables = (view.tensors["stem.embedding.weight"], view.dense["stem.embedding.weight"])
    found = aim_gains(norm.to(gram) + offset, tables, gram, cross, damping)
    return Mend(edits={"stem.final_norm.weight": found - offset})


def projected(view: BlockView, made: Mend, basis: Tensor) -> Mend:
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


def bases_of(view: BlockView, weight: Tensor, gram: Tensor, metric: Tensor) -> HeadBases:
    block = view.architecture.sizes.blocks[view.place or 0]
    return head_bases(weight, gram, block.kv, block.group, metric)
