"""Dynamic Slicing: SliceGPT that cuts redundant layers more (EMNLP Findings 2024, arXiv:2411.03513).

The layer redundancy is one minus the min-max-normalised block influence, the mean of 1 - cos between what enters and
what leaves a layer. Layer l loses the share base + t v_l of its width, base being a part of the mean share and t
such that the mean (or, with a target, the number of parameters) is as asked. All else is SliceGPT with a rotation of
its own at every norm. Shares are clipped, widths rounded, and the shortcuts are saved, unlike in the released code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.methods.slicing import Slicing


class DynamicSlicing(Slicing):
    """Principal directions, as many of each layer as its redundancy leaves it."""

    name = "dynamic_slicing"
    title = "Change Is the Only Constant: Dynamic LLM Slicing based on Layer Redundancy"
    paper = "arXiv:2411.03513"

    basis: Literal["pca", "random", "subset"] = Field("pca", description="directions that survive")
    schedule: Literal["constant", "redundancy"] = Field(
        "redundancy", description="narrower where a layer changes its input less, or as wide at every layer (slicegpt)"
    )

    @property
    def basis_name(self) -> str:
        return self.basis
