"""Narrow the residual stream in one basis shared by all blocks, exactly, in the stock classes.

A stream of width D becomes width d through x' = s R x with s = sqrt(d / D): readers take ``restore``, writers
``reduce``. A stock RMSNorm over d dimensions divides by sqrt(|x'|^2 / d + eps) = sqrt(|R x|^2 / D + eps), so with norm
weights of 1 / s the readers see exactly the normalised projection; eps stays as it is (SliceGPT, arXiv:2401.15024,
sec. 3, with one rotation for all blocks).

A LayerNorm also subtracts the mean. The projection is therefore carried in the hyperplane orthogonal to the vector
of ones, which takes one spare dimension: d = k + 1 for k directions. Where a norm's bias meets a reader without one
(the head), the spare dimension carries it: the norm adds ones, which all other readers map to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.errors import InternalError
from secateur.families import Architecture, Block, canonical_name
from secateur.families.roles import MATRICES, NORMS, READERS_OF_NORM, TABLES, writes_stream


def hyperplane(size: int) -> Tensor:
    """Orthonormal basis [size, size - 1] of the vectors whose entries sum to zero (a Householder reflection)."""
    mirror = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    mirror[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / mirror.dot(mirror)
    return reflection[:, 1:]


@dataclass(frozen=True)
class StreamBasis:
    """The maps of a narrowed stream.

    Attributes:
        directions: [D, k] float64, orthonormal columns: what survives of the stream.
        mean_free: whether the norms subtract the mean (LayerNorm).
    """

    directions: Tensor
    mean_free: bool

    @cached_property
    def _projected(self) -> Tensor:
        """Orthonormal basis of the normalised surviving signal; with mean subtraction, of the centred directions."""
        if not self.mean_free:
            return self.directions
        centred = self.directions - self.directions.mean(0)
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        kept: Tensor = left[:, values > 1e-9]
        return kept

    @cached_property
    def width(self) -> int:
        """Width d of the narrowed stream."""
        return self._projected.shape[1] + int(self.mean_free)

    @property
    def scale(self) -> float:
        """s = sqrt(d / D)."""
        return math.sqrt(self.width / self.directions.shape[0])

    @cached_property
    def restore(self) -> Tensor:
        """[D, d]: what readers are multiplied with."""
        return self._projected @ hyperplane(self.width).t() if self.mean_free else self._projected

    @cached_property
    def reduce(self) -> Tensor:
        """[d, D]: what writers are multiplied with, before the scale."""
        if not self.mean_free:
            return self._projected.t()
        projector = self.directions @ self.directions.t()
        return self.restore.t() @ (projector - projector.mean(0))


def narrow_stream(
    architecture: Architecture, place: Block, tensors: Mapping[str, Tensor], basis: StreamBasis, tied: bool = False
) -> dict[str, Tensor]:
    """The tensors of one place on the narrowed stream, norms folded into their readers.

    Args:
        architecture: the dense architecture.
        tensors: canonical tensors of the place; those of the stem hold the head unless it stays tied.
        tied: whether one matrix goes on serving as embedding and head (RMSNorm only; see ``shared_table``).
    """
    result = {name: _precise(tensor) for name, tensor in tensors.items()}
    constants: dict[str, Tensor] = {}  # what the norm's bias adds to a reader that has no bias of its own
    spare: set[str] = set()
    for norm, readers in READERS_OF_NORM.items():
        weight, bias = (result.get(canonical_name(place, norm, kind)) for kind in ("weight", "bias"))
        if weight is None:
            continue
        for name in tensors:
            described = architecture.tensors[name]
            if described.role not in readers or described.kind != "weight":
                continue
            if bias is not None:
                target = name.removesuffix("weight") + "bias"
                if target in result:
                    result[target] = result[target] + result[name] @ bias
                elif basis.mean_free:
                    constants[name] = result[name] @ bias
                    spare.add(canonical_name(place, norm, "bias"))
                else:
                    raise InternalError("no-bias", f"folding {norm} into {name}", "the stock class has no bias there")
            result[name] = result[name] * weight
    restore, reduce = (m.to(next(iter(result.values()))) for m in (basis.restore, basis.scale * basis.reduce))
    for name, tensor in result.items():
        described = architecture.tensors[name]
        role, kind = described.role, described.kind
        if role in TABLES:
            result[name] = tensor @ reduce.t()
        elif role in NORMS and NORMS[role] == "residual":
            fill = 1 / basis.scale if kind == "weight" else float(name in spare)
            result[name] = tensor.new_full((basis.width,), fill)
        elif writes_stream(role):
            result[name] = reduce @ tensor
        elif kind == "weight" and role in MATRICES and MATRICES[role][1] == "residual":
            result[name] = tensor @ restore
            if name in constants:  # read along the vector of ones, where only the norm's bias lies
                result[name] += constants[name][:, None] / basis.width
    if place is None and tied:
        embedding, norm = (canonical_name(None, role, "weight") for role in ("embedding", "final_norm"))
        table, gains = shared_table(_precise(tensors[embedding]), _precise(tensors[norm]), restore)
        result[embedding], result[norm] = table * basis.scale, gains / basis.scale**2
    return {name: tensor.to(tensors[name].dtype) for name, tensor in result.items()}


def shared_table(embedding: Tensor, gains: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """One table and the gains of the final norm that serve as embedding and as head on a rotated stream.

    Exactly, the embedding becomes A = E Q and the head B = E diag(g) Q, which share no table because the gains g do
    not commute with Q. The gains h that bring A nearest to B are the diagonal least-squares ones; T is then the least
    squares of T = A and T diag(h) = B, both errors relative to the size of what they approximate. (Ours. Solving for T
    and h in turn until they settle was no better on validation text.)

    Args:
        embedding: E, [vocab, D].
        gains: g, [D].
        directions: Q, [D, k].

    Returns:
        T [vocab, k] and h [k].
    """
    first, second = embedding @ directions, (embedding * gains) @ directions
    weight = first.square().sum() / second.square().sum().clamp(min=1e-30)
    shared = (first * second).sum(0) / first.square().sum(0).clamp(min=1e-30)
    return (first + weight * shared * second) / (1 + weight * shared.square()), shared


def _precise(tensor: Tensor) -> Tensor:
    """Products in float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
