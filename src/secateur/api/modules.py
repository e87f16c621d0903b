"""Modules passed in instead of folders."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import nn

from secateur.checkpoints import Folder
from secateur.checkpoints.loading import load_model
from secateur.errors import refuse
from secateur.families.stock import quiet_transformers

Model = str | Path | nn.Module
"""A checkpoint folder, a hub id, or a transformers module."""


class Made(Protocol):
    """What a run gives back: where the result is, and the module where one was passed in."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def output(self) -> str | None: ...
    @property
    def model(self) -> nn.Module | None: ...


Result = TypeVar("Result", bound=Made)
Run = Callable[[dict[str, Any], frozenset[str]], Result]


def with_folders(
    values: Mapping[str, Any], models: tuple[str, ...], tokenizer: Any, inplace: bool, run: Run[Result]
) -> Result:
    """Run on folders, wherever modules were passed in; for the module ``model`` the result holds one too.

    Args:
        values: what was asked; ``output`` may be None where ``model`` is a module.
        models: names of the values that may be modules.
        tokenizer: of the modules.
        inplace: change the module ``model``.
        run: takes the values, and the names of those that were modules.
    """
    modules = {name: values[name] for name in models if isinstance(values[name], nn.Module)}
    if not modules:
        return run(dict(values), frozenset())
    with tempfile.TemporaryDirectory() as temporary:
        given = {name: save_module(module, tokenizer, Path(temporary) / name) for name, module in modules.items()}
        if "model" not in modules:
            return run({**values, **given}, frozenset(modules))
        named = values["output"] is not None
        output = values["output"] if named else Path(temporary) / "output"
        result = run({**values, **given, "output": output}, frozenset(modules))
        made = load_as(modules["model"], Path(str(result.output)), inplace)
        return replace(result, output=result.output if named else None, model=made)


def save_module(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """Write a module (and its tokenizer, where there is one) as a checkpoint folder; the module stays as it is."""
    if not hasattr(model, "config"):
        hint = "for any other module give example_inputs=..., and method='spa'"
        refuse("no-config", f"a module {type(model).__name__}", "it is none of transformers' models", hint)
    config: Any = model.config
    named, dtype = config.architectures, config.dtype
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    # saving writes the class's name, and in older versions the type, into the module's own configuration
    config.architectures, config.dtype = named, dtype
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def load_as(model: nn.Module, folder: Path, inplace: bool) -> nn.Module:
    """What a run made of ``model``: of its class, data type and mode; with ``inplace`` the very module."""
    dtype, written = next(model.parameters()).dtype, Folder(folder)
    with quiet_transformers():
        made: nn.Module = (
            load_model(written, dtype=dtype) if written.is_packed else type(model).from_pretrained(folder, dtype=dtype)  # type: ignore[attr-defined]
        )
    made.train(model.training)
    if not inplace:
        return made
    model.__dict__.update(made.__dict__)
    return model
