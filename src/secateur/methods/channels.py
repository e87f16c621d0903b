"""What a method for any network is: options, and up to three pure functions of the network's graph and numbers.

``score(study)`` gives one number for every unit, ``decide(study, target, choose)`` says which go, and
``mend(study, units)`` gives new values to what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets.channels import Ranking, Units
from secateur.budgets.targets import Target
from secateur.errors import refuse
from secateur.evidence.batches import Example
from secateur.evidence.losses import Loss
from secateur.graph.following import silent
from secateur.graph.host import Batch, Host
from secateur.graph.spaces import ChannelSpace, Graph
from secateur.mends.absorbing import absorbed
from secateur.mends.folding import Folding
from secateur.mends.readers import Mender
from secateur.methods.base import Data, Fraction, Named


@dataclass(frozen=True)
class ChannelStudy:
    """What a method may look at.

    Attributes:
        graph: the network's coupled channels.
        spaces: those that may be cut.
        host: the network with its numbers; it can be run, and others made of it, but not changed.
        generator: the only source of randomness.
        example: inputs that it was recorded on.
        batches: calibration data, which may be read again and again; None where none was given.
        losses: by name; one where no other was given: the cross-entropy of one output. Each takes the outputs as the
            network returns them, and the labels.
        gone: units that are silent already.
        notes: what a method says of how it decided; part of the result.
    """

    graph: Graph
    spaces: Sequence[ChannelSpace]
    host: Host
    generator: torch.Generator
    example: Batch
    batches: Iterable[Example] | None = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    gone: Units = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def tensor(self) -> Callable[[str], Tensor]:
        """A parameter or buffer by name."""
        return self.host.tensor

    def data(self) -> Iterable[Example]:
        """The calibration data.

        Raises:
            RequestError: there is none.
        """
        if self.batches is None:
            refuse("no-data", "calibration", "no data was given", "data=[batch, ...], each like example_inputs")
        return self.batches

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """All losses together."""
        return torch.stack([loss(outputs, labels) for loss in self.losses.values()]).sum()

    def silenced(self, units: Units) -> Self:
        """The same network without some more units: zeros wherever anything of them lies."""
        together = {name: sorted({*self.gone.get(name, ()), *units.get(name, ())}) for name in (*self.gone, *units)}
        found = silent(self.host, self.graph, self.graph.gone(together))
        return replace(self, host=self.host.with_tensors(found), gone=together)


Mending = Literal["none", "absorb", "recalibrate", "least-squares", "fold"]


class Choose(Protocol):
    """The choice of the units with the lowest scores, as many as a target asks for."""

    def __call__(self, scores: Mapping[str, Tensor], target: Target, way: float = 1.0) -> Units:
        """Units that go.

        Args:
            scores: see :meth:`GraphMethod.score`.
            target: what shall remain.
            way: how much of the way from the whole network to the target; before its end the nearest size will do.
        """


class GraphMethod(Named):
    """Base of every method for any network; its fields are its options and their schema.

    Class attributes:
        data: what must be given: nothing, ``inputs``, or ``labels``, pairs of inputs and labels, for its loss.
    """

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

    mending: Mending = Field(
        "none",
        description="how what stays makes up for what goes: not at all; biases take over what is lost on average "
        "(absorb: its shifts, or with data its means); batch norms take their statistics on the data (recalibrate); "
        "readers are refitted on the data (least-squares); readers take combinations of the channels that stay, by the "
        "weights alone (fold)",
    )

    @property
    def data(self) -> Data:  # type: ignore[override]
        return "inputs" if self.mending in ("recalibrate", "least-squares") else "none"

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """One number for each unit of ``study.spaces``, by name of the space; higher = keep."""
        raise NotImplementedError

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        """Units that go; asked again, with fewer spaces, where some turn out not to be cut together."""
        return choose(self.score(study), target)

    def mend(self, study: ChannelStudy, units: Units) -> dict[str, Tensor]:
        """New values, by name and in full size, of tensors of which something stays; what goes is cut off afterwards.

        Args:
            study: the uncut network.
            units: what goes.
        """
        gone = study.graph.gone(units)
        if self.mending == "fold":
            return Folding(study.host, study.graph, units).restore()
        if self.mending == "absorb":
            batches = None if study.batches is None else [example.inputs for example in study.batches]
            return absorbed(study.host, study.graph, gone, batches, study.example)
        if self.mending == "none":
            return {}
        refit = self.mending == "least-squares"
        mender = Mender(study.host, study.graph, gone, readers=refit, norms="own")
        return mender.mend([example.inputs for example in study.data()])
