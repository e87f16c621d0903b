"""Apply a plan to one place: select units, or carry the stream over to a new basis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.cuts.stream import StreamBasis, narrow_stream
from secateur.families import Architecture, Block, canonical_name
from secateur.families.roles import NORMS, TABLES, writes_stream
from secateur.families.sizes import UNIT_OF_AXIS
from secateur.plans import Plan
from secateur.spaces import space_name

HEAD = canonical_name(None, "head", "weight")
EMBEDDING = canonical_name(None, "embedding", "weight")


def cut_place(architecture: Architecture, place: Block, tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Canonical tensors of one place after the cut.

    Args:
        architecture: the dense architecture.
        place: block index before the cut, or None for the stem.
        tensors: its dense tensors.
        plan: the decision.

    Returns:
        Tensors under their canonical names (block indices still those before the cut), in the data types they came in.
        A head that the plan unties is added.
    """
    result = dict(tensors)
    if place is None and architecture.sizes.tied and not plan.after.tied:
        result[HEAD] = result[EMBEDDING]
    result = {name: _select(architecture, name, tensor, plan) for name, tensor in result.items()}
    if plan.basis is not None:
        basis = StreamBasis(plan.basis, architecture.family.norm == "layer")
        return narrow_stream(architecture, place, result, basis, plan.after.tied)
    if "residual" in plan.kept:
        return _rescale(architecture, result, plan)
    return result


def _select(architecture: Architecture, name: str, tensor: Tensor, plan: Plan) -> Tensor:
    described = architecture.tensors[name]
    for dimension, axis in enumerate(described.axes):
        kind = UNIT_OF_AXIS.get(axis)
        kept = plan.kept.get(space_name(kind, described)) if kind else None
        if kept is not None:
            tensor = select_units(tensor, dimension, kept, plan.before.span(axis))
    return tensor


def select_units(tensor: Tensor, dimension: int, kept: Tensor, span: int) -> Tensor:
    """Keep whole units along a dimension; unit u covers positions [u * span, (u + 1) * span)."""
    positions = (kept[:, None] * span + torch.arange(span)).flatten()
    return tensor.index_select(dimension, positions.to(tensor.device))


def _rescale(architecture: Architecture, tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Keep an RMSNorm's divisor after a selection of the stream.

    Writers are multiplied by s = sqrt(d / D), norm weights by 1 / s; the one before a tied head by 1 / s^2, because the
    head is then a writer's copy.
    """
    scale = math.sqrt(plan.after.residual / plan.before.residual)
    result = {}
    for name, tensor in tensors.items():
        role = architecture.tensors[name].role
        factor = 1.0
        if role in TABLES or writes_stream(role):
            factor = scale
        elif NORMS.get(role) == "residual":
            factor = 1 / scale**2 if role == "final_norm" and plan.after.tied else 1 / scale
        result[name] = (tensor.double() * factor).to(tensor.dtype) if factor != 1.0 else tensor
    return result
