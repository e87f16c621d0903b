"""Tensors that together may be larger than memory: made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from secateur.families import Block


class PlaceAtATime(Mapping[str, Tensor]):
    """Tensors by name, those of a place made when one of them is asked for; only those of the last place stay.

    Args:
        names: by place.
        make: loads or computes those of one place.
    """

    def __init__(self, names: Mapping[Block, Sequence[str]], make: Callable[[Block], Mapping[str, Tensor]]) -> None:
        self._places = {name: place for place, of in names.items() for name in of}
        self._make = make
        self._last: tuple[Block, Mapping[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        if self._last is None or self._last[0] != place:
            self._last = (place, self._make(place))
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class OneAtATime(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for; only the last one stays.

    Args:
        names: in their order.
        make: loads or computes one of them.
    """

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._known, self._make = names, frozenset(names), make
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, self._make(name))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Renamed(Mapping[str, Tensor]):
    """The tensors of a mapping under other names, each loaded when it is asked for.

    Args:
        tensors: by their own names.
        name: the other one of each.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: Callable[[str], str]) -> None:
        self._tensors, self._own = tensors, {name(own): own for own in tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._own[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
