"""The oracle "masked": hooks on the uncut stock model silence at its writers what a plan removes.

Written without ``secateur.cuts``, family files or the role table: only module names of the stock classes and the
indices of the plan go in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.plans import Plan
from zoo import Where


def swap_precise_parts(model: Any) -> Any:
    """Let a float64 model compute in float64 what its stock class computes in float32: norms, softmax, routers."""
    forward = model.forward

    def precise(*args: Any, **kwargs: Any) -> Any:
        with _Precise():
            return forward(*args, **kwargs)

    model.forward = precise
    return model


class _Precise(TorchFunctionMode):
    """Float64 tensors stay float64; tables of positions, which are the same in both models, stay float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, signal = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(signal, Tensor) and signal.dtype == torch.float64:
            narrow = torch.float32 in (*args[1:], *kwargs.values())
            if name == "float" or (narrow and name in ("to", "type")):
                return signal
            if narrow and name == "softmax":
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def mask(model: Any, where: Where, plan: Plan) -> Any:
    """Silence in place, by hooks, everything that ``plan`` removes from a dense model."""
    blocks = model.get_submodule(where.blocks)
    for index, sizes in enumerate(plan.after.blocks):
        for flag, module in (("out_bias", where.attention_out), ("down_bias", where.ffn_reader)):
            if getattr(sizes, flag):
                place = plan.blocks[index]
                bias = plan.edits[f"blocks.{place}.{flag.replace('_', '.')}"]
                _add(blocks[place].get_submodule(module), bias)
    for name, kept in plan.kept.items():
        parts = name.split(".")
        if name == "blocks":
            for index, block in enumerate(blocks):
                if index not in kept.tolist():
                    block.register_forward_hook(_pass_by, with_kwargs=True)
            continue
        if name == "residual":
            project_stream(model, where, torch.eye(plan.before.residual, dtype=torch.float64)[:, kept])
            continue
        block, sizes = blocks[int(parts[1])], plan.before.blocks[int(parts[1])]
        if parts[-1] in PARTIAL:
            PARTIAL[parts[-1]](block, where, kept, plan)
        elif parts[-1] == "experts":
            _close_ways(model, block.get_submodule(where.router), _others(kept, sizes.experts))
        elif name.endswith("experts.shared.ffn"):
            _zero_inputs(block.get_submodule(where.shared_reader), _others(kept, sizes.shared))
        elif parts[2] == "experts":
            _zero_expert(block.get_submodule(where.experts), int(parts[3]), _others(kept, sizes.ffn))
        elif parts[-1] == "ffn":
            _zero_inputs(block.get_submodule(where.ffn_reader), _others(kept, sizes.ffn))
        elif parts[-1] in ("kv", "heads"):
            # query heads stand group by group; a unit of ``kv`` is a group, one of ``heads`` a head of the only group
            units, width = (sizes.kv, sizes.group) if parts[-1] == "kv" else (sizes.group, 1)
            span = width * plan.before.head
            gone = [unit * span + i for unit in _others(kept, units) for i in range(span)]
            _zero_inputs(block.get_submodule(where.attention_out), gone)
        else:
            raise AssertionError(f"the oracle does not know the space {name}")
    for index, sizes in enumerate(plan.after.blocks if "blocks" not in plan.kept else ()):
        if not sizes.kv:
            _silence(blocks[index].get_submodule(where.attention_out))
        if not (sizes.ffn or sizes.experts or sizes.shared):
            _silence(blocks[index].get_submodule(where.ffn_silent or where.ffn_out))
    if "stem.final_norm" in plan.bases:
        rotate_stream(model, where, plan)
    elif plan.bases:
        if plan.after.tied:
            share_table(model, where, plan.bases["residual"])
        project_stream(model, where, plan.bases["residual"])
    return model


@torch.no_grad()
def put(model: Any, state: dict[str, Tensor]) -> None:
    """Give a model some other parameters."""
    for name, value in state.items():
        model.get_parameter(name).copy_(value)


def _narrow_heads(block: Any, where: Where, kept: Tensor, plan: Plan, part: str) -> None:
    """Zero the other dimensions of every query and key, or value, where they come out of their matrices."""
    head, group = plan.before.head, plan.before.blocks[0].group
    groups = plan.before.blocks[0].kv
    keys = _others(kept, groups * head)
    queries = [(p // head * group + g) * head + p % head for p in keys for g in range(group)]
    fused = where.fused_attention
    if fused:
        offsets = {"q": 0, "k": groups * group * head, "v": (groups * group + groups) * head}
        gone = [offsets["q"] + p for p in queries] + [offsets["k"] + p for p in keys]
        _zero_outputs(block.get_submodule(fused), gone if part == "qk" else [offsets["v"] + p for p in keys])
    elif part == "qk":
        _zero_outputs(block.get_submodule(where.attention + ".q_proj"), queries)
        _zero_outputs(block.get_submodule(where.attention + ".k_proj"), keys)
    else:
        _zero_outputs(block.get_submodule(where.attention + ".v_proj"), keys)


def _narrow_stream(block: Any, where: Where, kept: Tensor, plan: Plan, part: str) -> None:
    """Zero the other dimensions of the stream on their way into a branch, or out of it."""
    gone = _others(kept, plan.before.residual)
    if part == "ffn_write":
        _zero_outputs(block.get_submodule(where.ffn_reader), gone)
    elif part == "attention_write":
        _zero_outputs(block.get_submodule(where.attention_out), gone)
    else:
        for reader in where.attention_readers if part == "attention_read" else where.ffn_readers:
            _zero_inputs(block.get_submodule(reader), gone)


PARTIAL = {
    **{part: partial(_narrow_heads, part=part) for part in ("qk", "value")},
    **{
        part: partial(_narrow_stream, part=part)
        for part in ("attention_read", "attention_write", "ffn_read", "ffn_write")
    },
}


def _zero_outputs(module: nn.Module, gone: list[int]) -> None:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        signal = output.clone()
        signal[..., gone] = 0
        return signal

    module.register_forward_hook(hook)


def _silence(module: nn.Module) -> None:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

    module.register_forward_hook(hook)


def _add(module: nn.Module, bias: Tensor) -> None:
    module.register_forward_hook(lambda _, __, output: output + bias)


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


def rotate_stream(model: Any, where: Where, plan: Plan) -> None:
    """Project the stream, at every norm, onto the directions that survive there."""
    blocks = model.get_submodule(where.blocks)
    norms = ("attention_norm",) if where.parallel else ("attention_norm", "ffn_norm")
    bases = [plan.bases[f"blocks.{i}.{norm}"] for i in range(len(blocks)) for norm in norms]
    projectors = [b @ b.t() for b in (*bases, plan.bases["stem.final_norm"])]
    weight = getattr(model.config, "residual_multiplier", 1.0)
    stream: dict[str, Tensor] = {}

    def project_table(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output @ projectors[0]

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream["x"] = inputs[0]

    def branch(projector: Tensor | None) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            signal = output[0] if isinstance(output, tuple) else output
            before = stream["x"].reshape(signal.shape)  # OPT flattens the positions inside a block
            stream["x"] = before + weight * signal
            if projector is None:  # parallel: the stream is taken up behind the other branch
                return output
            stream["x"] = stream["x"] @ projector
            changed = (stream["x"] - before) / weight
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    for table in where.tables:
        model.get_submodule(table).register_forward_hook(project_table)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enter)
        first = None if where.parallel else projectors[2 * index + 1]
        second = projectors[index + 1] if where.parallel else projectors[2 * index + 2]
        block.get_submodule(where.attention_out).register_forward_hook(branch(first))
        block.get_submodule(where.ffn_out).register_forward_hook(branch(second))


@torch.no_grad()
def share_table(model: Any, where: Where, basis: Tensor) -> None:
    """Give a dense model with a tied head what one table T and gains h can say of both, by plain least squares.

    With the embedding A = E Q and the head B = E diag(g) Q, h fits A diag(h) = B column by column, and T fits T = A
    and T diag(h) = B, each equation divided by the norm of its right side.
    """
    table, norm = model.get_submodule(where.tables[0]), model.get_submodule(where.final_norm)
    offset = float("Gemma" in type(norm).__name__)  # its norms multiply with 1 + weight
    first, second = table.weight @ basis, (table.weight * (norm.weight + offset)) @ basis
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
    norm.weight.fill_(1 - offset)


def _others(kept: Tensor, size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept.tolist()))


def _pass_by(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A block that leaves the stream as it is."""
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def _zero_inputs(module: nn.Module, gone: list[int]) -> None:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        signal = inputs[0].clone()
        signal[..., gone] = 0
        return (signal, *inputs[1:])

    module.register_forward_pre_hook(hook)


def _close_ways(model: Any, router: nn.Module, gone: list[int]) -> None:
    """Let the logits of some experts be minus infinity, so that no token is sent to them."""
    forward = model.forward

    def closed(*args: Any, **kwargs: Any) -> Any:
        with _ClosedWays(router, gone):
            return forward(*args, **kwargs)

    model.forward = closed


class _ClosedWays(TorchFunctionMode):
    """A router computes its logits inside, where no hook reaches: its product is told by its weight."""

    def __init__(self, router: Any, gone: list[int]) -> None:
        super().__init__()
        self.weight, self.gone = router.weight, gone

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear" and args[1] is self.weight:
            found[..., self.gone] = -torch.inf
        return found


def _zero_expert(experts: Any, expert: int, gone: list[int]) -> None:
    """The fused module has no place for a hook between its products: silence what reads the neurons."""
    with torch.no_grad():
        if hasattr(experts, "down_proj_bias"):  # stored [in, out]
            experts.down_proj[expert, gone] = 0
        else:
            experts.down_proj[expert, :, gone] = 0


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of a whole forward pass."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((expected - found).abs().max() / expected.abs().max())
