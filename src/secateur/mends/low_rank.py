"""Values and what reads them at a lower rank, the best one on the data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.mends.values import HeadBases, value_basis


def narrowed_values(tensors: Mapping[str, Tensor], moments: Tensor, head: int, rank: int) -> dict[str, Tensor]:
    """``v.weight``, ``v.bias`` where there is one, and ``out.weight`` with every head's values at a lower rank.

    Exactly the SVD of C^1/2 W_v W_o that MoDeGPT takes (arXiv:2408.09632, alg. 3), for all query heads that share the
    values together, without any matrix of the stream's width. In dense shape: of every head the first dimensions hold
    what stays, the others are zero.

    Args:
        tensors: these three, before.
        moments: E[v v^T] of the values, [groups * head, groups * head].
        head: dimensions of a head.
        rank: of them that stay.
    """
    groups = len(moments) // head
    readers = tensors["out.weight"]
    readers = readers.reshape(len(readers), groups, -1, head)  # [out, groups, query heads, head]
    narrow, found = torch.zeros_like(readers), []
    for group in range(groups):
        mine, each = slice(group * head, (group + 1) * head), readers[:, group].unbind(1)
        found.append(value_basis(each, [moments[mine, mine]] * len(each)))
        narrow[:, group, :, :rank] = readers[:, group] @ found[-1].restore[:, :rank]
    bases = HeadBases(found, readers.shape[2])
    values = {key: bases.narrowed(tensors[key], rank) for key in ("v.weight", "v.bias") if key in tensors}
    return {**values, "out.weight": narrow.flatten(1)}
