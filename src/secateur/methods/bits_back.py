"""Slicing with a rotation at every norm, stored without the bits that the choice of a basis takes (arXiv:2410.01309).

The cut is SliceGPT's. What remains of its stream may be rotated at will at every interface, and that freedom is worth
k (k - 1) / 2 numbers each. The checkpoint spends it on shortcuts that are triangular (half of each is not stored).
``secateur pack`` codes the rest, or instead codes all of it as published.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field

from secateur.errors import refuse
from secateur.families import Layout
from secateur.methods.base import Output
from secateur.methods.slicegpt import SliceGpt


class BitsBack(SliceGpt):
    """SliceGPT's cut with a rotation at every interface, in the gauge in which its shortcuts are triangular."""

    name = "bits_back"
    title = "Getting Free Bits Back from Rotational Symmetries in LLMs"
    paper = "arXiv:2410.01309"
    output: ClassVar[Output] = "dense-per-layer"

    rotation: Literal["each"] = Field("each", description="every interface its own: what there is to save")

    def in_layout(self, layout: Layout) -> Self:
        if layout == "native":
            found = "it is about the rotations of every norm, and stock classes have no place for their shortcuts"
            refuse("not-native", "bits_back in the native layout", found, "--layout per-layer")
        return self
