"""The rotations that a sliced model leaves free: where they act, and the gauge that makes shortcuts triangular.

With norms whose gains are all alike (those of a sliced model), an orthogonal map R_i of the stream at interface i
changes nothing as long as all who meet it there follow: readers W <- W R_i, writers W <- R_i^T W, tables E <- E R_i,
shortcuts S_i <- R_i^T S_i R_{i+1}. The map acts on k dimensions: the width, without the mean of a LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateur.cuts.stream import SHARED, interface_read, interface_written, interfaces, lower_gauge
from secateur.families import Architecture, Sizes, canonical_name
from secateur.families.modeling_secateur import hyperplane
from secateur.families.packing import packed_triangle, unpacked_triangle
from secateur.families.roles import BEHIND_A_WRITER, NORMS, TABLES, readers_of_norms, reads_stream, writes_stream

_SHORTCUT_BEHIND = {"attention_norm": "attention_shortcut", "ffn_norm": "ffn_shortcut"}


def estimate_savings(architecture: Architecture, sizes: Sizes | None = None) -> dict[str, int]:
    """Numbers that triangular shortcuts save against square ones.

    Args:
        architecture: of a model with a rotation at every interface, or of the one it is made from.
        sizes: of the sliced model; the architecture's own when omitted.

    Returns:
        ``shortcuts``, the largest ``width`` k, and in numbers ``square`` (j k from j to k directions), ``stored``
        (k (k + 1) / 2 where j is k) and ``saved``.
    """
    made = sizes or architecture.sizes
    roles = architecture.shortcut_roles
    shapes = [made.change_of_basis(role, block) for block in range(len(made.blocks)) for role in roles]
    square = sum(rows * columns for rows, columns in shapes)
    stored = sum(sum(min(row + 1, columns) for row in range(rows)) for rows, columns in shapes)
    width = made.residual - made.mean_free
    return {"shortcuts": len(shapes), "width": width, "square": square, "stored": stored, "saved": square - stored}


@dataclass(frozen=True)
class Member:
    """A canonical tensor that meets the stream at an interface, as a reader or as a writer."""

    name: str
    side: str  # "reads" [out, d], "writes" [d, ...], "table" [rows, d]


class FreeRotations:
    """The interfaces of an architecture, and who must follow a rotation there.

    Attributes:
        names: the interfaces in order; one called ``residual`` where all share a basis.
        shortcuts: canonical names of the changes of basis between neighbours; none where all share one.
        width: k, dimensions that a rotation acts on.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture, sizes = architecture, architecture.sizes
        self.names = interfaces(architecture) if sizes.shortcuts else [SHARED]
        self.width = sizes.residual - sizes.mean_free
        self.shortcuts = [self._shortcut_behind(name) for name in self.names[:-1]]
        self.members: dict[str, list[Member]] = {name: [] for name in self.names}
        for place in architecture.places:
            norm_of = {
                role: norm
                for norm, readers in readers_of_norms(architecture.roles_of(place)).items()
                for role in readers
            }
            for tensor in architecture.tensors_of(place):
                if tensor.role in TABLES:
                    at, side = interface_written(architecture, place, tensor.role), "table"
                elif writes_stream(tensor.role):
                    at, side = interface_written(architecture, place, tensor.role), "writes"
                elif tensor.kind == "weight" and reads_stream(tensor.role):
                    at, side = interface_read(architecture, place, norm_of[tensor.role]), "reads"
                else:
                    continue
                self.members[at if sizes.shortcuts else SHARED].append(Member(tensor.name, side))

    @staticmethod
    def _shortcut_behind(interface: str) -> str:
        _, block, norm = interface.split(".")
        return canonical_name(int(block), _SHORTCUT_BEHIND[norm], "weight")

    @property
    def followers(self) -> frozenset[str]:
        """Canonical names of all tensors that a rotation changes."""
        return frozenset(m.name for group in self.members.values() for m in group) | frozenset(self.shortcuts)

    def problem(self, tensors: Mapping[str, Tensor]) -> str:
        """Why the stream of these weights cannot be rotated; empty where it can."""
        architecture = self._architecture
        if architecture.roles.intersection(BEHIND_A_WRITER):
            return "a norm stands between what writes the stream and the stream"
        if architecture.unmapped:
            return f"nothing is known of {min(architecture.unmapped)}"
        for tensor in architecture.tensors.values():
            value = tensors.get(tensor.name)
            uneven = value is not None and bool((value != value.flatten()[0]).any())
            if NORMS.get(tensor.role) == ("residual",) and uneven:
                return f"the entries of {tensor.name} differ, so that the norm does not commute with a rotation"
        for group in self.members.values():
            for member in group:
                shape, width = tensors[member.name].shape, architecture.sizes.residual
                if shape[0 if member.side == "writes" else -1] != width:
                    return f"{member.name} of shape {list(shape)} does not meet the whole stream of {width}"
        return ""

    @cached_property
    def _plane(self) -> Tensor | None:
        """[d, k]: where the stream of a LayerNorm lies; None where it has all dimensions."""
        return hyperplane(self.width + 1) if self._architecture.sizes.mean_free else None

    def whole(self, rotation: Tensor) -> Tensor:
        """The map of the stream, [d, d], for a rotation [k, k]: what is along the ones stays."""
        if self._plane is None:
            return rotation
        width = self._plane.shape[0]
        return self._plane @ rotation @ self._plane.t() + 1 / width

    def gram(self, interface: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """What turns with the interface's basis: the sum of the Gram matrices of all who meet it, [k, k] float64.

        Each counts the same. Biases are left out.
        """
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for member in self.members[interface]:
            matrix = tensors[member.name].double()
            if matrix.ndim != 2:
                continue
            if member.side == "writes":
                matrix = matrix.t()
            if self._plane is not None:
                matrix = matrix @ self._plane
            gram = matrix.t() @ matrix
            total += gram / gram.trace().clamp(min=1e-300)
        return total

    def turn(self, interface: str, tensors: Mapping[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
        """All who meet the stream at an interface (shortcuts apart), rotated, in the types they came in."""
        whole = self.whole(rotation)
        result = {}
        for member in self.members[interface]:
            tensor = tensors[member.name]
            turned = whole.t() @ tensor.double() if member.side == "writes" else tensor.double() @ whole
            result[member.name] = turned.to(tensor.dtype)
        return result

    def squares(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The shortcuts as [k, k] float64."""
        return [unpacked_triangle(tensors[name].double(), self.width) for name in self.shortcuts]

    def triangular(
        self, tensors: Mapping[str, Tensor], first: Tensor, squares: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The same function with lower triangular shortcuts, in the types the tensors came in.

        Args:
            tensors: canonical tensors; shortcuts packed, unless given apart.
            first: rotation of the first interface, [k, k]; it fixes all others up to signs.
            squares: shortcuts as [k, k], in the type in which the triangles are wanted.

        Returns:
            The tensors that changed.
        """
        rotation, result = first, {}
        for index, interface in enumerate(self.names):
            result.update(self.turn(interface, tensors, rotation))
            if index < len(self.shortcuts):
                name = self.shortcuts[index]
                square = unpacked_triangle(tensors[name], self.width) if squares is None else squares[index]
                before = rotation.t() @ square.double()
                rotation = lower_gauge(before)
                result[name] = packed_triangle(before @ rotation).to(square.dtype)
        return result
