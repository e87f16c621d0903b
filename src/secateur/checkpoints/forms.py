"""Forms in which a tensor with zeros takes fewer bytes: its non-zero values in order, and where they lie.

Zero is what has no bit set: -0.0 and every NaN are values, so that all forms are exact to the bit. Each form stores
two arrays, the values and the bytes that say where they are, and chooses neither: ``measure`` finds the smallest.

* ``bitmask``: one bit per element.
* ``gaps``: the number of zeros before each value, in codes of few bits, all ones for a run that is longer.
* ``pattern``: N of every M consecutive inputs, each group's places as one number (``checkpoints/patterns.py``).

All work is done in pieces: beside the tensor and its stored form, memory for a few million elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, log2, prod
from typing import Annotated, Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from secateur.checkpoints.patterns import (
    Bytes,
    field_bytes,
    information_bits,
    pack_digits,
    pack_fields,
    pattern_bytes,
    rank,
    unpack_digits,
    unpack_fields,
    unrank,
)

Bits = NDArray[Any]
"""The bits of a tensor as unsigned integers, one per element, in one dimension."""
PIECE: Final = 2**20  # elements worked on at a time
Group = Literal[4, 8, 16, 32]
"""Sizes M of groups in which a pattern N:M is looked for."""
_GROUPS: Final[tuple[Group, ...]] = get_args(Group)
WIDTHS: Final = range(2, 9)
"""Widths of the codes for gaps. A byte stands for 255 zeros at most, which bounds what a damaged file can ask for."""


class _Form(BaseModel):
    """What a file must say of a tensor besides the two arrays; ``shape`` is the tensor's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shape: tuple[NonNegativeInt, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


class Bitmask(_Form):
    """One bit per element, the highest bit of a byte first."""

    form: Literal["bitmask"] = "bitmask"

    @property
    def where(self) -> int:
        """Bytes that say where the values are."""
        return -(-self.elements // 8)

    def stored(self, nonzeros: int) -> int:
        """Values that are stored."""
        return nonzeros

    def encode(self, bits: Bits) -> tuple[Bits, Bytes]:
        """The values and where they are."""
        where = [np.packbits(piece != 0) for piece in _pieces(bits)]
        return _joined([bits.take(places) for places in _places(bits)], bits.dtype), _joined(where, np.dtype(np.uint8))

    def decode(self, values: Bits, where: Bytes) -> Bits:
        """The bits of the tensor, ``where`` being as long as it must."""
        result, taken = np.zeros(self.elements, values.dtype), 0
        if self.elements % 8 and where[-1] & (0xFF >> self.elements % 8):
            raise ValueError("bits behind the last element")
        for start, piece in zip(range(0, self.elements, PIECE), _pieces(result), strict=True):
            mask = np.unpackbits(where[start // 8 :][: -(-len(piece) // 8)], count=len(piece)).view(np.bool_)
            places = np.flatnonzero(mask)  # many times faster than a mask as an index
            if taken + len(places) > len(values):
                break
            piece[places] = values[taken : taken + len(places)]
            taken += len(places)
        else:
            if taken == len(values):
                return result
        raise ValueError(f"{len(values)} values for another number of places")


class Gaps(_Form):
    """The zeros before each value in codes of ``width`` bits; 2^width - 1 of them without a value are a code too.

    ``codes`` is their number. Zeros behind the last value are counted in the long codes only.
    """

    form: Literal["gaps"] = "gaps"
    width: Annotated[int, Field(ge=WIDTHS[0], le=WIDTHS[-1])]
    codes: NonNegativeInt

    @property
    def where(self) -> int:
        return field_bytes(self.codes, self.width)

    @property
    def _long(self) -> int:
        return (1 << self.width) - 1

    def stored(self, nonzeros: int) -> int:
        return nonzeros

    def encode(self, bits: Bits) -> tuple[Bits, Bytes]:
        values, codes, long = [], [], self._long
        last = -1
        for places in _places(bits):
            long_ones, short = np.divmod(np.diff(places, prepend=last) - 1, long)
            ends = np.cumsum(long_ones + 1)
            made = np.full(ends[-1], long, np.uint8)
            made[ends - 1] = short
            codes.append(made)
            values.append(bits.take(places))
            last = int(places[-1])
        codes.append(np.full((len(bits) - 1 - last) // long, long, np.uint8))
        return _joined(values, bits.dtype), pack_fields(_joined(codes, np.dtype(np.uint8)), self.width)

    def decode(self, values: Bits, where: Bytes) -> Bits:
        codes = unpack_fields(where, self.width, self.codes).astype(np.uint8)
        ends = codes != self._long
        covered = int(codes.sum(dtype=np.int64)) + int(np.count_nonzero(ends))
        if not 0 <= self.elements - covered < self._long:
            raise ValueError(f"gaps that add up to {covered} elements instead of {self.elements}")
        if np.count_nonzero(ends) != len(values):
            raise ValueError(f"{len(values)} values for another number of places")
        result, taken, position = np.zeros(self.elements, values.dtype), 0, 0
        for start in range(0, len(codes), PIECE):
            end = ends[start : start + PIECE]
            places = position + np.cumsum(codes[start : start + PIECE].astype(np.int64) + end)
            position = int(places[-1])
            places = places[end] - 1
            result[places] = values[taken : taken + len(places)]
            taken += len(places)
        return result


class Pattern(_Form):
    """At most ``keep`` of every ``of`` elements along an axis; a group that has fewer stores zeros too."""

    form: Literal["pattern"] = "pattern"
    keep: PositiveInt
    of: Group
    axis: Literal[-1, -2]

    @model_validator(mode="after")
    def _divides(self) -> Pattern:
        if self.keep > self.of or len(self.shape) < -self.axis or self.shape[self.axis] % self.of:
            raise ValueError(f"no pattern {self.keep}:{self.of} fits {list(self.shape)}")
        return self

    @property
    def groups(self) -> int:
        return self.elements // self.of

    @property
    def where(self) -> int:
        return pattern_bytes(self.groups, self.keep, self.of)

    def stored(self, nonzeros: int) -> int:
        del nonzeros
        return self.groups * self.keep

    @property
    def _beside(self) -> int:
        """Groups that lie between each other's elements."""
        return self.shape[-1] if self.axis == -2 else 1

    def _rows(self, bits: Bits) -> Iterator[tuple[int, Bits]]:
        """Pieces of whole groups as views [.., of, beside], each with the number of its first group."""
        view = bits.reshape(-1, self.of, self._beside) if len(bits) else bits.reshape(0, self.of, 1)
        step = max(1, PIECE // (self.of * self._beside or 1))
        for start in range(0, len(view), step):
            yield start * self._beside, view[start : start + step]

    def encode(self, bits: Bits) -> tuple[Bits, Bytes]:
        values = np.empty((self.groups, self.keep), bits.dtype)
        numbers = np.empty(self.groups, np.uint64)
        for first, view in self._rows(bits):
            groups = view.swapaxes(1, 2).reshape(-1, self.of)
            places = np.flatnonzero(groups != 0)
            if len(places) < len(groups) * self.keep:
                places = np.flatnonzero(_filled(groups != 0, self.keep))
            values[first : first + len(groups)] = groups.take(places).reshape(-1, self.keep)
            numbers[first : first + len(groups)] = rank((places % self.of).reshape(-1, self.keep), self.of)
        return values.reshape(-1), pack_digits(numbers, comb(self.of, self.keep))

    def decode(self, values: Bits, where: Bytes) -> Bits:
        if len(values) != self.groups * self.keep:
            raise ValueError(f"{len(values)} values for {self.groups} groups of {self.keep}")
        numbers = unpack_digits(where, comb(self.of, self.keep), self.groups)
        result = np.zeros(self.elements, values.dtype)
        kept = values.reshape(-1, self.keep)
        for first, view in self._rows(result):
            number = view.shape[0] * view.shape[2]
            groups = np.zeros(number * self.of, values.dtype)
            places = unrank(numbers[first : first + number], self.keep, self.of)
            groups[places + np.arange(0, len(groups), self.of)[:, None]] = kept[first : first + number]
            view[...] = groups.reshape(view.shape[0], view.shape[2], self.of).swapaxes(1, 2)
        return result


Form = Annotated[Bitmask | Gaps | Pattern, Field(discriminator="form")]


def name_of(form: Form | None) -> str:
    """What people call a form: ``bitmask``, ``gaps``, ``2:4``; None is ``dense``."""
    if form is None:
        return "dense"
    return f"{form.keep}:{form.of}" if isinstance(form, Pattern) else form.form


# -- which is the smallest ---------------------------------------------------------------------------------------------


def measure(bits: Bits, shape: tuple[int, ...], spare: int = 0) -> tuple[Form | None, int]:
    """The smallest form of a tensor; patterns are looked for along the last axis, and else along the one before.

    Args:
        bits: the tensor's, in one dimension.
        shape: the tensor's.
        spare: bytes that a form must save at least (it needs more of the file's header).

    Returns:
        The form, None for the tensor as it is, and the number of non-zeros.
    """
    nonzeros = sum(int(np.count_nonzero(piece != 0)) for piece in _pieces(bits))
    if nonzeros == len(bits):
        return None, nonzeros

    def size(form: Form) -> int:
        return form.stored(nonzeros) * bits.itemsize + form.where

    forms: list[Form] = [Bitmask(shape=shape)]
    for axis in (-1, -2):
        patterns = _patterns(bits, shape, axis)
        forms += patterns
        if any(size(form) < size(forms[0]) for form in patterns):
            break
    if 2 * nonzeros < len(bits):  # the narrowest code has two bits
        forms.append(_gaps(bits, shape))
    best = min(forms, key=size)
    return (best if size(best) + spare < bits.nbytes else None), nonzeros


def foreseen(elements: int, nonzeros: int, itemsize: int, pattern: tuple[int, int] | None = None) -> int:
    """Bytes that a tensor will take, its zeros spread at random, or N of every M left; gaps are their mean.

    Args:
        pattern: N and M.
    """
    sizes = [elements * itemsize, nonzeros * itemsize + -(-elements // 8)]
    if pattern is not None and pattern[1] in _GROUPS:
        groups = elements // pattern[1]
        sizes.append(groups * pattern[0] * itemsize + pattern_bytes(groups, *pattern))
    zero = 1 - nonzeros / max(1, elements)
    for width in WIDTHS:
        long = (1 << width) - 1
        codes = nonzeros / (1 - zero**long) if nonzeros else elements / long
        sizes.append(nonzeros * itemsize + int(width * codes / 8))
    return min(sizes)


def bound(form: Form | None, elements: int, nonzeros: int, itemsize: int) -> float:
    """Bytes below which no code of zeros gets: the values, and log2 of the number of ways to place them.

    The places are any ``nonzeros`` of all, or N of every M where the tensor is stored so.
    """
    if isinstance(form, Pattern):
        ways = form.groups * log2(comb(form.of, form.keep))
    else:
        ways = information_bits(elements, nonzeros)
    return nonzeros * itemsize + ways / 8


def _gaps(bits: Bits, shape: tuple[int, ...]) -> Gaps:
    """The gaps in the width that needs the fewest bytes."""
    last, few = -1, np.zeros(PIECE + 1, np.int64)  # how often each gap is there
    many: list[int] = []  # gaps that are longer than a piece
    for places in _places(bits):
        gaps = np.diff(places, prepend=last) - 1
        if gaps[0] > PIECE:
            many.append(int(gaps[0]))
            gaps = gaps[1:]
        few += np.bincount(gaps, minlength=len(few))
        last = int(places[-1])
    found = []
    for width in WIDTHS:
        long = (1 << width) - 1
        codes = int((few * (np.arange(len(few)) // long + 1)).sum()) + sum(gap // long + 1 for gap in many)
        found.append(Gaps(shape=shape, width=width, codes=codes + (len(bits) - 1 - last) // long))
    return min(found, key=lambda form: form.where)


def _patterns(bits: Bits, shape: tuple[int, ...], axis: Literal[-1, -2]) -> list[Pattern]:
    """The patterns N:M, N < M, that a tensor has along an axis, of sizes M that divide it."""
    if len(shape) < -axis:
        return []
    beside = shape[-1] if axis == -2 else 1
    rows = bits.reshape(-1, beside)
    step = max(_GROUPS[-1], PIECE // beside // _GROUPS[-1] * _GROUPS[-1])
    most = {m: 0 for m in _GROUPS if shape[axis] % m == 0}
    for start in range(0, len(rows), step):
        counts: NDArray[np.uint8] = (rows[start : start + step] != 0).view(np.uint8)
        counts = counts[0::2] + counts[1::2] if most else counts
        for m in most:
            counts = counts[0::2] + counts[1::2]
            most[m] = max(most[m], int(counts.max()))
        if all(n == m for m, n in most.items()):
            break
    return [Pattern(shape=shape, keep=max(1, n), of=m, axis=axis) for m, n in most.items() if n < m]


# -- pieces ------------------------------------------------------------------------------------------------------------


def _pieces(bits: Bits) -> Iterator[Bits]:
    return (bits[start : start + PIECE] for start in range(0, len(bits), PIECE))


def _places(bits: Bits) -> Iterator[NDArray[np.intp]]:
    """Where the non-zeros are, piece by piece; pieces without any are left out."""
    for start, piece in zip(range(0, len(bits), PIECE), _pieces(bits), strict=True):
        places = np.flatnonzero(piece != 0)
        if len(places):
            yield places + start


def _joined(pieces: list[Bits], dtype: np.dtype[Any]) -> Bits:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)


def _filled(there: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """Groups in which exactly ``count`` places are marked: the first of the others where there are fewer."""
    missing = count - np.count_nonzero(there, axis=1)
    few = np.flatnonzero(missing)
    if len(few):
        some, left = there[few], missing[few]
        for place in range(there.shape[1]):
            add = ~some[:, place] & (left > 0)
            some[add, place] = True
            left -= add
        there[few] = some
    return there
