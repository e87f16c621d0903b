"""Blocks without their attention or their FFN: which modules go, what stands in for them, where the cache lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.families.roles import branch_of

if TYPE_CHECKING:
    from secateur.families.architecture import Architecture
    from secateur.families.tensors import CanonicalTensor

StandIn = str | int
"""``same``: hands on what it gets; ``attention``, ``router``: returns as many things as the stock class takes;
a number: zeros of that width."""
BRANCHES = ("attention", "ffn")


def gone_modules(architecture: Architecture) -> dict[str, StandIn]:
    """The modules of the stock class that are not there, by name, and what stands in for each."""
    found: dict[str, StandIn] = {}
    for name, packed in architecture.packed.items():
        tensors = [architecture.catalogue[part] for part in packed.canonical]
        if name not in architecture.stock_shapes or any(t.exists(architecture.sizes) for t in tensors):
            continue
        path = name.rpartition(".")[0]
        for tensor in tensors:
            if branch_of(tensor.role) == "attention" and not tensor.role.endswith("post_norm"):
                if container := attention_module(architecture, tensor.block):
                    found[container] = "attention"
            elif found.get(path) != architecture.sizes.residual:  # a module of experts reads and writes
                found[path] = _stand_in(architecture, tensor)
    return found


def _stand_in(architecture: Architecture, tensor: CanonicalTensor) -> StandIn:
    if tensor.role.endswith("norm"):
        return "same"
    if tensor.role == "router":
        return "router"
    if tensor.role == "down":
        return architecture.sizes.residual
    return int(tensor.role == "shared_router")


def attention_module(architecture: Architecture, block: int | None) -> str:
    """The module around the attention of a block; empty where it has none of its own."""
    prefix = f"{architecture.family.blocks}.{block}."
    held: dict[str, set[str | None]] = {}
    for name, packed in architecture.packed.items():
        if name.startswith(prefix):
            role = architecture.catalogue[packed.canonical[0]].role
            module = prefix + name.removeprefix(prefix).partition(".")[0]
            held.setdefault(module, set()).add("norm" if role.endswith("post_norm") else branch_of(role))
    found = [module for module, branches in held.items() if branches == {"attention"}]
    return found[0] if len(found) == 1 else ""


def cache_slots(architecture: Architecture) -> dict[str, int]:
    """Where each attention lies in the cache, by module, where some blocks have none.

    The first slot of every kind of cache layer (sliding, full) tells its length, so the attentions that are left move
    up to the first slots of their kind.
    """
    blocks = architecture.sizes.blocks
    left = [block for block, sizes in enumerate(blocks) if sizes.has("attention")]
    if len(left) == len(blocks):
        return {}
    kinds = _kinds(architecture)
    free = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    return {attention_module(architecture, block): free[kinds[block]].pop(0) for block in left}


def _kinds(architecture: Architecture) -> list[str]:
    """Kind of the cache layer of every block."""
    depth = len(architecture.sizes.blocks)
    return list(getattr(architecture.config, "layer_types", None) or ["full_attention"] * depth)


def without_problems(architecture: Architecture, gone: list[tuple[int, str]]) -> list[str]:
    """Why some blocks cannot do without a branch (empty: they can).

    Args:
        architecture: the present one.
        gone: blocks of it, and the branch that each shall lose.
    """
    found = []
    blocks = architecture.sizes.blocks
    lost = {block for block, branch in gone if branch == "attention"}
    left = [block for block, sizes in enumerate(blocks) if sizes.has("attention") and block not in lost]
    kinds = _kinds(architecture)
    if lost and not left:
        found.append("a model without any attention has nothing to generate with: one has to stay")
    elif lost and kinds[0] not in {kinds[block] for block in left}:
        found.append(
            f"the length of the cache is read from a layer of {kinds[0]}, and no attention of that kind is left"
        )
    if any(not attention_module(architecture, block) for block in lost):
        found.append("its attention has no module of its own that could be left out")
    return found
