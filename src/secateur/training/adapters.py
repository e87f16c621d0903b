"""What trains: parameters chosen by role, or LoRA adapters beside them (peft), merged back at the end."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from secateur.errors import InternalError, RequestError, near, refuse
from secateur.families import Architecture, Packed, Sizes
from secateur.families.roles import MATRICES, TABLES
from secateur.training.options import Training

_FROZEN: Final = (*TABLES, "head", "sinks", "attention_shortcut", "ffn_shortcut")
_ROUTERS: Final = ("router", "shared_router")
_ADAPTABLE: Final = tuple(role for role in MATRICES if role not in _FROZEN)
_ADAPTED: Final = tuple(role for role in _ADAPTABLE if role not in _ROUTERS)


def roles_in(packed: Packed, architecture: Architecture) -> set[str]:
    """Roles that a packed tensor holds."""
    return {architecture.tensors[name].role for name in packed.canonical}


def _wanted(options: Training, architecture: Architecture, defaults: Sequence[str]) -> Collection[str]:
    """Roles to train; an unknown one is refused with near matches."""
    known = {tensor.role for tensor in architecture.tensors.values()}
    for role in options.roles or ():
        if role not in known:
            family = architecture.family.model_type
            raise RequestError("unknown-role", f"role {role!r} of {family}", "it has no such part", near(role, known))
    return options.roles or [role for role in defaults if role in known]


def unfreeze(model: nn.Module, architecture: Architecture, options: Training) -> None:
    """Let the parameters of the roles asked for train, and no others.

    What the family file does not describe stays frozen: it is carried along as it is in the file.
    """
    roles = _wanted(options, architecture, sorted({tensor.role for tensor in architecture.tensors.values()}))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        packed = architecture.packed.get(name)
        if packed is not None and roles_in(packed, architecture).intersection(roles):
            parameter.requires_grad_(True)


def cut_shares(architecture: Architecture, before: Sizes) -> list[float]:
    """Share of its matrices' parameters that each block lost.

    Args:
        architecture: of the cut model.
        before: sizes before the cut.
    """
    found = []
    for block in range(len(before.blocks)):
        old = new = 0
        for tensor in architecture.tensors_of(block):
            if tensor.role not in _ADAPTED or tensor.is_index:
                continue
            old += math.prod(tensor.shape(before))
            new += math.prod(tensor.shape(architecture.sizes))
        found.append(1 - new / old if old else 1.0)
    return found


def ranks_of(architecture: Architecture, options: Training, before: Sizes | None) -> dict[str, int]:
    """Rank of the adapter of every adapted parameter, by its name in the stock class.

    Args:
        before: sizes before the cut, for ``ranks=auto``.

    Raises:
        RequestError: a role without adapters, a pattern that names nothing, or no sizes for ``auto``.
    """
    roles = _wanted(options, architecture, _ADAPTED)
    for role in roles:
        if role not in _ADAPTABLE:
            found = "LoRA adapts matrices of the blocks"
            refuse("bad-role", f"LoRA of role {role!r}", found, f"{', '.join(_ADAPTABLE)}, or --method full")
    depth = len(architecture.sizes.blocks)
    patterns: Mapping[str, int] = {}
    if options.ranks == "auto":
        patterns = _automatic(architecture, options.rank, before)
    elif options.ranks is not None:
        patterns = options.ranks
        places = {str(block) for block in range(depth)}
        known = {*places, *roles, *(f"{block}.{role}" for block in places for role in roles)}
        for key in patterns:
            if key not in known:
                found = f"there is no such block or adapted role ({depth} blocks; {', '.join(roles)})"
                refuse("bad-ranks", f"pattern {key!r} of ranks", found, "BLOCK, ROLE or BLOCK.ROLE")
    ranks, ports = {}, architecture.ports
    for block in range(depth):
        for packed in architecture.packed_of(block):
            adapted = roles_in(packed, architecture).intersection(roles)
            matrix = all(architecture.tensors[name].kind == "weight" for name in packed.canonical)
            if not (matrix and adapted):
                continue
            if packed.name.rpartition(".")[0] in ports:
                found = f"{packed.name} reads or writes a part of its signal, and an adapter would not"
                refuse("bad-role", "LoRA of this model", found, "--method full")
            asked = max(_look_up(patterns, block, role, options.rank) for role in adapted)
            rank = min(asked, *packed.shape(architecture.shapes)[-2:])
            if rank:
                ranks[packed.name] = rank
    if not ranks:
        refuse("bad-ranks", "ranks of recover", "no adapter is left")
    return ranks


def _look_up(patterns: Mapping[str, int], block: int, role: str, default: int) -> int:
    """The most specific pattern, a block before a role."""
    return next((patterns[key] for key in (f"{block}.{role}", str(block), role) if key in patterns), default)


def _automatic(architecture: Architecture, rank: int, before: Sizes | None) -> dict[str, int]:
    depth = len(architecture.sizes.blocks)
    if before is None or len(before.blocks) != depth:
        found = "it is unknown what was cut in each block" if before is None else "whole blocks were cut"
        refuse("no-cuts", "ranks=auto", found, "name the uncut model (--teacher), or give ranks by block")
    shares = cut_shares(architecture, before)
    total = sum(shares)
    if not total > 0:
        refuse("no-cuts", "ranks=auto", "nothing was cut from the blocks", "give a rank")
    return {str(block): max(1, round(rank * depth * share / total)) for block, share in enumerate(shares)}


def require_peft() -> None:
    """Refuse where peft is missing, before any work."""
    try:
        import peft  # noqa: F401
    except ImportError:
        refuse("no-peft", "method lora", "peft is not installed", "pip install 'secateur[recover]'")


class _Holder(nn.Module):
    """Holds a stock model. To the bare one, peft would apply names that its class had in older versions."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, **inputs: Any) -> Any:
        return self.stock(**inputs)


def adapt(model: nn.Module, architecture: Architecture, ranks: Mapping[str, int], scale: float, seed: int) -> Any:
    """Put LoRA adapters beside the named parameters.

    Linear layers get the usual pair; the stacked matrices of experts get one pair for each expert.

    Args:
        ranks: by the parameter's name in the stock class.
        scale: weight of every adapter, alpha / rank.
        seed: of the first factors (the second ones start at zero).

    Returns:
        The wrapped model; only adapters train.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    modules, parameters, patterns = [], [], {}
    for name, rank in ranks.items():
        module = name.removesuffix(".weight")
        if module != name and isinstance(model.get_submodule(module), nn.Linear | Conv1D):
            modules.append(f"stock.{module}")
            patterns[re.escape(f"stock.{module}")] = rank
        else:
            parameters.append(f"stock.{name}")
            patterns[re.escape(f"stock.{name}")] = rank
    config = LoraConfig(
        r=1,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern=patterns,
        alpha_pattern={key: scale * rank for key, rank in patterns.items()},
        fan_in_fan_out=architecture.family.transposed,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft looks for patterns among modules only, though it applies them to parameters as well
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # transformers' new name for it
        adapted = get_peft_model(_Holder(model), config)
    found = sum("lora_A" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    if found != len(ranks):
        raise InternalError("adapters", f"{len(ranks)} adapters", f"peft made {found}")
    return adapted


def merged(model: Any) -> nn.Module:
    """The stock model with the adapters added to its weights, in at least float32."""
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        model = model.float()
    found: nn.Module = model.merge_and_unload().stock
    return found
