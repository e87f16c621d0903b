"""How far the signal turns over a run of blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def run_distances(ends: Tensor, length: int) -> Tensor:
    """Angle over pi between the inputs of block l and of block l + ``length``, for every l (arXiv:2403.17887, eq. 4).

    Args:
        ends: input of every block at the last token of every window, [blocks, windows, width].
        length: blocks of the run.

    Returns:
        [blocks - length] float64, means over windows; a run that holds the last block has no distance.
    """
    wide = ends.double()
    cosine = torch.nn.functional.cosine_similarity(wide[:-length], wide[length:], dim=2)
    return torch.arccos(cosine.clamp(-1, 1)).mean(1) / torch.pi
