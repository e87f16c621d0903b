"""Apply a plan to one place: select units, or carry the stream over to a new basis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.cuts.masks import masked
from secateur.cuts.stream import narrow_stream
from secateur.families import Architecture, Block, CanonicalTensor, Layout, canonical_name, place_name, resized
from secateur.families.roles import NORMS, PORTS, dimensions_of, writes_stream
from secateur.families.sizes import KINDS_OF_AXIS
from secateur.plans import Plan
from secateur.spaces import columns_of_values, positions, space_name

HEAD = canonical_name(None, "head", "weight")
EMBEDDING = canonical_name(None, "embedding", "weight")


def cut_architecture(source: Architecture, plan: Plan, layout: Layout) -> Architecture:
    """The architecture that a plan leaves."""
    return resized(source, plan.after, plan.blocks if "blocks" in plan.kept else None, layout)


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
        Tensors under their canonical names (of blocks and experts, the numbers before the cut), in the data types they
        came in.
        A head that the plan unties is added, and so are changes of basis.
    """
    added, survivors = _added(source, target, place, plan), plan.survivors
    stored = {**tensors, **_new_biases(source, added, tensors)}
    edits = plan.edits_of(place)
    result = {**stored, **{name: edit.to(next(iter(stored.values())).device) for name, edit in edits.items()}}
    for name, mask in plan.masks_of(place).items():
        result[name] = masked(result[name], mask)
    if place is None and source.sizes.tied and not plan.after.tied:
        result[HEAD] = result[EMBEDDING]
    result = {name: tensor for name, tensor in result.items() if survivors.in_its_block(name)}
    result = {name: select(source, name, tensor, plan.kept) for name, tensor in result.items()}
    if plan.bases:
        result = narrow_stream(source, target, place, result, plan.bases)
    elif "residual" in plan.kept:
        result = _rescale(source, target, result, plan)
    result = {name: tensor.to(stored[name].dtype) if name in stored else tensor for name, tensor in result.items()}
    return {**result, **_new_indices(source, added, plan)}


def _added(source: Architecture, target: Architecture, place: Block, plan: Plan) -> list[tuple[CanonicalTensor, ...]]:
    """What the output has in one place and the source has not, as the source calls it, by packed tensor."""
    new = None if place is None else plan.blocks.index(place)
    found = []
    for packed in target.packed_of(new):
        described = [target.tensors[name] for name in packed.canonical]
        names = [canonical_name(place, tensor.role, tensor.kind, tensor.expert) for tensor in described]
        if names[0] not in source.tensors and names[0] in source.catalogue:
            found.append(tuple(source.catalogue[name] for name in names))
    return found


def _new_biases(
    source: Architecture, added: list[tuple[CanonicalTensor, ...]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The biases that the plan adds, zero until its edits say what they are."""
    found = {}
    for tensor in (tensor for group in added for tensor in group if tensor.kind == "bias"):
        like = tensors[canonical_name(tensor.block, tensor.role, "weight")]
        found[tensor.name] = like.new_zeros(tensor.shape(source.sizes))
    return found


def _new_indices(source: Architecture, added: list[tuple[CanonicalTensor, ...]], plan: Plan) -> dict[str, Tensor]:
    """The indices that the plan adds: where, in the whole signal of its module, a matrix reads or writes."""
    found = {}
    for group in added:
        start, new = 0, None if group[0].block is None else plan.blocks.index(group[0].block)
        for tensor in (tensor for tensor in group if tensor.is_index):
            (dimension,) = dimensions_of(tensor.role, tensor.kind)
            units, narrowed = _positions(source, tensor, dimension, tensor.axes[0], plan.kept)
            whole = torch.arange(source.sizes.axis(tensor.axes[0], tensor.block)) if units is None else units
            if narrowed is not None:
                positions = torch.isin(whole, narrowed).nonzero().flatten()
            else:  # a basis has put what stays first; of a matrix whose neighbour is narrowed, all
                width = plan.after.narrowed(PORTS[tensor.role, dimension], new)
                positions = torch.arange(width or len(whole))
            found[tensor.name] = (positions + start).to(torch.int32)
            start += len(whole)
    return found


def select(architecture: Architecture, name: str, tensor: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """A canonical tensor with only some units of the spaces that run through it, in the order given.

    Args:
        kept: indices of units by space name, and positions along an axis by the name of what narrows it; other spaces
            stay whole.
    """
    described = architecture.catalogue[name]
    for i, dimension in enumerate(dimensions_of(described.role, described.kind)):
        units, narrowed = _positions(architecture, described, dimension, described.axes[i], kept)
        if narrowed is not None:
            units = narrowed if units is None else units[torch.isin(units, narrowed)]
        if units is not None:
            tensor = tensor.index_select(i, units.to(tensor.device))
    return tensor


def _positions(
    architecture: Architecture, described: CanonicalTensor, dimension: int, axis: str, kept: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the units that stay along a dimension, and of what is left of it where it is narrowed; None: all."""
    units = narrowed = None
    for kind in KINDS_OF_AXIS.get(axis, ()):
        found = kept.get(space_name(kind, described))
        if found is not None:
            span = architecture.sizes.span(axis, kind, described.block)
            units = positions(found, span)
    field = PORTS.get((described.role, dimension))
    if field is not None:
        narrowed = kept.get(f"{place_name(described.block)}.{field}")
        if narrowed is not None and axis == "heads" and described.block is not None:
            head, group = architecture.sizes.head, architecture.sizes.blocks[described.block].group
            narrowed = columns_of_values(narrowed, head, group)
    return units, narrowed


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
