"""Which entries are kept, in few bytes: bit masks, coded gaps between indices, masks that a seed repeats.

All functions are plain and exact inverses of one another. Indices are sorted and distinct, below ``size``; codes are
bytes. The gaps between indices are geometric when the entries are kept independently of one another, and a Rice code
of them is then within a few hundredths of a bit per entry of the entropy (Golomb 1966, Rice 1971).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Code = NDArray[np.uint8]
Coding = Literal["all", "bits", "gaps"]


# -- a bit for every entry ---------------------------------------------------------------------------------------------


def pack_bits(indices: Indices, size: int) -> Code:
    """A bit mask of ``size`` entries, most significant bit first."""
    mask = np.zeros(size, np.uint8)
    mask[indices] = 1
    return np.packbits(mask)


def unpack_bits(code: Code, size: int) -> Indices:
    """The inverse of :func:`pack_bits`."""
    return np.flatnonzero(np.unpackbits(code, count=size)).astype(np.int64)


# -- gaps between entries ----------------------------------------------------------------------------------------------


def rice_bits(gaps: Indices, low: int) -> int:
    """Length in bits of gaps whose ``low`` lowest bits are written as they are, the rest in unary."""
    return int((gaps >> low).sum()) + len(gaps) * (1 + low)


def gaps_of(indices: Indices) -> Indices:
    """How many entries lie between each index and the one before."""
    return np.diff(indices, prepend=-1) - 1


def best_low(gaps: Indices) -> int:
    """The number of low bits that makes the code shortest."""
    middle = int(math.log2(max(1.0, float(gaps.mean()) if len(gaps) else 1.0)))
    return min(range(max(0, middle - 2), middle + 3), key=lambda low: rice_bits(gaps, low))


def pack_gaps(indices: Indices) -> tuple[Code, int]:
    """Rice code of the gaps between indices.

    The unary parts come first (a run of zeros and a one for each), the low bits behind them, plane by plane.

    Returns:
        The code and the number of low bits.
    """
    gaps = gaps_of(indices)
    low = best_low(gaps)
    ends = np.cumsum((gaps >> low) + 1) - 1
    unary = pack_bits(ends, int(ends[-1]) + 1 if len(ends) else 0)
    planes = [np.packbits(((gaps >> bit) & 1).astype(np.uint8)) for bit in range(low)]
    return np.concatenate([unary, *planes]), low


def unpack_gaps(code: Code, count: int, low: int) -> Indices:
    """The inverse of :func:`pack_gaps`, given how many indices there are.

    Raises:
        ValueError: the code is not one of so many indices.
    """
    plane = -(-count // 8)
    head = len(code) - low * plane
    if head < 0 or low < 0:
        raise ValueError(f"a code of {len(code)} bytes for {count} indices")
    ends = np.flatnonzero(np.unpackbits(code[:head])).astype(np.int64)
    if len(ends) != count:
        raise ValueError(f"{len(ends)} indices where {count} were announced")
    gaps = (np.diff(ends, prepend=-1) - 1) << low
    for bit in range(low):
        start = head + bit * plane
        gaps |= np.unpackbits(code[start : start + plane], count=count).astype(np.int64) << bit
    return np.cumsum(gaps + 1) - 1


# -- whichever is smaller ----------------------------------------------------------------------------------------------


def pack_indices(indices: Indices, size: int) -> tuple[Coding, Code, dict[str, Any]]:
    """The shortest code of a set of indices, its name, and what else is needed to read it."""
    if len(indices) == size:
        return "all", np.zeros(0, np.uint8), {}
    code, low = pack_gaps(indices)
    if len(code) < -(-size // 8):
        return "gaps", code, {"low": low}
    return "bits", pack_bits(indices, size), {}


def unpack_indices(coding: str, code: Code, size: int, count: int, low: int = 0) -> Indices:
    """The inverse of :func:`pack_indices`.

    Raises:
        ValueError: the code does not hold ``count`` indices below ``size``.
    """
    if coding == "all":
        found = np.arange(size, dtype=np.int64)
    elif coding == "gaps":
        found = unpack_gaps(code, count, low)
    elif coding == "bits" and len(code) == -(-size // 8):
        found = unpack_bits(code, size)
    else:
        raise ValueError(f"{len(code)} bytes of coding {coding!r} for {size} entries")
    if len(found) != count or (count and not 0 <= found[-1] < size):
        raise ValueError(f"{len(found)} indices, up to {found[-1] if len(found) else -1}, for {count} of {size}")
    return found


# -- masks that a seed repeats -----------------------------------------------------------------------------------------


def seed_for(seed: int, name: str) -> int:
    """The seed of one tensor's mask: 48 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "little")


def random_indices(size: int, count: int, seed: int) -> Indices:
    """``count`` of ``size`` indices, all subsets as likely, the same on every machine.

    Every index draws 32 bits from PCG64's raw stream, which numpy guarantees not to change; the smallest are kept, the
    first of equals first.
    """
    if count >= size:
        return np.arange(size, dtype=np.int64)
    if count <= 0:
        return np.zeros(0, np.int64)
    raw = np.random.PCG64(seed).random_raw(-(-size // 2)).astype("<u8", copy=False)
    keys = raw.view("<u4")[:size]
    last = np.partition(keys, count - 1)[count - 1]
    kept = np.flatnonzero(keys < last)
    equal = np.flatnonzero(keys == last)[: count - len(kept)]
    return np.sort(np.concatenate([kept, equal])).astype(np.int64)
