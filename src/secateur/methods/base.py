"""What a method is: options, and up to three pure functions on data it is handed.

``sizes(budget)`` says what would remain, ``score(view, evidence)`` summarises one place, ``decide(study)`` makes the
plan. A method never opens a file, never touches a device, never knows the command line or another method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.families import Block, Layout, Sizes
from secateur.plans import Artifact, Plan
from secateur.spaces import BlockView, Kind, Space, all_spaces

Output = Literal["dense", "dense-per-layer", "zeros", "factors", "runtime", "index"]
Fraction = Annotated[float, Field(gt=0, lt=1)]

WORTH: Mapping[Output, str] = {
    "dense": "a stock checkpoint, smaller and faster everywhere",
    "dense-per-layer": "a checkpoint whose layers differ, loaded with the bundled modelling file",
    "zeros": "zeros in place: the same size unless packed or run sparse",
    "factors": "factored matrices",
    "runtime": "a policy that acts at run time",
    "index": "an index list",
}


def worth(output: Output, layout: Layout) -> str:
    """Kind of the output and what it is worth; layers that differ make a dense one per-layer."""
    kind: Output = "dense-per-layer" if output == "dense" and layout == "per-layer" else output
    return f"{kind}: {WORTH[kind]}"


@dataclass
class Study:
    """What a decision may look at.

    Attributes:
        budget: the request; solves sizes.
        generator: the only source of randomness.
        view: loads the tensors of a place, of some roles only.
        summaries: what ``score`` returned, by name, in the order of the places; loaded on access.
        artifacts: what the method's ``files`` named, loaded.
        progress: report (done, of, what) of a long decision.
    """

    budget: Budget
    generator: torch.Generator
    view: Callable[[Block, tuple[str, ...] | None], BlockView]
    summaries: Mapping[str, Iterable[Tensor]] = field(default_factory=dict)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    progress: Callable[[int, int, str], None] = lambda *_: None

    def spaces(self, kind: Kind) -> list[Space]:
        """All spaces of a kind, in the order of the blocks."""
        return all_spaces(self.budget.sizes, kind)


class Method(BaseModel):
    """Base of every method; its fields are its options and their schema.

    Class attributes:
        name, title, paper: identity and source.
        data: whether calibration text is needed.
        evidence: statistics the engine gathers for ``score``: ``stream`` is the Gram of every norm's input.
        output: what kind of result it writes.
        ours: set where the method or a variant is Secateur's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    data: ClassVar[Literal["none", "text"]] = "none"
    evidence: ClassVar[frozenset[str]] = frozenset()
    output: ClassVar[Output] = "dense"

    sparsity: Fraction | None = Field(
        None, description="share of the units of the cut space to remove (the paper's own knob), instead of --ratio"
    )

    @property
    def cuts(self) -> Kind:
        """Kind of the units that go."""
        return "ffn"

    @property
    def roles(self) -> tuple[str, ...] | None:
        """Roles whose tensors ``score`` reads; None for all, empty for none."""
        return ()

    def in_layout(self, layout: Layout) -> Self:
        """This method with the options that follow from the layout of the output."""
        return self

    def files(self) -> dict[str, str]:
        """Artifacts of earlier runs that the options name: paths by name, loaded by the engine."""
        return {}

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes that would remain."""
        return self._solve(budget, self.cuts)

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summaries of one place, most often one number per unit of a space, higher = keep."""
        return {}

    def decide(self, study: Study) -> Plan:
        """The plan, given all summaries."""
        raise NotImplementedError

    def _solve(self, budget: Budget, kind: Kind, base: Sizes | None = None) -> Sizes:
        if self.sparsity is None:
            return budget.solve(kind, base)
        return budget.at(kind, int((1 - self.sparsity) * budget.sizes.size(kind)), base)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
