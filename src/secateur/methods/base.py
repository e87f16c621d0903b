"""What a method is: options, and up to four pure functions on data it is handed.

``sizes(budget)`` says what would remain, ``score(view, evidence)`` summarises one place, ``decide(study)`` makes the
plan, ``mend(view, evidence, plan, stage)`` completes it block by block. A method never opens a file, never touches a
device, never knows the command line or another method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from secateur.budgets import Budget
from secateur.errors import InternalError
from secateur.families import Block, Layout, Sizes
from secateur.plans import Artifact, Edits, Mend, Plan
from secateur.spaces import BlockView, Kind, Space, all_spaces

Output = Literal["dense", "dense-per-layer", "zeros", "dense-zeros", "factors", "runtime", "index"]
Data = Literal["none", "text", "inputs", "labels"]
ZEROS: tuple[Output, ...] = ("zeros", "dense-zeros")
"""Kinds in which weights become zero where they stand."""
Fraction = Annotated[float, Field(gt=0, lt=1)]

WORTH: Mapping[Output, str] = {
    "dense": "a stock checkpoint, smaller and faster everywhere",
    "dense-per-layer": "a checkpoint whose layers differ, loaded with the bundled modelling file",
    "zeros": "zeros in place: the same bytes, and on CPUs the same speed; --format bitmask packs them on disk",
    "dense-zeros": "a smaller checkpoint with zeros in place of single weights: these save nothing more, but bytes on "
    "disk with --format bitmask",
    "factors": "factored matrices, multiplied out for evaluation: the weights are as large as before, the factors lie "
    "beside them",
    "runtime": "a policy that acts at run time",
    "index": "an index list",
}


PACKED = (
    "packed, so that zeros take no bytes on disk; loaded (secateur.load, or transformers after secateur unpack) it has "
    "its dense size and speed"
)


def worth(output: Output, layout: Layout, format: str = "dense") -> str:
    """Kind of the output and what it saves, and where; layers that differ make a dense one per-layer."""
    kind: Output = "dense-per-layer" if output == "dense" and layout == "per-layer" else output
    if format == "dense":
        return f"{kind}: {WORTH[kind]}"
    return f"{kind}: {PACKED}" if kind in ZEROS else f"{kind}: {WORTH[kind]}; {PACKED}. It has few zeros"


Derivative = Literal["mean", "squares", "signals", "tables"]


class Trials(Protocol):
    """The network on the calibration text with some tensors edited: canonical tensors in dense shape, by name."""

    def loss(self, edits: Mapping[str, Tensor] | None = None) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""

    def divergence(self, edits: Mapping[str, Tensor] | None = None) -> float:
        """Mean divergence KL(dense || edited) of the predictions per predicted token, in nats; edits of blocks only."""

    def settle(self, edits: Mapping[str, Tensor] | None = None) -> float:
        """The loss, and trials after it run from the first block in which they differ from these edits."""

    def gradients(
        self,
        edits: Mapping[str, Tensor] | None = None,
        wanted: tuple[Derivative, ...] = ("mean",),
        generator: torch.Generator | None = None,
    ) -> Iterator[Gradients]:
        """Gradients of the mean loss, place by place, the stem first and then the blocks from the last to the first.

        Args:
            edits: canonical tensors in dense shape, by name.
            wanted: which fields of :class:`Gradients` to fill; with ``tables``, those of the embeddings come at the
                end, as the stem's once more.
            generator: draws the labels from the network's own predictions instead of taking the text's.
        """

    def network(self) -> AbstractContextManager[nn.Module]:
        """The whole stock model, loaded and frozen."""

    @property
    def count(self) -> int:
        """Losses asked for so far."""


@dataclass(frozen=True)
class Gradients:
    """Derivatives of the mean loss with respect to the tensors of one place.

    Attributes:
        place: block index, or None for the head and the final norm.
        mean: gradient of every canonical tensor.
        squares: mean over windows of the squared gradients of each window's loss; empty unless asked for.
        signals: [D, D] by ``attention`` and ``ffn``: mean over tokens of g g^T, g being the gradient of the summed loss
            with respect to what the branch gives (its matrix's or its experts' output), a Fisher matrix.
        influence: how much the block changes its input (:class:`secateur.evidence.Influence`); empty for the stem.
    """

    place: Block
    mean: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    signals: Mapping[str, Tensor]
    influence: Tensor


@dataclass
class Study:
    """What a decision may look at.

    Attributes:
        budget: the request; solves sizes.
        generator: the only source of randomness.
        view: loads the tensors of a place, of some roles only.
        summaries: what ``score`` returned, by name, in the order of the places; loaded on access.
        artifacts: what the method's ``files`` named, loaded.
        round, previous: number of this round of decisions, from 0, and the plan that the one before it made.
        trials: losses and gradients of the network on the calibration text; only of methods with ``data``.
        ids: the calibration windows, [count, length]; empty without data.
        progress: report (done, of, what) of a long decision.
    """

    budget: Budget
    generator: torch.Generator
    view: Callable[[Block, tuple[str, ...] | None], BlockView]
    summaries: Mapping[str, Iterable[Tensor]] = field(default_factory=dict)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    round: int = 0
    previous: Plan | None = None
    make_trials: Callable[[], Trials] | None = None
    make_trials_on: Callable[[str], Trials] | None = None
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    progress: Callable[[int, int, str], None] = lambda *_: None
    make_store: Callable[[str], Edits] | None = None
    _last: BlockView | None = field(default=None, init=False, repr=False)

    @cached_property
    def trials(self) -> Trials:
        if self.make_trials is None:
            raise InternalError("no-trials", "a trial on calibration text", "the method did not ask for data")
        return self.make_trials()

    def trials_on(self, text: str) -> Trials:
        """Trials on another of the method's ``texts``."""
        if self.make_trials_on is None:
            raise InternalError("no-trials", f"a trial on the {text} text", "the study was made without texts")
        return self.make_trials_on(text)

    def store(self, name: str) -> Edits:
        """A place on disk for tensors as large as the model; written and read place by place."""
        if self.make_store is None:
            raise InternalError("no-store", f"a place on disk for {name}", "the study was made without one")
        return self.make_store(name)

    def block(self, place: Block) -> BlockView:
        """All tensors of a place; those of the last one stay."""
        if self._last is None or self._last.place != place:
            self._last = None  # never two of them
            self._last = self.view(place, None)
        return self._last

    def spaces(self, kind: Kind) -> list[Space]:
        """All spaces of a kind, in the order of the blocks."""
        return all_spaces(self.budget.sizes, kind)


class Named(BaseModel):
    """What every method says of itself; its fields are its options and their schema.

    Class attributes:
        name, title, paper: identity and source.
        data: what is needed: calibration text; for any network inputs, or inputs with labels. A property where an
            option decides it.
        output: what kind of result it writes.
        group: which comparison takes it up (``compare --methods all-GROUP``); ``structured``: the result is a smaller
            dense checkpoint; ``graph``: it prunes any network by its graph.
        seeded: whether the result depends on the seed in more than the draw of calibration windows; a property where
            an option decides it.
        ours: set where the method or a variant is Secateur's own.
        variants: other classes that the method is with some option: by its name and value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    data: ClassVar[Data] = "none"
    output: ClassVar[Output] = "dense"
    group: ClassVar[str] = "structured"
    seeded: ClassVar[bool] = False
    variants: ClassVar[Mapping[tuple[str, str], type[Named]]] = {}


class Method(Named):
    """Base of every method for checkpoints of language models.

    Class attributes:
        evidence: statistics of the dense model that the engine gathers for ``score``, by the names of
            ``secateur.engine.taps``: ``stream``, ``influence``, ``ends``, ``routes``, ``ROLE.gram``, ``ROLE.moments``.
        timed: whether the time of a run follows from its sweeps, so that a preview can foretell it.
        order: whether ``mend`` sees statistics of the dense model, or those behind the cuts of the blocks before
            (``sequential``).
    """

    evidence: ClassVar[frozenset[str]] = frozenset()
    timed: ClassVar[bool] = False
    order: ClassVar[Literal["dense", "sequential"]] = "dense"

    sparsity: Fraction | None = Field(
        None, description="share of the units of the cut space to remove (the paper's own knob), instead of --ratio"
    )

    @property
    def sized(self) -> bool:
        """Whether the options say how much goes, so that no target is needed."""
        return self.sparsity is not None

    @property
    def cuts(self) -> Kind:
        """Kind of the units that go."""
        return "ffn"

    @property
    def roles(self) -> tuple[str, ...] | None:
        """Roles whose tensors ``score`` reads; None for all, empty for none."""
        return ()

    @property
    def mends(self) -> tuple[frozenset[str], ...]:
        """Statistics gathered for each stage of ``mend``; none: the plan is complete without it.

        In the order ``sequential`` every stage is gathered behind the edits of those before it.
        """
        return ()

    @property
    def rewrites(self) -> bool:
        """Whether ``mend`` changes what lies in front of the last matrix of each branch: no input of theirs is kept."""
        return False

    @property
    def stem_mends(self) -> frozenset[str]:
        """Statistics of the stem, behind all blocks, for a last call of ``mend``; none: there is none."""
        return frozenset()

    @property
    def rounds(self) -> int:
        """How often ``score``, ``decide`` and ``mend`` are called, each time on the model as the last left it."""
        return 1

    @property
    def chain(self) -> tuple[Method, ...]:
        """Methods that are run one after the other, each on what the one before leaves, to the same target."""
        return (self,)

    def in_layout(self, layout: Layout) -> Self:
        """This method with the options that follow from the layout of the output."""
        return self

    def files(self) -> dict[str, str]:
        """Artifacts of earlier runs that the options name: paths by name, loaded by the engine."""
        return {}

    def texts(self) -> dict[str, str]:
        """Texts besides the calibration text that the options name: sources by name, drawn from as it is."""
        return {}

    def sizes(self, budget: Budget) -> Sizes:
        """Sizes that would remain."""
        return self._solve(budget, self.cuts)

    def foresees(self, budget: Budget) -> bool:
        """Whether the run will come to ``sizes``; else it decides what gives how much, and they are an even cut."""
        return False

    def zeros(self, budget: Budget) -> int:
        """How many weights become zero where they stand."""
        return 0

    def foreseen(self, budget: Budget) -> dict[str, int]:
        """Counts before and after that follow from no sizes, as ``achieved`` will name them."""
        return {}

    def score(self, view: BlockView, evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Summaries of one place, most often one number per unit of a space, higher = keep."""
        return {}

    def decide(self, study: Study) -> Plan:
        """The plan, given all summaries."""
        raise NotImplementedError

    def mend(self, view: BlockView, evidence: Mapping[str, Tensor], plan: Plan, stage: int) -> Mend:
        """What one block keeps and how its survivors are repaired, given statistics of its signals.

        Args:
            view: the dense tensors of the block, edits of its earlier stages applied.
            evidence: what ``mends[stage]`` names.
            plan: the decision so far: the sizes, and what ``decide`` kept already.
            stage: index into ``mends``.

        Returns:
            Kept units and edits to add to the plan. Edits are canonical tensors in dense shape, zero where they read
            what is removed, so that a block with them computes what the pruned one will.
        """
        return Mend()

    def _solve(self, budget: Budget, kind: Kind, base: Sizes | None = None) -> Sizes:
        if self.sparsity is None:
            return budget.solve(kind, base)
        return budget.at(kind, int((1 - self.sparsity) * budget.sizes.size(kind)), base)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
