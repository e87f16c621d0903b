"""Apply a plan to one place: select units, or carry the stream over to a new basis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.cuts.stream import narrow_stream
from secateur.families import Architecture, Block, canonical_name
from secateur.families.roles import NORMS, writes_stream
from secateur.families.sizes import KINDS_OF_AXIS
from secateur.plans import Plan
from secateur.spaces import space_name

HEAD = canonical_name(None, "head", "weight")
EMBEDDING = canonical_name(None, "embedding", "weight")


def cut_place(
    source: Architecture, target: Architecture, place: Block, tensors: Mapping[str, Tensor], plan: Plan
) -> dict[str, Tensor]:
    """Canonical tensors of one place after the cut.

    Args:
        source: the dense architecture.
        target: the one after the cut.
        place: block index before the cut, or None for the stem.
        tensors: its dense tensors.
        plan: the decision.

    Returns:
        Tensors under their canonical names (block indices still those before the cut), in the data types they came in.
        A head that the plan unties is added, and so are changes of basis.
    """
    stored = dict(tensors)
    edits = plan.edits_of(place)
    result = {**stored, **{name: edit.to(next(iter(stored.values())).device) for name, edit in edits.items()}}
    if place is None and source.sizes.tied and not plan.after.tied:
        result[HEAD] = result[EMBEDDING]
    result = {name: select(source, name, tensor, plan.kept) for name, tensor in result.items()}
    if plan.bases:
        result = narrow_stream(source, target, place, result, plan.bases)
    elif "residual" in plan.kept:
        result = _rescale(source, target, result, plan)
    return {name: tensor.to(stored[name].dtype) if name in stored else tensor for name, tensor in result.items()}


def select(architecture: Architecture, name: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """A canonical tensor with only some units of the spaces that run through it, in the order given.

    Args:
        kept: indices of units by space name; other spaces stay whole.
    """
    described = architecture.tensors[name]
    for dimension, axis in enumerate(described.axes):
        for kind in KINDS_OF_AXIS.get(axis, ()):
            units = kept.get(space_name(kind, described))
            if units is not None:
                span = architecture.sizes.span(axis, kind, described.block)
                tensor = select_units(tensor, dimension, units, span)
    return tensor


def select_units(tensor: Tensor, dimension: int, kept: Tensor, span: int) -> Tensor:
    """Keep whole units along a dimension; unit u covers positions [u * span, (u + 1) * span)."""
    positions = (kept[:, None] * span + torch.arange(span)).flatten()
    return tensor.index_select(dimension, positions.to(tensor.device))


def _rescale(
    source: Architecture, target: Architecture, tensors: Mapping[str, Tensor], plan: Plan
) -> dict[str, Tensor]:
    """Keep an RMSNorm's divisor after a selection of the stream.

    Writers are multiplied by s = sqrt(d / D), norm weights by 1 / s. The embedding also makes up for what the stock
    class multiplies it by; a tied head is a copy of it, which the weight of the norm before it undoes.
    """
    scale = math.sqrt(plan.after.residual / plan.before.residual)
    embedding = tensors.get(EMBEDDING)
    stored = torch.float32 if embedding is None else embedding.dtype
    table = scale * source.embedding_gain(stored) / target.embedding_gain(stored)
    offset = source.family.norm_offset
    result = {}
    for name, tensor in tensors.items():
        role, shift = source.tensors[name].role, 0.0
        factor = 1.0
        if role == "embedding":
            factor = table
        elif writes_stream(role):
            factor = scale
        elif NORMS.get(role) == ("residual",):
            factor = 1 / (scale * table) if role == "final_norm" and plan.after.tied else 1 / scale
            shift = offset
        result[name] = ((tensor.double() + shift) * factor - shift).to(tensor.dtype) if factor != 1.0 else tensor
    return result
