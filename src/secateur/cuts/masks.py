"""Which weights of a matrix stay: the best by their scores, in groups and patterns, in exact numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Final, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional

Group = Literal["row", "matrix"]
_FEW: Final = 16  # of a group, to be compared one with the other
_SPELLED: Final = re.compile(r"(?P<first>[1-9]\d{0,3})(?P<sign>[:x])(?P<second>[1-9]\d{0,3})")


@dataclass(frozen=True)
class Pattern:
    """The shape in which weights go.

    Attributes:
        kept, of: at most ``kept`` of every ``of`` consecutive inputs of a row stay (N:M); 0 without such a rule.
        rows, columns: the block of weights that goes or stays together.
    """

    kept: int = 0
    of: int = 0
    rows: int = 1
    columns: int = 1

    @property
    def fixed(self) -> bool:
        """Whether the pattern says by itself how many weights stay."""
        return self.of > 0

    def count(self, shape: tuple[int, ...]) -> int:
        """Weights of a matrix of a shape [out, in] that an N:M pattern keeps."""
        whole, rest = divmod(shape[1], self.of)
        return shape[0] * (whole * self.kept + min(rest, self.kept))


@cache
def parse_pattern(text: str) -> Pattern:
    """``element``, ``N:M`` (N of every M consecutive inputs stay) or ``RxC`` (blocks of R outputs by C inputs).

    Raises:
        ValueError: none of them.
    """
    if text == "element":
        return Pattern()
    found = _SPELLED.fullmatch(text)
    if found is None:
        raise ValueError("neither element, nor N:M as in 2:4, nor RxC as in 16x16")
    first, second = int(found["first"]), int(found["second"])
    if found["sign"] == "x":
        return Pattern(rows=first, columns=second)
    if first >= second:
        raise ValueError(f"{first} of {second} inputs is all of them: N must be below M")
    return Pattern(first, second)


def _checked(text: str) -> str:
    parse_pattern(text)
    return text


PatternName = Annotated[str, AfterValidator(_checked)]


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor with zeros where its mask is False."""
    return tensor.masked_fill(~mask.to(tensor.device), 0)


def best(scores: Tensor, count: int, group: Group = "matrix", pattern: Pattern = Pattern()) -> Tensor:
    """The mask of the weights with the highest scores.

    Of equal scores the first stays, so that no threshold removes more than was asked for.

    Args:
        scores: one per weight, [out, in].
        count: how many stay; to within one block where blocks go together. An N:M pattern knows better.
        group: what the weights compete in: a row, every one of which keeps as many (those left over go to the rows
            that lose most without them), or the matrix.
        pattern: the shape in which they go.

    Returns:
        bool, [out, in].
    """
    if pattern.fixed:
        return _n_of_m(scores, pattern)
    if pattern.rows * pattern.columns > 1:
        return _blocks(scores, count, pattern)
    return _by_row(scores, count) if group == "row" else _first(scores.flatten(), count).view(scores.shape)


def _first(scores: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` highest of [n] or of every row of [..., n]; of equal ones the first."""
    size = scores.shape[-1]
    if not 0 < count < size:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = scores.kthvalue(size - count + 1, dim=-1, keepdim=True).values
    above, ties = scores > least, scores == least
    return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _by_row(scores: Tensor, count: int) -> Tensor:
    each, more = divmod(count, len(scores))
    mask = _first(scores, each)
    if more:
        following = scores.masked_fill(mask, -torch.inf).max(-1)
        rows = _first(following.values, more).nonzero().flatten()
        mask[rows, following.indices[rows]] = True
    return mask


def _n_of_m(scores: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = scores.shape
    # a group that the row's end cuts short has fewer to choose from
    padded = functional.pad(scores, (0, -columns % pattern.of), value=-torch.inf)
    groups = padded.view(rows, -1, pattern.of)
    mask = _first(groups, pattern.kept) if pattern.of > _FEW else _before_the_others(groups, pattern.kept)
    return mask.view(rows, -1)[:, :columns]


def _before_the_others(scores: Tensor, count: int) -> Tensor:
    """What ``_first`` gives, of rows of a few: each compared with all others, several times as fast."""
    columns = scores.unbind(-1)
    behind = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]  # how many come first
    for j, later in enumerate(columns):
        for i, earlier in enumerate(columns[:j]):
            loses = later > earlier
            behind[i] += loses
            behind[j] += ~loses
    return torch.stack([place < count for place in behind], -1)


def _blocks(scores: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Blocks by their mean score, the best first, until as many weights stay as come nearest to ``count``."""
    rows, columns = scores.shape
    window = (pattern.rows, pattern.columns)
    padding = (0, -columns % pattern.columns, 0, -rows % pattern.rows)
    tall = functional.pad(scores.double(), padding)[None, None]
    there = functional.pad(torch.ones_like(scores, dtype=torch.float64), padding)[None, None]
    sums, sizes = (functional.avg_pool2d(each, window, divisor_override=1)[0, 0] for each in (tall, there))
    order = torch.sort((sums / sizes).flatten(), descending=True, stable=True).indices
    reached = sizes.flatten()[order].cumsum(0)
    reached = torch.cat([reached.new_zeros(1), reached])
    kept = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    kept[order[: int((reached - count).abs().argmin())]] = True
    wide = kept.view(sums.shape).repeat_interleave(window[0], 0).repeat_interleave(window[1], 1)
    return wide[:rows, :columns]
