"""One ranking of the weights of many matrices, which are read one after the other: exact, in two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import refuse

_BINS: Final = 2**16
Named = Iterable[tuple[str, Tensor]]


def ranked_counts(scores: Callable[[], Named], total: int) -> dict[str, int]:
    """How many of every matrix are among the ``total`` highest scores of all.

    Scores are compared as float32. Of equal ones at the threshold the first matrices' stay. The threshold is found by
    the upper and then the lower halves of the numbers' bits, so no more than one matrix is held.

    Args:
        scores: gives all matrices and their scores, each time it is called.
        total: weights that stay.

    Raises:
        RequestError: a score is not a number.
    """
    upper = {name: _histogram(_keys(name, each) >> 16) for name, each in scores()}
    first, above = _reached(sum(upper.values(), np.zeros(_BINS, np.int64)), total)
    lower = {}
    for name, each in scores():
        keys = _keys(name, each)
        lower[name] = _histogram(keys[keys >> 16 == first] & (_BINS - 1))
    second, more = _reached(sum(lower.values(), np.zeros(_BINS, np.int64)), total - above)
    ties, counts = total - above - more, {}
    for name in upper:
        at = min(ties, int(lower[name][second]))
        counts[name] = int(upper[name][first + 1 :].sum() + lower[name][second + 1 :].sum()) + at
        ties -= at
    return counts


def _keys(name: str, scores: Tensor) -> NDArray[np.uint32]:
    """Integers in the order of the float32 numbers."""
    values = scores.detach().cpu().flatten().float().numpy() + np.float32(0)  # -0 becomes 0
    if np.isnan(values).any():
        refuse("not-finite", f"scores of {name}", "some are no numbers", "look at the checkpoint and the data")
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31)).astype(np.uint32)


def _histogram(keys: NDArray[Any]) -> NDArray[np.int64]:
    return np.bincount(keys, minlength=_BINS)


def _reached(histogram: NDArray[np.int64], total: int) -> tuple[int, int]:
    """The bin, counted from the top, in which the sum reaches ``total``, and the sum above it."""
    sums = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(sums, max(total, 1)))
    place = min(place, _BINS - 1)
    above = 0 if place == 0 else int(sums[place - 1])
    return _BINS - 1 - place, above
