"""The request behind ``secateur recover`` and the options of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from secateur.engine.request import Request, checked, over_recipe
from secateur.errors import refuse, validated

Method = Literal["lora", "full"]
Rank = Annotated[int, Field(ge=0)]


class RecoverRequest(Request):
    """What ``secateur recover`` was asked to do."""

    method: Method = "lora"
    teacher: str | None = None
    samples: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    minutes: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class Training(BaseModel):
    """How to train; every field is an option of ``--set``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="LoRA: rank of every adapter")
    alpha: float | None = Field(
        None,
        gt=0,
        description="LoRA: adapters count alpha / rank; twice the rank by default, other ranks in proportion",
    )
    ranks: Literal["auto"] | dict[str, Rank] | None = Field(
        None,
        description="LoRA: other ranks by BLOCK, ROLE or BLOCK.ROLE, e.g. {0: 32, down: 8, 3.down: 4}, 0 for none;"
        " auto shares out the same sum in proportion to what was cut in each block",
    )
    roles: tuple[str, ...] | None = Field(
        None,
        description="what to train, e.g. q,v,down; by default every matrix of the blocks (LoRA), everything (full)",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="highest rate; by default 3e-3 (LoRA), 3e-4 (full) times 256 / width, at most times 4",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls, to nought")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the run in which the rate rises")
    batch: int = Field(8, ge=1, description="windows of a step")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of matrices")
    anchor: Literal["l2", "l1"] | None = Field(
        None,
        description="full: decay towards the starting weights (AdamR), so that the delta stays small enough to prune",
    )
    anchor_strength: float | None = Field(
        None, ge=0, description="full: how strong that decay is; by default 0.05 (l2), 1e-4 (l1)"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    distill: float | None = Field(
        None, ge=0, le=1, description="share of the teacher's logits in the loss; 0.5 by default with --teacher"
    )
    temperature: float = Field(1.0, gt=0, description="of the logits that are compared with the teacher's")
    hidden: float = Field(0.0, ge=0, description="weight of matching the teacher's hidden states after each block")
    validation: int = Field(32, ge=0, description="windows of the data held back for the learning curve")
    every: int = Field(50, ge=1, description="steps between points of the learning curve, which are checkpoints too")
    keep: Literal["best", "last"] = Field(
        "best", description="weights of the best point on held-back data, or the last"
    )

    @field_validator("ranks", mode="before")
    @classmethod
    def _read_ranks(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError("neither auto nor a mapping such as {0: 32, down: 8}") from error
        return {str(key): rank for key, rank in value.items()} if isinstance(value, dict) else value

    @field_validator("roles", mode="before")
    @classmethod
    def _split_roles(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


DEFAULT_STEPS: Final = 300
_RATES: Final[dict[Method, float]] = {"lora": 3e-3, "full": 3e-4}
_WIDTH: Final = 256
_STRENGTHS: Final = {"l2": 0.05, "l1": 1e-4}


def default_rate(method: Method, width: int) -> float:
    """Learning rate for a residual stream of some width: that of 256 dimensions, in inverse proportion to the width.

    Chosen on validation text at widths of 64 and 256 (docs/recover.md); narrower models take that of 64.
    """
    return _RATES[method] * min(4.0, _WIDTH / width)


def _anchor_strength(training: Training) -> float | None:
    if training.anchor is None or training.anchor_strength is not None:
        return training.anchor_strength
    return _STRENGTHS[training.anchor]


def make_recovery(values: dict[str, Any], recipe: Path | None = None) -> tuple[RecoverRequest, Training]:
    """A checked request and its training options, from keyword values over those of a recipe.

    Raises:
        RequestError: unknown names (near matches), values of the wrong kind, options that need a teacher without one.
    """
    request = checked(RecoverRequest, over_recipe(values, recipe), "a recovery")
    training = validated(Training, request.options, "recover", "see: docs/recover.md")
    if request.teacher is None:
        for name in ("distill", "hidden"):
            if getattr(training, name):
                refuse("no-teacher", f"option {name}", "there is no teacher to learn from", "--teacher MODEL2")
    if request.method == "full" and training.ranks is not None:
        refuse("bad-option", "option ranks of recover", "only adapters have ranks", "--method lora")
    if training.anchor is not None:
        if request.method != "full":
            refuse("bad-option", "option anchor of recover", "adapters begin at nothing", "--method full")
        if training.weight_decay:
            refuse("bad-option", "option anchor of recover", "weight_decay pulls elsewhere", "--set weight_decay=0")
    if request.dtype == "float16":
        refuse("bad-option", "dtype float16", "gradients leave its range", "float32 or bfloat16")
    filled = {
        "alpha": training.alpha or 2.0 * training.rank,
        "anchor_strength": _anchor_strength(training),
        "distill": (0.0 if request.teacher is None else 0.5) if training.distill is None else training.distill,
    }
    return request, training.model_copy(update=filled)
