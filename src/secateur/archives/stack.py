"""A stack of bits: bytes go on it as they are, numbers of a known distribution can be taken off it and put back.

The coder is an asymmetric numeral system (package ``constriction``): last in, first out, within 64 bits of the
information content in all. All distributions are given as multiples of 2^-16, so that every machine makes the same
integers of them.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from secateur.errors import refuse

Symbols = NDArray[np.int32]
_UNIT: Final = 2**16
_RARE: Final = 512  # of 2^16: how probable an event is that is expected to be rare
CELLS: Final = 32
"""Cells of a standardised Gaussian variable: quarters of a standard deviation from -4 to 4."""


def require_coder() -> None:
    """Refuse to begin without the entropy coder."""
    if importlib.util.find_spec("constriction") is None:
        asked, found = "a bits-back archive", "constriction, the entropy coder, is not installed"
        refuse("no-coder", asked, found, "pip install 'secateur[entropy]'")


def _gaussian() -> NDArray[np.float64]:
    """Probabilities of the cells; the tails belong to the outermost."""
    edges = [(cell - CELLS // 2) / 4 for cell in range(1, CELLS)]
    below = [0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0]
    counts = np.maximum(np.rint(np.diff(below) * _UNIT), 1)
    counts[CELLS // 2] += _UNIT - counts.sum()
    return counts / _UNIT


class Stack:
    """The stack.

    Args:
        words: what ``words`` gave; empty when omitted.
    """

    def __init__(self, words: NDArray[np.uint32] | None = None) -> None:
        import constriction

        stream = constriction.stream
        self._models: Any = stream.model
        self._coder: Any = stream.stack.AnsCoder() if words is None else stream.stack.AnsCoder(words)
        self._cell = self._models.Categorical(_gaussian(), perfect=False)
        self._event = self._models.Categorical(np.array([_UNIT - _RARE, _RARE]) / _UNIT, perfect=False)

    @property
    def words(self) -> NDArray[np.uint32]:
        """All that is on it."""
        found: NDArray[np.uint32] = self._coder.get_compressed()
        return found

    @property
    def bits(self) -> int:
        """How much is on it."""
        return int(self._coder.num_valid_bits())

    def copy(self) -> Self:
        """Another with the same content."""
        twin = type(self)()
        twin._coder = self._coder.clone()
        return twin

    # -- bytes -----------------------------------------------------------------------------------------------------

    def push_bytes(self, data: NDArray[np.uint8]) -> None:
        """Put bytes on it, mixed with a fixed pseudo-random stream: what is taken off as numbers shall look random."""
        mixed = data ^ _noise(data.size)
        even = mixed.size // 2 * 2
        self._coder.encode_reverse(mixed[even:].astype(np.int32), self._models.Uniform(2**8))
        self._coder.encode_reverse(mixed[:even].view("<u2").astype(np.int32), self._models.Uniform(2**16))

    def pop_bytes(self, count: int) -> NDArray[np.uint8]:
        """Take ``count`` bytes off it."""
        pairs = self._coder.decode(self._models.Uniform(2**16), count // 2).astype("<u2").view(np.uint8)
        rest = self._coder.decode(self._models.Uniform(2**8), count % 2).astype(np.uint8)
        return np.concatenate([pairs, rest]) ^ _noise(count)

    # -- numbers ---------------------------------------------------------------------------------------------------

    def push_uniform(self, symbols: Symbols, size: int) -> None:
        """Numbers below ``size``, all as likely."""
        if size > 1:
            self._coder.encode_reverse(symbols, self._models.Uniform(size))

    def pop_uniform(self, count: int, size: int) -> Symbols:
        """The inverse of ``push_uniform``."""
        if size == 1:
            return np.zeros(count, np.int32)
        found: Symbols = self._coder.decode(self._models.Uniform(size), count)
        return found

    def push_cells(self, symbols: Symbols) -> None:
        """Cells of standardised Gaussian variables."""
        self._coder.encode_reverse(symbols, self._cell)

    def pop_cells(self, count: int) -> Symbols:
        """The inverse of ``push_cells``."""
        found: Symbols = self._coder.decode(self._cell, count)
        return found

    def push_events(self, happened: NDArray[np.bool_]) -> None:
        """Rare events."""
        self._coder.encode_reverse(happened.astype(np.int32), self._event)

    def pop_events(self, count: int) -> NDArray[np.bool_]:
        """The inverse of ``push_events``."""
        return np.asarray(self._coder.decode(self._event, count)).astype(bool)


def _noise(count: int) -> NDArray[np.uint8]:
    raw = np.random.PCG64(0).random_raw(-(-count // 8)).astype("<u8")
    return raw.view(np.uint8)[:count]
