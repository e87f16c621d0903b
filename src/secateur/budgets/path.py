"""A sequence of sizes, from small to large, that is searched by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from secateur.families import Sizes


class SizesPath(Sequence[Sizes]):
    """Sizes computed when they are asked for."""

    def point(self, index: int) -> Sizes:
        """The sizes at one position, from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Sizes: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sizes]: ...
    def __getitem__(self, index: int | slice) -> Sizes | list[Sizes]:
        every = range(len(self))
        return [self.point(i) for i in every[index]] if isinstance(index, slice) else self.point(every[index])
