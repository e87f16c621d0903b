"""What a narrower residual stream is expected to lose (ours, for ``joint``).

Every writer w of the stream (the token embedding, each branch) loses what it writes outside the surviving directions,
an error of covariance (1 - P) C_w (1 - P); the Fisher matrix F_w of the stream behind it says what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Architecture
from secateur.families.limits import refusals
from secateur.methods.base import Study
from secateur.spaces import BlockView

_WIDTHS = 8  # tried
_LEAST = 0.6  # of the stream


def may_narrow(architecture: Architecture) -> bool:
    """Whether some layout can narrow the stream in one basis at no other cost: RMSNorm, and a head of its own."""
    rms, parallel = architecture.family.norm == "rms", architecture.parallel
    return rms and not parallel and not architecture.sizes.tied and not refusals(architecture, "residual", "per-layer")


def stream_summary(view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Gram of the stream at the norms of a place, each counted alike; what its branches write, and F behind them.

    ``writes.I`` and ``fisher.I`` are [branches, D, D].
    """
    norms = [tensor for name, tensor in evidence.items() if name.endswith("_norm")]
    found = {"stream": torch.stack([gram / gram.trace().clamp(min=1e-30) for gram in norms]).sum(0)}
    if view.place is None:
        return found
    tokens, written = float(evidence["out.count"]), []
    spaces = (view.spaces("kv"), [space for space in view.spaces("ffn") if space.expert != "shared"])
    active = max(1, view.architecture.sizes.active_experts)
    for branch in spaces:
        total = torch.zeros_like(found["stream"])
        for space in branch:
            reader = view.reader(space)
            gram = evidence[f"{reader.key}.gram"] / tokens / (1 if space.expert is None else active**2)
            wide = reader.values.to(gram)
            total += wide @ gram @ wide.t()
        written.append(total)
    found[f"writes.{view.place}"] = torch.stack(written)
    found[f"fisher.{view.place}"] = torch.stack([evidence["fisher.attention"], evidence["fisher.ffn"]])
    if view.place == 0:
        found["enters"] = evidence["attention_norm"] / tokens
    return found


def stream_curve(study: Study) -> tuple[Tensor, Tensor]:
    """Principal directions of the stream [D, D], the largest first, and what is lost when so many stay, [D + 1]."""
    gram: Tensor = sum(study.summaries["stream"], start=torch.zeros(()))
    _, vectors = torch.linalg.eigh(gram)
    directions = vectors.flip(1)
    products = torch.zeros_like(gram)
    for place in range(len(study.budget.sizes.blocks)):
        fishers, written = (next(iter(study.summaries[f"{kind}.{place}"])) for kind in ("fisher", "writes"))
        pairs = list(zip(fishers, written, strict=True))
        if place == 0:  # the stream itself, as the embedding wrote it
            pairs.append((fishers[0], next(iter(study.summaries["enters"]))))
        for fisher, covariance in pairs:
            products += (directions.t() @ fisher @ directions) * (directions.t() @ covariance @ directions)
    tails = products.flip(0).cumsum(0).flip(0).flip(1).cumsum(1).flip(1).diagonal() / 2
    return directions, torch.cat([tails, tails.new_zeros(1)])


def stream_widths(budget: Budget) -> list[int]:
    """Widths to try, the widest first."""
    sizes = budget.sizes
    widths = [w for w in budget.reachable("residual", sizes) if _LEAST * sizes.residual <= w < sizes.residual]
    step = -(-len(widths) // _WIDTHS) if widths else 1
    return widths[::-1][::step]
