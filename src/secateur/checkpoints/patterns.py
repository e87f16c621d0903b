"""Numbers in few bits: fields of any width, and the places of N things among M as one number.

Of the C(M, N) ways to choose N places among M, the one p_1 < ... < p_N has the number sum_i C(p_i, i) (the
combinatorial number system). Several such numbers together need fewer bits than each alone: they are the digits of
one number in base C(M, N).
"""

from __future__ import annotations

from functools import cache
from math import comb, lgamma, log, log2

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_FIELDS = 2**16  # worked on at a time; a multiple of 8, so that a piece ends with a whole byte
_TABLE = 2**16  # patterns of which a table is made
_WIDEST = 63  # bits of a field


def information_bits(size: int, count: int) -> float:
    """log2 of the number of ways to choose ``count`` of ``size``: what an arbitrary set costs at least."""
    if not 0 < count < size:
        return 0.0
    return (lgamma(size + 1) - lgamma(count + 1) - lgamma(size - count + 1)) / log(2)


def pack_fields(values: NDArray[np.generic], width: int) -> Bytes:
    """Unsigned integers below 2^width one after the other, the highest bit first; the last byte is filled with 0."""
    found = np.empty(-(-len(values) // 8) * width, np.uint8)  # eight fields fill ``width`` bytes
    for start in range(0, len(values), _FIELDS):
        piece = values[start : start + _FIELDS]
        wide = np.zeros((-(-len(piece) // 8), 8), np.uint64)
        wide.reshape(-1)[: len(piece)] = piece
        rows = np.zeros((len(wide), width), np.uint8)
        for field, byte, shift in _overlaps(width):
            part = wide[:, field] >> np.uint64(shift) if shift >= 0 else wide[:, field] << np.uint64(-shift)
            rows[:, byte] |= part.astype(np.uint8)
        found[start // 8 * width :][: rows.size] = rows.reshape(-1)
    return found[: field_bytes(len(values), width)]


def unpack_fields(packed: Bytes, width: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` integers of ``pack_fields``.

    Raises:
        ValueError: there are bytes too few or too many, or what fills the last one is not 0.
    """
    if len(packed) != field_bytes(count, width):
        raise ValueError(f"{len(packed)} bytes for {count} fields of {width} bits")
    if (spare := len(packed) * 8 - count * width) and packed[-1] & ((1 << spare) - 1):
        raise ValueError("bits behind the last field")
    found, mask = np.empty(count, np.uint64), np.uint64((1 << width) - 1)
    for start in range(0, count, _FIELDS):
        number = min(_FIELDS, count - start)
        rows = np.zeros((-(-number // 8), width), np.uint8)
        piece = packed[start // 8 * width :][: rows.size]
        rows.reshape(-1)[: len(piece)] = piece
        wide = np.zeros((len(rows), 8), np.uint64)
        for field, byte, shift in _overlaps(width):
            part = rows[:, byte].astype(np.uint64)
            wide[:, field] |= part << np.uint64(shift) if shift >= 0 else part >> np.uint64(-shift)
        found[start : start + number] = (wide & mask).reshape(-1)[:number]
    return found


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """Which of eight fields shares bits with which of their bytes, and by how much the byte is higher in the field."""
    return [
        (field, byte, (field + 1) * width - (byte + 1) * 8)
        for field in range(8)
        for byte in range(field * width // 8, -(-(field + 1) * width // 8))
    ]


def field_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` fields."""
    return -(-count * width // 8)


def digits_of(base: int) -> tuple[int, int]:
    """How many numbers below ``base`` go into one field, and the width of the field: the fewest bits per number."""
    each = log2(base)
    most = max(1, int(_WIDEST / each)) if base > 1 else 1
    choices = [(g, max(1, (base**g - 1).bit_length())) for g in range(1, most + 1)]
    return min((c for c in choices if c[1] <= _WIDEST), key=lambda c: (c[1] / c[0], c[0]))


def pattern_bytes(groups: int, keep: int, of: int) -> int:
    """Bytes that say in each of ``groups`` which ``keep`` of ``of`` are there."""
    together, width = digits_of(comb(of, keep))
    return field_bytes(-(-groups // together), width)


def rank(places: NDArray[np.integer], of: int) -> NDArray[np.uint64]:
    """Number of every row of ascending places.

    Args:
        places: [groups, N], each below ``of``.
    """
    table = _binomials(of, places.shape[1])
    found = np.zeros(len(places), np.uint64)
    for i in range(places.shape[1]):
        found += table[i + 1][places[:, i]]
    return found


def unrank(numbers: NDArray[np.uint64], keep: int, of: int) -> NDArray[np.uint8]:
    """The places [groups, ``keep``] that have these numbers.

    Raises:
        ValueError: a number is too large.
    """
    if len(numbers) and int(numbers.max()) >= comb(of, keep):
        raise ValueError(f"a pattern that is none of {keep} among {of}")
    if comb(of, keep) <= _TABLE:
        return _every(keep, of)[numbers]
    return _unrank(numbers, keep, of)


@cache
def _every(keep: int, of: int) -> NDArray[np.uint8]:
    """All patterns in the order of their numbers."""
    return _unrank(np.arange(comb(of, keep), dtype=np.uint64), keep, of)


def _unrank(numbers: NDArray[np.uint64], keep: int, of: int) -> NDArray[np.uint8]:
    table, left = _binomials(of, keep), numbers.copy()
    found = np.empty((len(numbers), keep), np.uint8)
    for i in range(keep - 1, -1, -1):
        at = np.searchsorted(table[i + 1], left, side="right") - 1
        found[:, i] = at
        left -= table[i + 1][at]
    return found


def _binomials(of: int, keep: int) -> NDArray[np.uint64]:
    """C(p, i) at [i, p]."""
    return np.array([[comb(p, i) for p in range(of)] for i in range(keep + 1)], np.uint64)


def pack_digits(numbers: NDArray[np.uint64], base: int) -> Bytes:
    """Numbers below ``base``, several to a field, the first of them the lowest digit."""
    together, width = digits_of(base)
    fields = -(-len(numbers) // together)
    padded = np.zeros((fields, together), np.uint64)
    padded.reshape(-1)[: len(numbers)] = numbers
    joined = np.zeros(fields, np.uint64)
    for column in range(together - 1, -1, -1):
        joined = joined * np.uint64(base) + padded[:, column]
    return pack_fields(joined, width)


def unpack_digits(packed: Bytes, base: int, count: int) -> NDArray[np.uint64]:
    """The first ``count`` numbers of ``pack_digits``.

    Raises:
        ValueError: they are not what ``pack_digits`` gives.
    """
    together, width = digits_of(base)
    left = unpack_fields(packed, width, -(-count // together))
    found = np.empty((len(left), together), np.uint64)
    for column in range(together):
        left, found[:, column] = np.divmod(left, np.uint64(base))
    flat = found.reshape(-1)
    if left.any() or flat[count:].any():
        raise ValueError("digits behind the last number")
    return flat[:count]
