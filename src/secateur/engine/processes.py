"""Several processes that share the calibration data of a run; here what all code sees of them, and the case of one.

The first process leads: it plans, decides and writes as if it were alone. What its share of the data goes through
happens *everywhere*: a method of a :class:`Shared` object that is called in the first process is called with the same
arguments in every other one (:mod:`secateur.engine.team`), each on its own windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from secateur.engine.activations import stored
from secateur.evidence import Later, Total


class Processes:
    """One process alone: nothing is shared.

    Attributes:
        rank: which process this is, the first being 0.
        count: of all.
    """

    rank, count = 0, 1

    @property
    def part(self) -> tuple[int, int]:
        return self.rank, self.count

    def begin(self, work: Path, device: torch.device, model: str) -> None:
        """Go to work: others learn what they must have in common.

        Args:
            work: the work folder.
            device: of this process.
            model: digest of the model that it reads.
        """

    def end(self, result: Mapping[str, Any]) -> None:
        """Let the other processes go, with what came out."""

    def opened(self, shared: Shared, kind: str, arguments: dict[str, Any]) -> int:
        """Let an object of a kind be everywhere; returns its number."""
        del shared, kind, arguments
        return 0

    def order(self, shared: Shared, method: str, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        """Let every other process call a method of its counterpart of an object."""

    def combine(self, totals: Sequence[Total]) -> None:
        """Let the totals of the first process be those of all shards, added in their order."""

    def gather(self, content: Any) -> list[Any]:
        """What the processes behind the first one say, there and in their order; nothing elsewhere."""
        del content
        return []

    def folder(self, leaders: Path) -> Path:
        """Where this process keeps what the first one keeps in a folder."""
        return leaders

    def later(self, path: Path) -> Later | None:
        """What keeps the sums of shards until those before them come; None in the first process."""
        if not self.rank:
            return None
        kept = 0

        def keep(running: Tensor) -> Tensor:
            nonlocal kept
            kept += 1
            place = stored(path.with_suffix(f".{kept}.sum"), tuple(running.shape), running.dtype)
            return place.copy_(running)

        return keep


ALONE: Final = Processes()


class Shared:
    """An object that every process has one of.

    Attributes:
        processes: those that have.
        number: under which they know it.
    """

    processes: Processes
    number: int


Self = TypeVar("Self", bound=Shared)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def everywhere(
    method: Callable[Concatenate[Self, Arguments], Result],
) -> Callable[Concatenate[Self, Arguments], Result]:
    """A method that is called in every process when it is called in the first.

    Its arguments are tensors, plain values and lists and dictionaries of them. What it returns elsewhere is dropped.
    """

    @wraps(method)
    def call(self: Self, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        self.processes.order(self, method.__name__, arguments, options)
        return method(self, *arguments, **options)

    call.everywhere = True  # type: ignore[attr-defined]
    return cast(Callable[Concatenate[Self, Arguments], Result], call)
