"""Narrow the residual stream, exactly, in one basis shared by all blocks or in one of its own at every norm.

A stream of width D becomes width d through x' = s R x with s = sqrt(d / D): readers take ``restore``, writers
``reduce``. A stock RMSNorm over d dimensions divides by sqrt(|x'|^2 / d + eps) = sqrt(|R x|^2 / D + eps), so with norm
weights of 1 / s the readers see exactly the normalised projection; eps stays as it is (SliceGPT, arXiv:2401.15024,
sec. 3). With one basis for all blocks the stock classes compute it as they are; with bases of their own, a shortcut
from each basis to the next stands beside the matrix that writes the stream (per-layer layout). Those bases may be
of different widths: the stream is as wide as the widest, which is the d of the norms, and the others use its first
dimensions.

A LayerNorm also subtracts the mean. The projection is therefore carried in the hyperplane orthogonal to the vector
of ones, which takes one spare dimension: d = k + 1 for k directions. Where a norm's bias meets a reader without one
(the head), the spare dimension carries it: the norm adds ones, which all other readers map to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from secateur.errors import InternalError
from secateur.families import Architecture, Block, Sizes, canonical_name
from secateur.families.modeling_secateur import hyperplane
from secateur.families.packing import packed_triangle
from secateur.families.roles import ATTENTION_WRITERS, NORMS, TABLES, readers_of_norms, reads_stream, writes_stream

SHARED = "residual"
"""Name of the one basis that serves every norm."""


def interfaces(architecture: Architecture) -> list[str]:
    """The places where a norm reads the stream, in order: the names of the bases that a plan may hold."""
    names = [
        f"blocks.{block}.{role}"
        for block in range(len(architecture.sizes.blocks))
        for role in architecture.norms_on_stream(block)
    ]
    return [*names, "stem.final_norm"]


def sliced(architecture: Architecture, sizes: Sizes, directions: Mapping[str, int]) -> Sizes:
    """Sizes of a stream that keeps so many directions at each of its interfaces, with a head of its own.

    Args:
        architecture: the dense one.
        sizes: all other sizes.
        directions: how many survive, by interface (``interfaces``).
    """
    order = interfaces(architecture)
    widths = [directions[name] + sizes.mean_free for name in order]
    whole = max(widths)
    at = dict(zip(order, (width % whole for width in widths), strict=True))  # the widest is the stream: no port
    behind = dict(zip(order, list(at.values())[1:], strict=False))
    blocks = []
    for index, block in enumerate(sizes.blocks):
        read, norm = (f"blocks.{index}.{norm}" for norm in ("attention_norm", "ffn_norm"))
        last = read if architecture.parallel else norm
        blocks.append(
            replace(
                block,
                attention_read=at[read],
                attention_write=behind[read],
                ffn_read=at[last],
                ffn_write=behind[last],
            )
        )
    return replace(
        sizes.untied(),
        residual=whole,
        shortcuts=True,
        blocks=tuple(blocks),
        stem_write=at[order[0]],
        stem_read=at[order[-1]],
    )


def triangular(directions: Tensor, before: Tensor) -> Tensor:
    """The same subspace in the gauge in which the change of basis from the interface before is lower triangular.

    Args:
        directions: [D, k] orthonormal columns.
        before: [D, j] orthonormal columns, as they are used.
    """
    return (directions @ lower_gauge(before.t() @ directions)).contiguous()


def lower_gauge(change: Tensor) -> Tensor:
    """Orthogonal G, [k, k], for which ``change @ G`` is lower triangular with no negative diagonal (an LQ).

    A rotation of what survives is free: the function stays the same.

    Args:
        change: change of basis, [j, k], of any rank.
    """
    q, r = torch.linalg.qr(change.t(), mode="complete")
    signs = torch.ones(len(q)).to(change)
    signs[: min(r.shape)][r.diagonal() < 0] = -1
    gauge: Tensor = q * signs
    return gauge


def interface_read(architecture: Architecture, place: Block, norm: str) -> str:
    """The interface at which a norm of a place reads the stream."""
    if place is None:
        return "stem.final_norm"
    return f"blocks.{place}.{'attention_norm' if architecture.parallel else norm}"


def interface_written(architecture: Architecture, place: Block, role: str) -> str:
    """The interface for which a role of a place writes the stream: that of the next norm."""
    order = interfaces(architecture)
    if place is None:
        return order[0]
    if role in ATTENTION_WRITERS and not architecture.parallel:
        return f"blocks.{place}.ffn_norm"
    last = "attention_norm" if architecture.parallel else "ffn_norm"
    return order[order.index(f"blocks.{place}.{last}") + 1]


_NO_MEAN = 1e-8  # of an entry of a unit vector


@dataclass(frozen=True)
class StreamBasis:
    """The maps of a narrowed stream.

    Attributes:
        directions: [D, k] float64, orthonormal columns: what survives of the stream.
        mean_free: whether the norms subtract the mean (LayerNorm).
        norm_width: dimensions over which the norms divide, where the stream is wider elsewhere; 0: its own.
    """

    directions: Tensor
    mean_free: bool
    norm_width: int = 0

    @cached_property
    def _projected(self) -> Tensor:
        """Orthonormal basis of the normalised surviving signal; with mean subtraction, of the centred directions."""
        means = self.directions.mean(0)
        if not self.mean_free or means.abs().max() < _NO_MEAN:
            return self.directions
        left, values, _ = torch.linalg.svd(self.directions - means, full_matrices=False)
        kept: Tensor = left[:, values > 1e-9]
        return kept

    @cached_property
    def width(self) -> int:
        """Width d of the narrowed stream."""
        return self._projected.shape[1] + int(self.mean_free)

    @property
    def scale(self) -> float:
        """s = sqrt(d / D), d being what the norms divide by."""
        return math.sqrt((self.norm_width or self.width) / self.directions.shape[0])

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


class _Place:
    """The bases that meet in one place of the model.

    Args:
        architecture: the dense architecture.
        place: block index, or None for the stem.
        bases: directions that survive, by interface, or one for all.
        norm_width: width of the narrowed stream, that of its widest interface.
    """

    def __init__(self, architecture: Architecture, place: Block, bases: Mapping[str, Tensor], norm_width: int) -> None:
        self._norm_width = norm_width
        self._bases, self._mean_free = bases, architecture.family.norm == "layer"
        self._architecture, self._place = architecture, place
        self._made: dict[str, StreamBasis] = {}

    def _basis(self, interface: str) -> StreamBasis:
        name = SHARED if SHARED in self._bases else interface
        if name not in self._made:
            self._made[name] = StreamBasis(self._bases[name], self._mean_free, self._norm_width)
        return self._made[name]

    def read_by(self, norm: str) -> StreamBasis:
        """Basis in which a norm of this place reads the stream."""
        return self._basis(interface_read(self._architecture, self._place, norm))

    def written_by(self, role: str) -> StreamBasis:
        """Basis in which a role of this place writes the stream: that of the next norm."""
        return self._basis(interface_written(self._architecture, self._place, role))

    def shortcut(self, role: str) -> Tensor:
        """Packed lower triangle, or trapezoid, of the change of basis behind the attention or the FFN."""
        if role == "attention_shortcut":
            first, second = self.read_by("attention_norm"), self.written_by("out")
        else:
            first, second = self.read_by("ffn_norm"), self.written_by("down")
        return packed_triangle(first.directions.t() @ second.directions)


def narrow_stream(
    source: Architecture, target: Architecture, place: Block, tensors: Mapping[str, Tensor], bases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one place on the narrowed stream, norms folded into their readers.

    Args:
        source: the dense architecture.
        target: the narrowed one.
        place: block index, or None for the stem.
        tensors: canonical tensors of the place; those of the stem hold the head unless it stays tied.
        bases: [D, k] directions that survive, one named ``residual`` for all or one for each of ``interfaces``.
    """
    width = target.sizes.residual
    here, offset = _Place(source, place, bases, width), source.family.norm_offset
    result = {name: _precise(tensor) for name, tensor in tensors.items()}
    constants: dict[str, Tensor] = {}  # what the norm's bias adds to a reader that has no bias of its own
    spare: set[str] = set()
    norm_of: dict[str, str] = {}
    roles = {source.catalogue[name].role for name in tensors}
    for norm, readers in readers_of_norms(roles).items():
        weight, bias = (result.get(canonical_name(place, norm, kind)) for kind in ("weight", "bias"))
        if weight is None:
            continue
        for name in tensors:
            described = source.catalogue[name]
            if described.role not in readers or described.kind != "weight":
                continue
            norm_of[name] = norm
            if bias is not None:
                target_bias = name.removesuffix("weight") + "bias"
                if target_bias in result:
                    result[target_bias] = result[target_bias] + result[name] @ bias
                elif source.family.norm == "layer":
                    constants[name] = result[name] @ bias
                    spare.add(canonical_name(place, norm, "bias"))
                else:
                    raise InternalError("no-bias", f"folding {norm} into {name}", "the stock class has no bias there")
            result[name] = result[name] * (weight + offset)
    like = next(iter(result.values()))

    @cache  # the experts of a block share them
    def restore(norm: str) -> Tensor:
        return here.read_by(norm).restore.to(like)

    @cache
    def reduce(role: str) -> Tensor:
        basis = here.written_by(role)
        return (basis.scale * basis.reduce).to(like)

    stored = tensors[canonical_name(None, "embedding", "weight")].dtype if place is None else like.dtype
    gain = source.embedding_gain(stored) / target.embedding_gain(stored)
    for name, tensor in result.items():
        described = source.catalogue[name]
        role, kind = described.role, described.kind
        if NORMS.get(role) == ("residual",):
            basis = here.read_by(role)
            fill = 1 / basis.scale - offset if kind == "weight" else float(name in spare)
            result[name] = tensor.new_full((width,), fill)
        elif role in TABLES or writes_stream(role):
            result[name] = tensor @ reduce(role).t() if role in TABLES else reduce(role) @ tensor
            if role == "embedding":
                result[name] *= gain
        elif kind == "weight" and reads_stream(role):
            result[name] = tensor @ restore(norm_of[name])
            if name in constants:  # read along the vector of ones, where only the norm's bias lies
                result[name] += constants[name][:, None] / result[name].shape[1]
    if place is None and target.sizes.tied:
        basis = here.read_by("final_norm")
        embedding, norm = (canonical_name(None, role, "weight") for role in ("embedding", "final_norm"))
        gains = _precise(tensors[norm]) + offset
        table, shared = shared_table(_precise(tensors[embedding]), gains, restore("final_norm"))
        result[embedding], result[norm] = table * basis.scale * gain, shared / (basis.scale**2 * gain) - offset
    result = {name: tensor.to(tensors[name].dtype) for name, tensor in result.items()}
    if target.sizes.shortcuts and place is not None:
        written = tensors[canonical_name(place, source.attention_writer(place), "weight")].dtype
        for role in target.shortcut_roles:
            result[canonical_name(place, role, "weight")] = here.shortcut(role).to(written)
    return result


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
