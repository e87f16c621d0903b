"""What a method for any network is: options, and one number for every unit of every space of its graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets.channels import Ranking
from secateur.graph.spaces import ChannelSpace, Graph
from secateur.methods.base import Fraction, Named


@dataclass(frozen=True)
class ChannelStudy:
    """What a method may look at.

    Attributes:
        graph: the network's coupled channels.
        spaces: those that may be cut.
        tensor: a parameter or buffer of the uncut module by name.
        generator: the only source of randomness.
    """

    graph: Graph
    spaces: Sequence[ChannelSpace]
    tensor: Callable[[str], Tensor]
    generator: torch.Generator


class GraphMethod(Named):
    """Base of every method for any network; its fields are its options and their schema."""

    group: ClassVar[str] = "graph"

    ranking: Ranking = Field(
        "global", description="what a unit competes with: all others, those of spaces alike, those of its own space"
    )
    floor: Fraction = Field(0.05, description="share of its units that every space keeps, and at least one")
    quantum: int = Field(1, ge=1, description="what stays of a cut space is a multiple of it")
    statistics: Literal["keep", "change"] = Field(
        "keep",
        description="whether spaces may be cut over which a layer or group norm takes mean and variance: those of what "
        "stays, then",
    )

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """One number for each unit of ``study.spaces``, by name of the space; higher = keep."""
        raise NotImplementedError
