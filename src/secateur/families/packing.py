"""Packed tensors: how the stock class and the file on disk fuse, stack and transpose canonical matrices.

Canonical tensors are [out, in] matrices (and biases), one per role and expert. A packed tensor holds several of
them: ``c_attn`` holds [q; k; v] transposed, ``query_key_value`` the same by heads in turn, ``experts.gate_up_proj``
    stacks [gate; up] of every expert. ``pack`` and ``unpack`` are exact inverses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One tensor of a module or a file.

    Attributes:
        name: its name there.
        parts: canonical names, [stack][concatenated along the written axis]; one stack unless ``stacked``.
        stacked: whether dimension 0 runs over the experts.
        transposed: whether each matrix is stored [in, out].
        turn: (part, rows) where the parts take turns: of that part, so many rows belong to one turn, and of the others
            as many as make the same number of turns. None: one part after the other.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    stacked: bool = False
    transposed: bool = False
    turn: tuple[int, int] | None = None

    @property
    def canonical(self) -> tuple[str, ...]:
        return tuple(name for group in self.parts for name in group)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the packed tensor, given those of its parts."""
        group = [shapes[name] for name in self.parts[0]]
        matrix: Shape = (sum(s[0] for s in group), *group[0][1:])
        if self.transposed:
            matrix = matrix[::-1]
        return (len(self.parts), *matrix) if self.stacked else matrix

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The packed tensor of canonical ones (contiguous; a view where nothing has to move)."""
        groups = []
        for names in self.parts:
            pieces = [tensors[name] for name in names]
            if self.turn is not None:
                part, rows = self.turn
                turns = pieces[part].shape[0] // rows
                rest = pieces[0].shape[1:]
                matrix = torch.cat([p.reshape(turns, -1, *rest) for p in pieces], 1).flatten(0, 1)
            else:
                matrix = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            groups.append(matrix.t() if self.transposed and matrix.ndim == 2 else matrix)
        return (torch.stack(groups) if self.stacked else groups[0]).contiguous()

    def unpack(self, tensor: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Canonical tensors, as views of ``tensor`` unless they take turns in it."""
        result: dict[str, Tensor] = {}
        for index, names in enumerate(self.parts):
            matrix = tensor[index] if self.stacked else tensor
            if self.transposed and matrix.ndim == 2:
                matrix = matrix.t()
            lengths = [shapes[name][0] for name in names]
            if self.turn is not None:
                turns = lengths[self.turn[0]] // self.turn[1]
                split = torch.split(matrix.reshape(turns, -1, *matrix.shape[1:]), [n // turns for n in lengths], 1)
                pieces = [piece.flatten(0, 1) for piece in split]
            else:
                pieces = list(torch.split(matrix, lengths))
            result.update(zip(names, pieces, strict=True))
        return result


def packed_triangle(square: Tensor) -> Tensor:
    """The lower triangle of [k, k], row by row: [k (k + 1) / 2]."""
    rows, columns = torch.tril_indices(*square.shape, device=square.device)
    return square[rows, columns]


def unpacked_triangle(packed: Tensor, width: int) -> Tensor:
    """[k, k] from its packed lower triangle, zero above."""
    rows, columns = torch.tril_indices(width, width, device=packed.device)
    return packed.new_zeros(width, width).index_put((rows, columns), packed)
