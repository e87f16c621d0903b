"""Failures of linear algebra inside a method, said with the place at which they happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from secateur.errors import refuse
from secateur.families import Block
from secateur.scores.ridge import NoSolutionError


@contextmanager
def solving(what: str, *place: Block) -> Iterator[None]:
    """Refuse by name what a method could not compute of a place.

    Args:
        what: it does there, e.g. ``"mending"``.
        place: block index, or None for the stem; left out of what concerns all of them.
    """
    try:
        yield
    except (NoSolutionError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        said = " ".join(str(error).split())
        where = ["the stem" if each is None else f"block {each}" for each in place]
        refuse("not-solvable", " ".join([what, *where]), said, "give it more calibration text, or another method")
