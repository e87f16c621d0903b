"""The oracle "masked": hooks on the uncut stock model silence at its writers what a plan removes.

Written without ``secateur.cuts``, family files or the role table: only module names of the stock classes and the
indices of the plan go in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import Where
from secateur.plans import Plan


def swap_precise_parts(model: Any) -> Any:
    """Replace what stock classes compute in float32 even in a float64 model: RMS norms and the experts' router."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = _Rms(module)
        elif kind.endswith("TopKRouter"):
            module.forward = _Router(module)
    return model


class _Rms:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.eps = module, module.variance_epsilon

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)


class _Router:
    def __init__(self, module: nn.Module) -> None:
        self.weight, self.top = module.weight, module.top_k

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.t()
        values, indices = logits.softmax(-1).topk(self.top, dim=-1)
        return logits, values / values.sum(-1, keepdim=True), indices


def mask(model: Any, where: Where, plan: Plan) -> Any:
    """Silence in place, by hooks, everything that ``plan`` removes from a dense model."""
    blocks = model.get_submodule(where.blocks)
    for name, kept in plan.kept.items():
        parts = name.split(".")
        if name == "blocks":
            for index, block in enumerate(blocks):
                if index not in kept.tolist():
                    block.forward = _identity
        elif name == "residual":
            basis = torch.eye(plan.before.residual, dtype=torch.float64)[:, kept]
            project_stream(model, where, basis)
        elif parts[-1] == "ffn":
            gone = _others(kept, plan.before.blocks[0].ffn)
            if where.experts is None:
                _zero_inputs(blocks[int(parts[1])].get_submodule(where.ffn_reader), gone)
            else:
                _zero_expert(blocks[int(parts[1])].get_submodule(where.experts), int(parts[3]), gone)
        elif parts[-1] == "kv":
            width = plan.before.head * plan.before.blocks[0].group
            gone = _others(kept, plan.before.blocks[0].kv)
            positions = [group * width + i for group in gone for i in range(width)]
            _zero_inputs(blocks[int(parts[1])].get_submodule(where.attention_out), positions)
        else:
            raise AssertionError(f"the oracle does not know the space {name}")
    if plan.bases:
        if plan.after.tied:
            share_table(model, where, plan.bases["residual"])
        project_stream(model, where, plan.bases["residual"])
    return model


def project_stream(model: Any, where: Where, basis: Tensor) -> None:
    """Project the residual stream onto the columns of ``basis`` after every writer."""
    projector = basis @ basis.t()

    def project(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] @ projector.to(output[0]), *output[1:])
        return output @ projector.to(output)

    for table in where.tables:
        model.get_submodule(table).register_forward_hook(project)
    for block in model.get_submodule(where.blocks):
        block.get_submodule(where.attention_out).register_forward_hook(project)
        block.get_submodule(where.ffn_out).register_forward_hook(project)


@torch.no_grad()
def share_table(model: Any, where: Where, basis: Tensor) -> None:
    """Give a dense model with a tied head what one table T and gains h can say of both, by plain least squares.

    With the embedding A = E Q and the head B = E diag(g) Q, h fits A diag(h) = B column by column, and T fits T = A
    and T diag(h) = B, each equation divided by the norm of its right side.
    """
    table, norm = model.get_submodule(where.tables[0]), model.model.norm
    first, second = table.weight @ basis, (table.weight * norm.weight) @ basis
    columns = range(basis.shape[1])
    gains = torch.stack([torch.linalg.lstsq(first[:, [j]], second[:, j]).solution[0] for j in columns])
    weights = torch.stack([1 / first.norm(), 1 / second.norm()])
    shared = torch.empty_like(first)
    for j in columns:
        left = weights[:, None] * torch.stack([torch.ones(()).to(gains), gains[j]])[:, None]
        right = weights[:, None] * torch.stack([first[:, j], second[:, j]])
        shared[:, j] = torch.linalg.lstsq(left, right).solution[0]
    model.lm_head.weight = nn.Parameter((shared * gains) @ basis.t())
    table.weight = nn.Parameter(shared @ basis.t())
    norm.weight.fill_(1)


def _others(kept: Tensor, size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept.tolist()))


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _zero_inputs(module: nn.Module, gone: list[int]) -> None:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        signal = inputs[0].clone()
        signal[..., gone] = 0
        return (signal, *inputs[1:])

    module.register_forward_pre_hook(hook)


def _zero_expert(experts: Any, expert: int, gone: list[int]) -> None:
    """The fused module has no place for a hook between its products: silence the rows that write the neurons."""
    width = experts.down_proj.shape[-1]
    with torch.no_grad():
        experts.gate_up_proj[expert, gone] = 0
        experts.gate_up_proj[expert, [width + i for i in gone]] = 0


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of a whole forward pass."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((expected - found).abs().max() / expected.abs().max())
