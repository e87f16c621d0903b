"""SliceGPT: delete directions of the residual stream after a PCA rotation (ICLR 2024, arXiv:2401.15024).

The paper rotates every interface (what a norm reads) by a PCA of its own and pays with a shortcut matrix from each to
the next: the per-layer layout. In the native layout one rotation is shared by all: the PCA of the sum of the
interfaces' trace-normalised Grams. No shortcut is left and the result is a stock model with a smaller ``hidden_size``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.methods.slicing import Slicing


class SliceGpt(Slicing):
    """Rotate the residual stream to its principal directions and keep the largest, as many at every norm."""

    name = "slicegpt"
    timed = True
    title = "SliceGPT: Compress Large Language Models by Deleting Rows and Columns"
    paper = "arXiv:2401.15024"

    basis: Literal["pca", "random", "subset"] = Field(
        "pca",
        description="directions that survive: principal ones, random ones, or plain dimensions (keeps a tied head)",
    )

    @property
    def basis_name(self) -> str:
        return self.basis
