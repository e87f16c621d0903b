"""Reading ahead: the next place comes from the disk while the present one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from secateur.families import Block

Read = TypeVar("Read")
Place = TypeVar("Place", bound=Block)


def ahead(read: Callable[[Place], Read], places: Iterable[Place]) -> Iterator[tuple[Place, Read]]:
    """Every place with what was read of it, the next one being read while the present one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        waiting: deque[tuple[Place, Future[Read]]] = deque()
        for place in places:
            waiting.append((place, reader.submit(read, place)))
            if len(waiting) > 1:
                before, found = waiting.popleft()
                yield before, found.result()
        for before, found in waiting:
            yield before, found.result()


def to_send(read: Callable[[Block], dict[str, Tensor]], device: torch.device) -> Callable[[Block], dict[str, Tensor]]:
    """What ``read`` gives, where it is to go to a GPU in memory that the GPU copies from by itself."""
    if device.type != "cuda":
        return read
    return lambda place: {name: tensor.pin_memory() for name, tensor in read(place).items()}
