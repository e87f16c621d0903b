"""What a comparison consists of: rows (a method with options), and cells (row x layout x ratio x seed)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from secateur.budgets import ratio_target
from secateur.engine.request import Request
from secateur.errors import near, refuse
from secateur.families import LAYOUTS, Layout
from secateur.methods.base import Method
from secateur.methods.registry import checkpoint_methods, make_method, method_class

BASELINE: Final = "random"
SEEDS: Final = 3  # of a method whose result depends on the seed
_GROUP: Final = "all-"


def _listed(value: object) -> object:
    """``a,b`` as its parts; one value as a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


class CompareRequest(Request):
    """What ``secateur compare`` was asked to do; ``options`` are named ``METHOD.option``."""

    methods: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(("all-structured",), min_length=1)
    ratio: Annotated[tuple[float, ...], BeforeValidator(_listed)] = Field((0.1, 0.2, 0.3), min_length=1)
    layout: Literal["native", "per-layer", "both"] = "both"
    samples: int = Field(128, ge=1)
    quantum: int | None = Field(None, ge=1)
    tolerance: float | None = Field(None, ge=0)
    keep: bool = False
    cluster: Literal["ray"] | None = None

    @property
    def ratios(self) -> list[float]:
        """The ratios, ascending, each once."""
        return sorted(set(self.ratio))

    @property
    def layouts(self) -> list[Layout]:
        return [layout for layout in LAYOUTS if self.layout in (layout, "both")]


@dataclass(frozen=True)
class Row:
    """A method with the options that were given.

    Attributes:
        method: name of the method.
        options: as given.
        settings: the method with its options checked.
    """

    method: str
    options: Mapping[str, Any]
    settings: Method

    @property
    def label(self) -> str:
        """Name and options, in the form in which ``--methods`` takes them."""
        return ":".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True)
class Cell:
    """One model to make and to measure."""

    row: Row
    layout: Layout
    ratio: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from other cells of the same model, texts and arguments."""
        settings = _short_digest(self.row.settings.model_dump(mode="json"))
        row = {"method": self.row.label, "settings": settings}
        return {**row, "layout": self.layout, "ratio": self.ratio, "seed": self.seed}

    @property
    def name(self) -> str:
        """A file name."""
        label = self.row.label
        digest = f"-{hashlib.sha256(label.encode()).hexdigest()[:8]}" if self.row.options else ""
        return f"{re.sub(r'[^A-Za-z0-9=.]+', '-', label)[:80]}{digest}-{self.layout}-{self.ratio:g}-seed{self.seed}"

    def __str__(self) -> str:
        seed = f", seed {self.seed}" if self.row.settings.seeded else ""
        return f"{self.row.label}, {self.layout}, ratio {self.ratio:g}{seed}"


def rows_of(request: CompareRequest) -> list[Row]:
    """The rows of a request, each once; random units are always among them.

    Raises:
        RequestError: unknown methods, groups or options (near matches), options of a method that has no row.
    """
    shared = _options_by_method(request.options)
    wanted = [named for text in request.methods for named in _named(text)]
    if BASELINE not in {name for name, _ in wanted}:
        wanted.append((BASELINE, {}))
    rows = {}
    for name, own in wanted:
        options = {**shared.get(name, {}), **own}
        row = Row(name, options, make_method(name, options))
        rows[row.label] = row
    unused = sorted(set(shared) - {name for name, _ in wanted})
    if unused:
        option = f"{unused[0]}.{next(iter(shared[unused[0]]))}"
        refuse("unknown-option", f"option {option!r}", f"{unused[0]} is not among the methods", "add it to --methods")
    return list(rows.values())


def _named(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Methods and options of one part of the list: ``NAME``, ``NAME:option=value:option=value`` or ``all-GROUP``."""
    if text.startswith(_GROUP):
        group = text.removeprefix(_GROUP)
        members = _members()
        if group not in members:
            refuse(
                "unknown-method",
                f"methods {text!r}",
                "there is no such group",
                near(text, map(_GROUP.__add__, members)),
            )
        return members[group]
    name, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            refuse("bad-option", f"option {pair!r} of {name}", "not of the form key=value", "e.g. magnitude:spaces=kv")
        options[key.strip()] = value.strip()
    return [(name.strip(), options)]


def _members() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Methods by group, and the variants that belong to another than their method, with the option that makes them."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name in checkpoint_methods():
        kind = method_class(name)
        found.setdefault(kind.group, []).append((name, {}))
        told = {kind}  # one that several values make is taken up with the first
        for (option, value), variant in kind.variants.items():
            if variant.group != kind.group and variant not in told:
                found.setdefault(variant.group, []).append((name, {option: value}))
            told.add(variant)
    return found


def _options_by_method(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        method, separator, name = key.partition(".")
        if not separator:
            refuse("bad-option", f"option {key!r}", "it does not say of which method", f"METHOD.{key}=...")
        method_class(method)  # refuses an unknown one
        found.setdefault(method, {})[name] = value
    return found


def layouts_of(request: CompareRequest, rows: Sequence[Row]) -> list[Layout]:
    """The layouts in which there is something to compare: zeros leave all sizes as they are, so one says it all."""
    sizes_stay = all(row.settings.output == "zeros" for row in rows)
    return request.layouts[:1] if sizes_stay else request.layouts


def cells_of(request: CompareRequest, rows: Sequence[Row]) -> list[Cell]:
    """Every cell, in the order in which they run: the smaller cuts of all methods first."""
    for ratio in request.ratios:
        if ratio_target(ratio).fraction == 1:
            refuse("bad-ratio", "ratio 0", "nothing is cut there", "the dense model is measured anyway")
    return [
        Cell(row, layout, ratio, request.seed + turn)
        for ratio in request.ratios
        for layout in layouts_of(request, rows)
        for row in rows
        for turn in range(SEEDS if row.settings.seeded else 1)
    ]


def baseline_of(rows: Sequence[Row]) -> str:
    """Label of the row that every other is held against: random units as they are by default, or the first ones."""
    labels = [row.label for row in rows if row.method == BASELINE]
    return BASELINE if BASELINE in labels else labels[0]


def _short_digest(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
