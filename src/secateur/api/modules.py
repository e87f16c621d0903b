"""Modules passed in instead of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from secateur.families.stock import quiet_transformers

Model = str | Path | nn.Module
"""A checkpoint folder, a hub id, or a transformers module."""


def save_module(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """Write a module (and its tokenizer, where there is one) as a checkpoint folder; the module stays as it is."""
    config: Any = model.config
    named = config.architectures
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    config.architectures = named  # saving writes the class's name into the module's own configuration
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def load_as(model: nn.Module, folder: Path, inplace: bool) -> nn.Module:
    """What a run made of ``model``: of its class, data type and mode; with ``inplace`` the very module."""
    with quiet_transformers():
        made: nn.Module = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
    made.train(model.training)
    if not inplace:
        return made
    model.__dict__.update(made.__dict__)
    return model
