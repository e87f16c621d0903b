"""The request behind ``secateur delta pack``, and the methods with their options."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from secateur.deltas.selection import Selection, Signal, best_entries, best_units, kept_count, random_choice
from secateur.engine.request import ComputeType
from secateur.errors import near, refuse, validated

Number = float | Literal["search"]
VALUES: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class DeltaRequest(BaseModel):
    """What ``secateur delta pack`` was asked to do; fields are named as the options of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    tuned: str
    output: str
    method: str | None = None
    ratio: float = Field(0.9, ge=0, lt=1)
    data: str | None = None
    samples: int = Field(32, ge=1)
    length: int | None = Field(None, ge=2)
    text_field: str = "text"
    options: dict[str, Any] = Field(default_factory=dict)
    device: str = "auto"
    dtype: ComputeType = "auto"
    seed: int = Field(0, ge=0)
    trust_remote_code: bool = False
    force: bool = False


class DeltaMethod(BaseModel):
    """A method: which entries of a delta are kept, and what these are divided by. Its fields are its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    title: ClassVar[str]

    values: Literal["float16", "bfloat16", "float32"] = Field("float16", description="data type of what is stored")
    lora: Literal["product", "factors"] = Field(
        "product", description="of an adapter: entries of the product of its factors go, or entries of the factors"
    )

    @property
    def rescale(self) -> Number | Literal["share", "analytic", "learned"]:
        """What kept values are divided by: a number, or how it is found."""
        return "share"

    @property
    def asks_signals(self) -> bool:
        """Whether the choice of entries needs the inputs of the matrices."""
        return False

    @property
    def random(self) -> bool:
        """Whether the choice of entries is drawn."""
        return False

    @abstractmethod
    def select(self, delta: Tensor, signal: Signal | None, ratio: float, seed: int) -> Selection:
        """The entries of a delta [rows, columns] that are kept.

        Args:
            signal: of its columns, where ``asks_signals``.
            seed: of this matrix.
        """


class Searched(DeltaMethod):
    """A method whose q may be found by trying candidates on the data."""

    windows: int = Field(8, ge=1, description="windows of the data on which candidates of a search are tried")
    objective: Literal["output", "loss"] = Field(
        "output",
        description="what a search minimises: the squared change of the fine-tune's five largest logits, or the loss",
    )
    seeds: int = Field(1, ge=1, description="masks over which a search averages: that of the file, and others")


class Dare(DeltaMethod):
    """Keep random entries, divide them by their share (DARE, arXiv:2311.03099)."""

    name = "dare"
    title = "Language Models are Super Mario: random entries, divided by their share"

    @property
    def random(self) -> bool:
        return True

    def select(self, delta: Tensor, signal: Signal | None, ratio: float, seed: int) -> Selection:
        del signal
        return random_choice(delta.numel(), kept_count(delta.numel(), ratio), seed)


class DarexQ(Dare, Searched):
    """Keep random entries, divide them by a larger q (DAREx, arXiv:2410.09344)."""

    name = "darex_q"
    title = "Revisiting Delta-Parameter Pruning: random entries, divided by q"

    q: float | Literal["search", "analytic", "learned"] = Field(
        "search",
        description="what kept entries are divided by: a number; search, one for all layers; analytic, one for each"
        " from the bound of the paper; learned, one for each by gradient descent",
    )
    eta: Number = Field("search", description="of the analytic q: balances the parts of the bound")
    gamma: float = Field(0.95, gt=0, lt=1, description="of the analytic q: probability of the bound")
    guard: float = Field(0.8, gt=0, le=1, description="of the analytic q: stop when so many rows passed their optimum")

    @property
    def rescale(self) -> Number | Literal["share", "analytic", "learned"]:
        return self.q


class Magnitude(Searched):
    """Keep the largest entries (importance-based selection of DAREx, sec. 5)."""

    name = "magnitude"
    title = "Largest entries"

    q: Number = Field(1.0, description="what kept entries are divided by: a number, or search")

    @property
    def rescale(self) -> Number | Literal["share", "analytic", "learned"]:
        return self.q

    def select(self, delta: Tensor, signal: Signal | None, ratio: float, seed: int) -> Selection:
        del signal, seed
        return best_entries(delta.abs(), kept_count(delta.numel(), ratio), by_row=False)


class Wanda(Magnitude):
    """Keep the entries that are largest times the norm of their input, row by row."""

    name = "wanda"
    title = "Largest entries times the norm of their input, row by row"

    @property
    def asks_signals(self) -> bool:
        return True

    def select(self, delta: Tensor, signal: Signal | None, ratio: float, seed: int) -> Selection:
        del seed
        assert signal is not None
        return best_entries(delta.abs() * signal.norms.to(delta), kept_count(delta.numel(), ratio), by_row=True)


class Structural(Magnitude):
    """Keep whole rows or columns."""

    name = "structural"
    title = "Whole rows or columns"

    axis: Literal["rows", "columns"] = Field("columns", description="what goes as a whole")
    score: Literal["magnitude", "wanda", "random"] = Field("magnitude", description="what decides which stay")

    @property
    def rescale(self) -> Number | Literal["share", "analytic", "learned"]:
        return "share" if self.random and "q" not in self.model_fields_set else self.q

    @property
    def random(self) -> bool:
        return self.score == "random"

    @property
    def asks_signals(self) -> bool:
        return self.score == "wanda"

    def select(self, delta: Tensor, signal: Signal | None, ratio: float, seed: int) -> Selection:
        axis: Literal[0, 1] = 0 if self.axis == "rows" else 1
        units = delta.shape[axis]
        count = kept_count(units, ratio)
        if self.random:
            return random_choice(units, count, seed, axis)
        weighed = delta if signal is None else delta * signal.norms.to(delta)
        return best_units(weighed.norm(dim=1 - axis), count, axis)


METHODS: Final[dict[str, type[DeltaMethod]]] = {
    method.name: method for method in (Dare, DarexQ, Magnitude, Wanda, Structural)
}


def make_delta_method(request: DeltaRequest) -> DeltaMethod:
    """The method of a request with its options; without a name ``darex_q`` where there is data, else ``dare``.

    Raises:
        RequestError: unknown names (near matches), bad values, or a method that needs data without any.
    """
    name = request.method or ("darex_q" if request.data else "dare")
    schema = METHODS.get(name)
    if schema is None:
        refuse("unknown-method", f"delta method {name!r}", "there is none", near(name, METHODS))
    method = validated(schema, request.options, name, "see: docs/methods/darex.md")
    asks_text = isinstance(method.rescale, str) and method.rescale != "share"
    if request.data is None and (method.asks_signals or asks_text):
        found = "it needs text and --data is not given"
        hint = "--data notes.txt, or --set q=NUMBER" if asks_text else "--data notes.txt, or --method magnitude"
        refuse("no-data", f"delta method {name}", found, hint)
    smallest = 1e-6
    if not isinstance(method.rescale, str) and not (np.isfinite(method.rescale) and method.rescale >= smallest):
        refuse("bad-option", f"option q={method.rescale} of {name}", f"not a number from {smallest} on")
    return method
