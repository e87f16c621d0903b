"""The form of a family file: one YAML per ``config.model_type``, architecture as data.

A family names, once, which module of the stock transformers class plays which role (``q``, ``out``, ``gate``,
``attention_norm``, ...). What a role means, which axes it writes and reads, stands in
:mod:`secateur.families.roles`; everything else is derived from the two.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import RequestError, near

Size = Literal["residual", "ffn", "kv", "blocks"]
LoadStatus = Literal["expected", "no", "unknown"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Experts(_Part):
    """A parameter that stacks the same roles of all experts: [experts, rows of the roles, columns]."""

    experts: tuple[str, ...]


class Constraint(_Part):
    """A width the stock class refuses: ``size`` must be a multiple of another size, or its rows of some bytes."""

    size: Size
    multiple_of: Literal["heads"] | None = None
    multiple_of_bytes: int | None = None
    why: str


class Fixed(_Part):
    """A size that the native layout cannot change (``when`` the named configuration flag is set, if given)."""

    size: Size
    when: str | None = None
    why: str


class Family(_Part):
    """Everything Secateur knows about one architecture."""

    model_type: str
    like: str | None = None
    blocks: str
    norm: Literal["rms", "layer"]
    transposed: bool = False
    stem: dict[str, str]
    block: dict[str, str | tuple[str, ...] | Experts]
    disk: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    sizes: dict[str, str]
    defaults: dict[str, int] = Field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    loads_in: dict[str, LoadStatus] = Field(default_factory=dict)


def _folder() -> Path:
    return Path(str(files("secateur.families")))


@cache
def family_names() -> tuple[str, ...]:
    """The ``model_type`` of every family file, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``change`` over ``base``; mappings merge one level deep, and ``null`` removes an entry."""
    merged = dict(base)
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = {k: v for k, v in {**base[key], **value}.items() if v is not None}
        else:
            merged[key] = value
    return merged


def parse_family(text: str, origin: str) -> dict[str, Any]:
    """The mapping in a family file, its ``like`` resolved."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError("bad-family", f"family file {origin}", f"not valid YAML ({error})") from error
    if not isinstance(raw, dict):
        raise RequestError("bad-family", f"family file {origin}", "no mapping at its top level")
    if raw.get("like"):
        return _merge(_read(str(raw["like"])), raw)
    return raw


def _read(name: str) -> dict[str, Any]:
    path = _folder() / f"{name}.yaml"
    if name not in family_names():
        raise RequestError(
            "unknown-architecture",
            f"architecture {name!r}",
            "no family file describes it",
            near(name, family_names()),
        )
    return parse_family(path.read_text(encoding="utf-8"), path.name)


@cache
def load_family(model_type: str) -> Family:
    """The family of a ``model_type``; an unknown one is refused with near matches."""
    try:
        return Family.model_validate(_read(model_type))
    except ValidationError as error:
        raise RequestError("bad-family", f"family file {model_type}.yaml", str(error)) from error
