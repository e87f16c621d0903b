"""The request objects behind the command line, the YAML recipe and the Python call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateur.budgets import OF_LANGUAGE_MODELS, Target, parse_target, ratio_target
from secateur.errors import refuse, validated
from secateur.families import Layout

Format = Literal["dense", "bitmask"]
"""How weights are written: as they are, or each tensor in the fewest bytes that its zeros allow."""
ComputeType = Literal["auto", "float32", "float64", "bfloat16", "float16"]


class Request(BaseModel):
    """What every request for a new folder says. Fields are named as the options of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    output: str | None = None
    data: str | None = None
    length: int | None = Field(None, ge=2)
    text_field: str = "text"
    options: dict[str, Any] = Field(default_factory=dict)
    text: str | None = None
    context: int | None = Field(None, ge=2)
    device: str = "auto"
    dtype: ComputeType = "auto"
    seed: int = Field(0, ge=0)
    trust_remote_code: bool = False
    force: bool = False


class PruneRequest(Request):
    """What ``secateur prune`` was asked to do."""

    method: str | None = None
    ratio: float | None = None
    target: tuple[str, ...] = ()
    samples: int = Field(128, ge=1)
    length: int | None = Field(None, ge=1)
    layout: Layout = "native"
    quantum: int | None = Field(None, ge=1)
    tolerance: float | None = Field(None, ge=0)
    format: Format = "dense"
    pairs: str | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets of ``ratio`` and ``target`` together."""
        found = tuple(parse_target(text) for text in self.target)
        for target in found:
            if target.measure not in OF_LANGUAGE_MODELS:
                hint = f"name one of {', '.join(OF_LANGUAGE_MODELS)}"
                refuse("bad-target", f"target {target}", "language models are not measured in it", hint)
        return found if self.ratio is None else (ratio_target(self.ratio), *found)

    @property
    def is_copy(self) -> bool:
        """Whether nothing at all is to be removed."""
        return bool(self.targets) and all(target.fraction == 1 for target in self.targets) and not self.options


def make_request(values: dict[str, Any], recipe: Path | None = None) -> PruneRequest:
    """A checked request to prune, from keyword values over those of a recipe.

    Raises:
        RequestError: as :func:`over_recipe` and :func:`checked`; bad ratio or target.
    """
    merged = over_recipe(values, recipe)
    if merged.get("ratio") is not None:
        ratio_target(merged["ratio"])
    request = checked(PruneRequest, merged, "a prune")
    _ = request.targets  # refuses bad ones now
    return request


Asked = TypeVar("Asked", bound=Request)


def checked(schema: type[Asked], values: dict[str, Any], what: str) -> Asked:
    """A request of a kind from its values; it must name a model.

    Raises:
        RequestError: as :func:`secateur.errors.validated`, or no model.
    """
    if set(values) <= set(schema.model_fields) and not values.get("model"):
        refuse("no-model", what, "no model is named", "name MODEL, or model: in the recipe")
    return validated(schema, values)


def over_recipe(values: dict[str, Any], recipe: Path | None) -> dict[str, Any]:
    """Keyword values over those of a recipe; None and empty ones leave the recipe's.

    Args:
        values: options by name.
        recipe: YAML file with the same names.

    Raises:
        RequestError: the recipe cannot be read.
    """
    merged: dict[str, Any] = _read_recipe(recipe) if recipe is not None else {}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    merged.update({key: value for key, value in values.items() if value is not None and value not in ((), {}, [])})
    return merged


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


def recipe_of(request: Request, method: str, options: Mapping[str, Any], named: bool = True) -> str:
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
