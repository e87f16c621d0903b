"""A checkpoint folder as a model: as transformers loads it, packed or not."""

from __future__ import annotations

from typing import Any

from secateur.checkpoints.folder import Folder
from secateur.families.stock import is_headless, load_pretrained


def load_model(folder: Folder, **options: Any) -> Any:
    """The model in a folder as transformers loads it, with the bundled modelling file where layers differ.

    Tensors of a packed folder are unpacked in memory.

    Args:
        options: of ``from_pretrained``.
    """
    if folder.is_packed:
        options["state_dict"] = dict(folder.read(folder.headers))
    return load_pretrained(folder.path, folder.layers is not None, is_headless(folder.config), **options)
