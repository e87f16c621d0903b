"""The form of a family file: one YAML per ``config.model_type``, architecture as data.

A family names, once, which module of the stock transformers class plays which role (``q``, ``out``, ``gate``,
``attention_norm``, ...). What a role means, which axes it writes and reads, stands in
:mod:`secateur.families.roles`; everything else is derived from the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from secateur.errors import RequestError, near
from secateur.families.sizes import Kind
from secateur.families.stock import is_headless

LoadStatus = Annotated[str, Field(pattern=r"^(expected|no|unknown|verified\([\w.+ -]+\))$")]
"""Of a runtime; ``verified`` names the version with which the tests ran it."""
When = dict[str, Any]
"""A condition on a configuration: the values of its keys (dotted where they lie deeper), all of which must hold."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Part):
    """What one module or parameter of a block holds.

    Attributes:
        roles: of its rows, one part after the other.
        experts: whether it stacks them for all experts: [experts, rows, columns].
        shared: whether they belong to the expert that every token visits.
        turns: the rows of the parts take turns, by ``kv`` group or by ``ffn`` neuron.
        transposed: whether it is stored [in, out]; None: as the family says.
        kind: of a parameter that is not called ``weight`` or ``bias``.
    """

    roles: tuple[str, ...]
    experts: bool = False
    shared: bool = False
    turns: Literal["kv", "ffn"] | None = None
    transposed: bool | None = None
    kind: Literal["weight", "bias"] = "weight"


def _entry(value: Any) -> Any:
    """A role or a list of roles is an entry with nothing else to say."""
    if isinstance(value, str):
        return {"roles": (value,)}
    if isinstance(value, list | tuple):
        return {"roles": tuple(value)}
    if isinstance(value, dict) and isinstance(value.get("roles"), str):
        return {**value, "roles": (value["roles"],)}
    return value


Table = dict[str, Annotated[Entry, BeforeValidator(_entry)]]


class Constraint(_Part):
    """A width the stock class refuses: ``size`` must be a multiple of another size, or its rows of some bytes."""

    size: Kind
    multiple_of: Literal["heads"] | None = None
    multiple_of_bytes: int | None = None
    why: str


class Fixed(_Part):
    """A size that no layout can change, or that only the other layout can, where ``when`` holds."""

    size: Kind
    when: When = Field(default_factory=dict)
    native_only: bool = False
    per_layer_only: bool = False
    why: str


class DenseBlocks(_Part):
    """Which blocks of a model with experts have none, as its configuration says.

    Attributes:
        listed: key with the list of their indices.
        step: key that gives every how many blocks one has experts.
        first: key with the number of leading ones.
    """

    listed: str | None = None
    step: str | None = None
    first: str | None = None


class Variant(_Part):
    """Changes that hold where ``when`` does; mappings are merged into the family's."""

    when: When
    change: dict[str, Any]


Pooling = Literal["mean", "cls", "last"]
"""Which signals of a text make its embedding: the mean of all, that of the first token or that of the last."""


class Family(_Part):
    """Everything Secateur knows about one architecture.

    Attributes:
        blocks: name of the module list.
        norm: kind of the norms on the stream.
        norm_offset: what the stock class adds to a norm's weight before it multiplies with it.
        scaled_embedding: whether the stock class multiplies token embeddings by the root of the stream's width.
        parallel: when attention and FFN of a block read the same stream and add to it together (``{}``: always).
        rotation: which dimensions of a head rotary positions turn together: of its two halves, or neighbours.
        transposed: whether the blocks' matrices are stored [in, out].
        stem, block: what each module holds.
        disk: names on disk that differ, of a module or of one parameter, or of the pieces of one for every expert.
        sizes: configuration key of each size (``blocks``, ``residual``, ``ffn``, ``expert_ffn``, ``shared``, ``kv``,
            ``heads``, ``head``, ``experts``, ``active_experts``), or the number itself. Without ``head``, the head
            size is tied to the stream's width.
        defaults: what a size is, times the width of the stream, where the configuration is silent.
        dense_blocks: where a model with experts has blocks without.
        branch_multiplier: configuration key of what a block multiplies its branches by before they join the stream.
        attributes: what the forward pass of a module in a block reads from itself besides its parameters: axis by
            attribute by module, set where a layer differs from the configuration (``config.X``: from its
            configuration).
        constraints, fixed: what the stock class refuses.
        variants: the first whose condition holds changes the family.
        pooling: how a model without a head makes one vector of a text, where its folder does not say.
        loads_in: other runtimes.
    """

    model_type: str
    like: str | None = None
    blocks: str
    norm: Literal["rms", "layer"]
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    parallel: When | None = None
    transposed: bool = False
    rotation: Literal["halves", "neighbours"] = "halves"
    stem: Table
    block: Table
    disk: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    sizes: dict[str, str | int]
    defaults: dict[str, int] = Field(default_factory=dict)
    dense_blocks: DenseBlocks | None = None
    branch_multiplier: str | None = None
    attributes: dict[str, dict[str, str]] = Field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    variants: tuple[Variant, ...] = ()
    pooling: Pooling = "last"
    loads_in: dict[str, LoadStatus | dict[str, LoadStatus]] = Field(default_factory=dict)

    @property
    def has_head(self) -> bool:
        """Whether its models predict tokens."""
        return any(entry.roles == ("head",) for entry in self.stem.values())

    def of(self, config: Any) -> Family:
        """This family as it is for one configuration."""
        found = self
        for variant in self.variants:
            if holds(variant.when, config):
                raw = _merge(self.model_dump(exclude={"variants"}), variant.change)
                found = Family.model_validate(raw)
                break
        named = {"model_type": config.model_type, "architectures": config.architectures}
        return found._without_head() if found.has_head and is_headless(named) else found

    def _without_head(self) -> Family:
        """The same as the base class of transformers has it: no head, and no prefix before the names of modules."""
        prefix = self.blocks.partition(".")[0] + "."
        stem = {k.removeprefix(prefix): entry for k, entry in self.stem.items() if entry.roles != ("head",)}
        return self.model_copy(update={"blocks": self.blocks.removeprefix(prefix), "stem": stem, "loads_in": {}})


def holds(when: When, config: Any) -> bool:
    """Whether a condition holds for a configuration."""
    for key, wanted in when.items():
        found = config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
        if found != wanted:
            return False
    return True


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
