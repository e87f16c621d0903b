"""The one request object behind the command line, the YAML recipe and the Python call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.budgets import Target, parse_target, ratio_target
from secateur.errors import RequestError, near, refuse
from secateur.families import Layout

ComputeType = Literal["auto", "float32", "float64", "bfloat16", "float16"]


class PruneRequest(BaseModel):
    """What ``secateur prune`` was asked to do. Fields are named as the options of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    output: str | None = None
    method: str | None = None
    ratio: float | None = None
    target: tuple[str, ...] = ()
    data: str | None = None
    samples: int = Field(128, ge=1)
    length: int | None = Field(None, ge=2)
    text_field: str = "text"
    options: dict[str, Any] = Field(default_factory=dict)
    layout: Layout = "native"
    text: str | None = None
    context: int | None = Field(None, ge=2)
    quantum: int | None = Field(None, ge=1)
    tolerance: float | None = Field(None, ge=0)
    device: str = "auto"
    dtype: ComputeType = "auto"
    seed: int = Field(0, ge=0)
    trust_remote_code: bool = False
    force: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of ``ratio`` and ``target`` together."""
        found = tuple(parse_target(text) for text in self.target)
        return found if self.ratio is None else (ratio_target(self.ratio), *found)

    @property
    def is_copy(self) -> bool:
        """Whether nothing at all is to be removed."""
        return bool(self.targets) and all(target.fraction == 1 for target in self.targets) and not self.options


def make_request(values: dict[str, Any], recipe: Path | None = None) -> PruneRequest:
    """A checked request from keyword values over those of a recipe.

    Args:
        values: options by name; None and empty ones leave the recipe's.
        recipe: YAML file with the same names.

    Raises:
        RequestError: unknown names (near matches), values of the wrong kind, bad ratio or target.
    """
    merged: dict[str, Any] = _read_recipe(recipe) if recipe is not None else {}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    merged.update({key: value for key, value in values.items() if value is not None and value not in ((), {}, [])})
    if merged.get("ratio") is not None:
        ratio_target(merged["ratio"])
    unknown = sorted(set(merged) - set(PruneRequest.model_fields))
    if unknown:
        raise RequestError(
            "unknown-option", f"option {unknown[0]!r}", "there is none", near(unknown[0], PruneRequest.model_fields)
        )
    if not merged.get("model"):
        refuse("no-model", "a prune", "no model is named", "name MODEL, or model: in the recipe")
    try:
        request = PruneRequest.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "request"
        raise RequestError("bad-option", f"option {key}={merged.get(key)!r}", first["msg"]) from error
    _ = request.targets  # refuses bad ones now
    return request


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        refuse("no-recipe", f"recipe {str(path)!r}", "there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse("bad-recipe", f"recipe {str(path)!r}", f"not valid YAML ({' '.join(str(error).split())})")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        refuse("bad-recipe", f"recipe {str(path)!r}", "no mapping of option names at its top level")
    values = {key.replace("-", "_"): value for key, value in content.items()}
    if "set" in values:  # as the command line calls it
        values["options"] = values.pop("set")
    return values


def recipe_of(request: PruneRequest, method: str, options: Mapping[str, Any], named: bool = True) -> str:
    """A request as the YAML that ``--recipe`` reads: what differs from the defaults, and the method that was chosen.

    Where the result goes (``output``, ``force``) is left to the command.

    Args:
        method: name of the method that ran.
        options: its options that were given, as its schema read them.
        named: whether the model is one that can be named again, no module in memory.
    """
    given = request.model_dump(mode="json", exclude_defaults=True, exclude={"output", "force", "method", "options"})
    content = {"model": given.pop("model"), "method": method, **given}
    if not named:
        del content["model"]
    if options:
        content["set"] = dict(options)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=2**16)
    return text
