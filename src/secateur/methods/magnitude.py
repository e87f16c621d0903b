"""Magnitude: units with the largest weights stay (specs of LLM-Pruner, arXiv:2305.11627, and FLAP's mag_sp)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.families import CanonicalTensor
from secateur.families.roles import EXPERT_ROLES, MATRICES
from secateur.families.sizes import KINDS_OF_AXIS
from secateur.methods.base import Study
from secateur.methods.elementwise import Elementwise
from secateur.methods.selection import Selection
from secateur.scores.norms import squares_along, unit_energy
from secateur.spaces import BlockView, Kind, Member, Space

_FIRST: Final[Mapping[Kind, tuple[str, ...]]] = {
    "ffn": ("gate", "up"),
    "experts": ("router",),
    "kv": ("q",),
    "heads": ("q",),
    "residual": ("embedding",),
}


class MagnitudeOfWeights(Elementwise):
    """Keep the single weights with the largest absolute values."""

    name = "magnitude"
    title = "Magnitude of single weights"
    paper = "arXiv:1506.02626"

    spaces: Literal["weights"] = Field("weights", description="what the units are")

    def weigh(self, view: BlockView, matrix: CanonicalTensor, evidence: Mapping[str, Tensor]) -> Tensor:
        return view.tensors[matrix.name].abs()


class Magnitude(Selection):
    """Keep the units whose weights have the largest Euclidean norm."""

    variants: ClassVar = {("spaces", "weights"): MagnitudeOfWeights}

    name = "magnitude"
    timed = True
    title = "Magnitude of the coupled weights"
    paper = "arXiv:2305.11627"

    of: Literal["group", "first", "reader"] = Field(
        "group",
        description="weights that count: all that go with the unit, those of the first matrix that writes it "
        "(row norm of gate_proj), or those that read it (FLAP's mag_sp)",
    )

    @property
    def roles(self) -> tuple[str, ...] | None:
        """The matrices that a unit runs through; all where it runs through all."""
        if self.cuts in ("residual", "blocks"):
            return None
        if self.cuts == "experts":
            return ("router", *EXPERT_ROLES)
        cut = {axis for axis, kinds in KINDS_OF_AXIS.items() if self.cuts in kinds}
        return tuple(role for role, axes in MATRICES.items() if cut.intersection(axes))

    def _counts(self, member: Member) -> bool:
        if self.of == "reader":
            return not member.writes
        return self.of == "group" or (member.writes and member.tensor.role in _FIRST.get(self.cuts, ()))

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.cuts == "blocks":
            if view.place is None:
                return {}
            energies = [squares_along(tensor, 0).sum() for tensor in view.tensors.values()]
            return {"blocks": torch.stack(energies).sum().view(1)}
        return {s.name: unit_energy(self._members(view, s), s.size) for s in view.spaces(self.cuts)}

    def _members(self, view: BlockView, space: Space) -> list[Member]:
        members = [member for member in view.members(space) if self._counts(member)]
        gated = any(member.tensor.role == "gate" for member in members)
        if self.of == "first" and gated:
            members = [member for member in members if member.tensor.role == "gate"]
        return members

    def unit_scores(self, study: Study, space: Space) -> Tensor:
        parts = list(study.summaries[space.name])
        return torch.cat(parts) if space.kind == "blocks" else torch.stack(parts).sum(0)
