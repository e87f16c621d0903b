"""Blocks of a module replaced by their shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.graph.blocks import Block, Depth, outermost
from secateur.graph.host import Batch
from secateur.graph.tape import call

_AFTER: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
"""What may follow an addition inside a block that is replaced as a whole."""
_IDEMPOTENT: Final = frozenset({"relu", "relu6"})


class NoBypassError(Exception):
    """A block that no exchange of submodules leaves out."""


class Bypass(nn.Module):
    """Stands for a module that went: gives its first tensor, or zeros of that shape, in the form the module gave.

    Args:
        form: what the module returned, with True where it held a tensor.
        silent: zeros instead of the tensor.
    """

    def __init__(self, form: Any, silent: bool) -> None:
        super().__init__()
        self.form, self.silent = form, silent

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        value = torch.zeros_like(x) if self.silent else x
        return tree_map(lambda leaf: value if leaf is True else leaf, self.form)

    def extra_repr(self) -> str:
        return f"silent={self.silent}"


def bypass(module: nn.Module, depth: Depth, inputs: Batch, blocks: Sequence[Block]) -> None:
    """Replace blocks of a module in place.

    A module that does nothing but the block becomes ``nn.Identity``, or the activation behind its addition. Else the
    parts that serve the branch alone give their input, and the last of them, and whatever goes past it, zeros.

    Args:
        module: as it was recorded.
        depth: what it can do without.
        inputs: as it was recorded on.
        blocks: some of these.

    Raises:
        NoBypassError: multiplications of a block stand in the code of a module that does more.
    """
    modules, dead = depth.by_module(), depth.unused
    exchanged: dict[str, nn.Module | bool] = {}
    for block in outermost(blocks):
        whole = _whole(block, depth, modules)
        if whole is not None:
            exchanged[whole[0]] = whole[1]
            continue
        parts = [path for path, own in modules.items() if own <= block.region | dead and own & block.region]
        parts = [path for path in parts if path.rpartition(".")[0] not in parts]
        inside = set().union(*(modules[path] for path in parts)) if parts else set()
        if bare := [i for i in block.region - inside if depth.work[i]]:
            place = depth.graph.network.operations[bare[0]].place or "the network itself"
            raise NoBypassError(f"a multiplication of it stands in the code of {place}")
        last = max(parts, key=lambda path: max(modules[path] & block.region - dead, default=-1))
        past = _reaching(block, depth, modules.get(last, set()))
        exchanged |= {path: path == last or bool(modules[path] & past) for path in parts}
    forms = _forms(module, inputs, [path for path, new in exchanged.items() if isinstance(new, bool)])
    for path, new in exchanged.items():
        if isinstance(new, bool):
            form, single = forms[path]
            new = nn.Identity() if single and not new else Bypass(form, new)
        owner, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new.train(module.training))


def _whole(block: Block, depth: Depth, modules: Mapping[str, set[int]]) -> tuple[str, nn.Module] | None:
    """The smallest module that the block fills, and what stands for it then."""
    steps = depth.graph.network.operations
    path = steps[block.step].place
    while path and not block.region <= modules[path]:
        path = path.rpartition(".")[0]
    rest = sorted(modules[path] - block.region - {block.step} - depth.unused) if path else []
    value, after = block.out, []
    for number in rest:
        name = steps[number].source.rstrip("_")
        if list(steps[number].inputs.values()) != [value] or name not in _AFTER:
            return None
        value = steps[number].outputs[0]
        after.append(name)
    if not path:
        return None
    made = next((step.source.rstrip("_") for step in steps if block.shortcut in step.outputs), "")
    if not after or (set(after) == {made} and made in _IDEMPOTENT):
        return path, nn.Identity()
    new = [_AFTER[name]() for name in after]
    return path, new[0] if len(new) == 1 else nn.Sequential(*new)


def _reaching(block: Block, depth: Depth, without: Collection[int]) -> set[int]:
    """Operations of a block from which a way leads to its addition past some others."""
    wanted, found = {block.branch}, set()
    for number in sorted(block.region - set(without), reverse=True):
        step = depth.graph.network.operations[number]
        if wanted & set(step.outputs):
            found.add(number)
            wanted |= set(step.inputs.values())
    return found


def _forms(module: nn.Module, inputs: Batch, paths: Sequence[str]) -> dict[str, tuple[Any, bool]]:
    """What some modules return, True in place of tensors, and whether they take and give one tensor only."""
    found: dict[str, tuple[Any, bool]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            form = tree_map(lambda leaf: True if isinstance(leaf, Tensor) else leaf, result)
            found[path] = form, form is True and len(args) == 1 and not kwargs

        return hook

    handles = [module.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in paths]
    try:
        if paths:
            with torch.no_grad():
                call(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
