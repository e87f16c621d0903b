"""What a narrower residual stream is expected to lose (ours, for ``joint``).

Every writer w of the stream (the token embedding, each branch) loses what it writes outside the surviving directions,
an error of covariance (1 - P) C_w (1 - P); the Fisher matrix F_w of the stream behind it says what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Architecture, Sizes
from secateur.families.limits import refusals
from secateur.methods.base import Study
from secateur.spaces import BlockView, Space

_WIDTHS = 8  # tried
_LEAST = 0.6  # of the stream


def may_narrow(architecture: Architecture) -> bool:
    """Whether some layout can narrow the stream in one basis: RMSNorm; a tied head gets a table of its own then."""
    plain = architecture.family.norm == "rms" and not architecture.parallel and "out" in architecture.roles
    return plain and not refusals(architecture, "residual", "per-layer")


def ffn_spaces(view: BlockView) -> list[Space]:
    """The FFN of a block, or its routed experts."""
    return [space for space in view.spaces("ffn") if space.expert != "shared"]


def mean_gram(view: BlockView, space: Space, evidence: Mapping[str, Tensor]) -> Tensor:
    """Mean over the block's tokens of the products of what a space's units give, [n, n].

    What an expert gives is about one part of what the experts of a token give together, and weighs as that.
    """
    key = view.reader(space).key
    if space.expert is None:
        return evidence[f"{key}.gram"] / evidence[f"{key}.count"]
    active = view.architecture.sizes.active_experts
    visits = sum(float(evidence[f"{view.reader(each).key}.count"]) for each in ffn_spaces(view))
    return evidence[f"{key}.gram"] / (visits / active) / active**2


def stream_summary(view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Gram of the stream at the norms of a place, each counted alike; what its branches write, and F behind them.

    ``writes.I`` and ``fisher.I`` are [branches, D, D].
    """
    norms = [tensor for name, tensor in evidence.items() if name.endswith("_norm")]
    found = {"stream": torch.stack([gram / gram.trace().clamp(min=1e-30) for gram in norms]).sum(0)}
    if view.place is None:
        return found
    written = []
    for branch in (view.spaces("kv"), ffn_spaces(view)):
        total = torch.zeros_like(found["stream"])
        for space in branch:
            gram = mean_gram(view, space, evidence)
            wide = view.reader(space).values.to(gram)
            total += wide @ gram @ wide.t()
        written.append(total)
    found[f"writes.{view.place}"] = torch.stack(written)
    found[f"fisher.{view.place}"] = torch.stack([evidence["fisher.attention"], evidence["fisher.ffn"]])
    if view.place == 0:
        found["enters"] = evidence["attention_norm"] / evidence["out.count"]
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


def stream_widths(budget: Budget, sizes: Sizes) -> list[int]:
    """Widths to try from some sizes on, the widest first."""
    if refusals(budget.architecture, "residual", budget.layout):
        return []
    widths = [w for w in budget.reachable("residual", sizes) if _LEAST * sizes.residual <= w < sizes.residual]
    step = -(-len(widths) // _WIDTHS) if widths else 1
    return widths[::-1][::step]
