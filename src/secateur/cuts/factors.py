"""Matrices kept as factors: an N:M core between two block-diagonal wrappers, and what they take to store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from secateur.cuts.masks import Pattern


@dataclass(frozen=True)
class Factors:
    """A matrix [out, in] as L (S o M) R.

    Attributes:
        left: L, [row blocks, rows, rows]: the last block may reach beyond the matrix.
        values: the entries of S that stay, row by row.
        mask: M, bool, [out, in].
        right: R, [column blocks, columns, columns].
    """

    left: Tensor
    values: Tensor
    mask: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """The matrix, multiplied out in float64."""
        core = torch.zeros(self.mask.shape, dtype=torch.float64, device=self.mask.device)
        core[self.mask] = self.values.double()
        return wrapped(self.left.double(), core, self.right.double())

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return self.left.numel() + self.values.numel() + self.right.numel()

    @property
    def bytes(self) -> int:
        """What they and one bit for every weight take."""
        return self.parameters * self.values.element_size() + math.ceil(self.mask.numel() / 8)

    def named(self, matrix: str) -> dict[str, Tensor]:
        """What is stored, by the name of the matrix and of the part."""
        return {f"{matrix}.{part.name}": getattr(self, part.name) for part in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], matrix: str) -> Factors:
        """A matrix from what ``named`` gave."""
        return cls(**{part.name: tensors[f"{matrix}.{part.name}"] for part in fields(cls)})

    @staticmethod
    def matrices(tensors: Iterable[str]) -> list[str]:
        """Names of the matrices among the names of stored parts."""
        return [name.removesuffix(".mask") for name in tensors if name.endswith(".mask")]


def wrapped(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """L S R of block-diagonal L and R, whose last blocks may reach beyond the sides of S.

    Args:
        left, right: [blocks, n, n].
        core: [out, in].
    """
    fill = (0, right.shape[0] * right.shape[1] - core.shape[1], 0, left.shape[0] * left.shape[1] - core.shape[0])
    whole = times_left(left, times_right(functional.pad(core, fill), right))
    return whole[: core.shape[0], : core.shape[1]]


def times_left(blocks: Tensor, matrix: Tensor) -> Tensor:
    """A X of a block-diagonal A, [blocks, n, n]."""
    return (blocks @ matrix.view(len(blocks), blocks.shape[-1], -1)).view(matrix.shape)


def times_right(matrix: Tensor, blocks: Tensor) -> Tensor:
    """X B of a block-diagonal B, [blocks, n, n]."""
    parts = matrix.view(len(matrix), len(blocks), -1).transpose(0, 1)
    return (parts @ blocks).transpose(0, 1).reshape(matrix.shape)


def block_sides(shape: tuple[int, int], block: int, pattern: Pattern) -> tuple[int, int]:
    """Rows and columns of the wrappers' blocks: at most those of the matrix, and whole groups of the pattern."""
    return min(block, shape[0]), math.ceil(min(block, shape[1]) / pattern.of) * pattern.of


def largest_block(shape: tuple[int, int], share: float, most: int, least: int) -> int:
    """The largest power of two from ``least`` to ``most`` whose wrappers take no more than a share of the matrix."""
    found = least
    while 2 * found <= most and 2 * found * sum(shape) <= share * shape[0] * shape[1]:
        found *= 2
    return found


@dataclass(frozen=True)
class Stored:
    """What a matrix takes as factors, beside the same matrix in the plain pattern and dense.

    Attributes:
        values, wrappers: how many numbers of the core stay, and how many the wrappers have.
        index_bytes: of the mask, one bit for every weight.
        dense: weights of the matrix.
        itemsize: bytes of a number.
    """

    values: int
    wrappers: int
    index_bytes: int
    dense: int
    itemsize: int

    @classmethod
    def foreseen(cls, shape: tuple[int, int], block: int, pattern: Pattern, itemsize: int) -> Stored:
        """From the shape alone."""
        dense = shape[0] * shape[1]
        sides = block_sides(shape, block, pattern)
        wrappers = sum(math.ceil(whole / side) * side**2 for whole, side in zip(shape, sides, strict=True))
        return cls(pattern.count(shape), wrappers, math.ceil(dense / 8), dense, itemsize)

    @property
    def parameters(self) -> int:
        """Numbers that are stored."""
        return self.values + self.wrappers

    @property
    def bytes(self) -> int:
        """All that is stored."""
        return self.parameters * self.itemsize + self.index_bytes

    @property
    def plain_bytes(self) -> int:
        """The core alone: the same pattern without wrappers."""
        return self.values * self.itemsize + self.index_bytes

    @property
    def dense_bytes(self) -> int:
        """The whole matrix."""
        return self.dense * self.itemsize
