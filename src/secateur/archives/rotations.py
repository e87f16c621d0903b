"""Rotations as numbers: taken off a stack of bits, and found again in weights that were rotated and rounded.

A rotation is written row by row, each row in the coordinates of the complement of those before it (a chain of
Householder reflections), as angles: of a unit vector of m dimensions, the angle to its first axis, then that of the
rest. Under the uniform distribution of rotations such an angle lies around a right angle with a standard deviation of
nearly m^-1/2; it is counted in cells of a quarter of that, each cut into ``fineness`` bins.

Both sides know the numbers exactly, so errors of what was recovered do not add up from row to row. A row whose
direction cannot be recovered well (its eigenvalue has close neighbours) has no numbers: such rows come last and are
what the others leave over, so that little is lost by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secateur.archives.stack import CELLS, Stack, Symbols

Matrix = NDArray[np.float64]
FINENESS: Final = (0, 1, *(n for s in range(1, 14) for n in (2**s, 3 * 2 ** (s - 1))), *(2**s for s in range(14, 21)))
"""Bins of a cell that a row may have, by their code; 0 for a row without numbers."""
BINS_OF_AN_ERROR: Final = 6.0
"""Width of a bin in standard errors: wider loses bits, narrower costs corrections."""
GUARD: Final = 2.0**-10
"""Of a bin: this near to an edge a number is sent, whatever was recovered."""
_UNSIGNED: Final = 1e-4  # a sum of entries whose sign might come out otherwise elsewhere
_TOO_FAR: Final = 120.0  # bins; corrections carry eight bits


def codes_of(errors: Matrix) -> NDArray[np.uint8]:
    """Code of every row's fineness, given the length of the error with which it is recovered."""
    wanted = 0.25 / (BINS_OF_AN_ERROR * np.maximum(errors, 1e-12))
    return np.asarray(np.searchsorted(FINENESS, wanted, side="right") - 1, dtype=np.uint8)


class _Complement:
    """What the rows so far leave over: an orthonormal basis, [D, n]."""

    def __init__(self, size: int) -> None:
        self.basis: Matrix = np.eye(size)

    def take(self, inner: Matrix) -> Matrix:
        """The row with these coordinates, [D]; the basis goes on without it."""
        row: Matrix = self.basis @ inner
        mirror = inner.copy()
        mirror[0] += 1.0 if inner[0] >= 0 else -1.0
        mirrored = self.basis @ mirror * (2 / (mirror @ mirror))
        self.basis = self.basis[:, 1:] - np.outer(mirrored, mirror[1:])
        return row


def _deviations(size: int) -> Matrix:
    """Unit of each of the ``size - 1`` angles of a row; of the last few, what keeps them within a half turn."""
    units: Matrix = np.minimum(np.arange(size, 1, -1) ** -0.5, 0.98 * np.pi / 8)
    return units


def _vector(numbers: Symbols, fineness: int) -> Matrix:
    """The unit vector in the middle of its bins."""
    units = _deviations(numbers.size + 1)
    turned = ((numbers + 0.5) / (4 * fineness) - CELLS / 8) * units  # from the right angle
    rest = np.concatenate([[1.0], np.cumprod(np.cos(turned))])
    inner: Matrix = rest
    inner[:-1] *= -np.sin(turned)
    return inner


def _positions(inner: Matrix, fineness: int) -> Matrix:
    """Where a vector lies among the bins, in bins."""
    tails = np.sqrt(np.cumsum((inner**2)[::-1])[::-1])[1:]
    turned = np.arctan2(tails, inner[:-1]) - np.pi / 2
    found: Matrix = (turned / _deviations(inner.size) + CELLS / 8) * (4 * fineness)
    return found


def _order(codes: NDArray[np.uint8]) -> list[int]:
    """Rows with numbers, the finest first."""
    return [int(row) for row in np.argsort(-codes.astype(int), kind="stable") if codes[row]]


@dataclass(frozen=True)
class Drawn:
    """A rotation taken off a stack.

    Attributes:
        rotation: [D, D], row by row.
        codes: of the rows' fineness; 0 also for rows for which there were not enough bits.
        numbers: of every row, by its index.
    """

    rotation: Matrix
    codes: NDArray[np.uint8]
    numbers: dict[int, Symbols]

    @property
    def angles(self) -> int:
        return sum(numbers.size for numbers in self.numbers.values())


def pop_rotation(stack: Stack, codes: NDArray[np.uint8]) -> Drawn:
    """Take a rotation off the stack, as many rows of it as there are bits for."""
    size = codes.size
    rotation, used, complement = np.zeros((size, size)), np.zeros_like(codes), _Complement(size)
    numbers: dict[int, Symbols] = {}
    for row in _order(codes):
        count, fineness = complement.basis.shape[1] - 1, FINENESS[codes[row]]
        if not count or stack.bits < count * (8 + fineness.bit_length()) + 64:
            break
        found = stack.pop_cells(count) * fineness
        numbers[row] = found + stack.pop_uniform(count, fineness)
        rotation[row], used[row] = complement.take(_vector(numbers[row], fineness)), codes[row]
    rotation[used == 0] = complement.basis.T
    return Drawn(rotation, used, numbers)


def push_rotation(stack: Stack, codes: NDArray[np.uint8], numbers: dict[int, Symbols]) -> None:
    """Put the numbers of a rotation back: the inverse of ``pop_rotation``."""
    for row in reversed(_order(codes)):
        fineness = FINENESS[codes[row]]
        stack.push_uniform(numbers[row] % fineness, fineness)
        stack.push_cells(numbers[row] // fineness)


@dataclass(frozen=True)
class Corrections:
    """What makes recovered rows exact.

    Attributes:
        signs: of every row with numbers, whether its recovered direction points the other way.
        wrong: of every number, whether what was recovered would give another, or nearly.
        low: of those, the lowest eight bits of the right one.
        failed: rows that no correction reaches.
    """

    signs: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    low: Symbols
    failed: list[int]


def correct(drawn: Drawn, recovered: Matrix) -> Corrections:
    """Compare what was drawn with what will be recovered.

    Args:
        recovered: directions found in the rounded weights, [D, D], row by row, of positive sums.
    """
    complement = _Complement(drawn.codes.size)
    signs, wrong, low, failed = [], [], [np.zeros(0, np.int32)], []
    for row in _order(drawn.codes):
        fineness, numbers = FINENESS[drawn.codes[row]], drawn.numbers[row]
        turned = bool(recovered[row] @ drawn.rotation[row] < 0)
        found = (-1 if turned else 1) * (recovered[row] @ complement.basis)
        error = np.abs(_positions(found, fineness) - (numbers + 0.5))
        signs.append(turned)
        wrong.append(error > 0.5 - GUARD)
        low.append(numbers[wrong[-1]] % 256)
        if error.max() > _TOO_FAR or abs(recovered[row].sum()) < _UNSIGNED:
            failed.append(row)
        complement.take(_vector(numbers, fineness))
    flags = np.concatenate(wrong) if wrong else np.zeros(0, bool)
    return Corrections(np.array(signs, bool), flags, np.concatenate(low), failed)


def restore(codes: NDArray[np.uint8], recovered: Matrix, given: Corrections) -> dict[int, Symbols]:
    """The numbers of a rotation from what was recovered of it and the corrections."""
    complement, numbers = _Complement(codes.size), {}
    start, used = 0, 0
    for position, row in enumerate(_order(codes)):
        fineness = FINENESS[codes[row]]
        found = (-1 if given.signs[position] else 1) * (recovered[row] @ complement.basis)
        where = _positions(found, fineness)
        exact = np.floor(where).astype(np.int64)
        wrong = given.wrong[start : start + exact.size]
        low = given.low[used : used + int(wrong.sum())]
        near = np.rint((where[wrong] - 0.5 - low) / 256).astype(np.int64)
        exact[wrong] = low + 256 * near
        numbers[row] = exact.astype(np.int32)
        start, used = start + exact.size, used + low.size
        complement.take(_vector(numbers[row], fineness))
    return numbers


def push_corrections(stack: Stack, drawn: Drawn, made: Corrections) -> int:
    """Put corrections and the table of fineness on the stack; returns the bits of the table."""
    stack.push_uniform(made.low, 256)
    stack.push_events(made.wrong)
    stack.push_uniform(made.signs.astype(np.int32), 2)
    before = stack.bits
    stack.push_uniform(drawn.codes.astype(np.int32), len(FINENESS))
    return stack.bits - before


def pop_corrections(stack: Stack, size: int) -> tuple[NDArray[np.uint8], Corrections]:
    """The table of fineness and the corrections: the inverse of ``push_corrections``."""
    codes = stack.pop_uniform(size, len(FINENESS)).astype(np.uint8)
    rows = len(_order(codes))
    signs = stack.pop_uniform(rows, 2).astype(bool)
    wrong = stack.pop_events(sum(size - 1 - position for position in range(rows)))
    return codes, Corrections(signs, wrong, stack.pop_uniform(int(wrong.sum()), 256), [])
