"""How a checkpoint makes one vector of a text: what its folder says, in the files of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from secateur.checkpoints.folder import Folder, read_json
from secateur.checkpoints.packed import can_name
from secateur.errors import refuse
from secateur.families import Family
from secateur.families.schema import Pooling

MODULES: Final = "modules.json"
_SETTINGS: Final = "sentence_bert_config.json"
_POOLINGS: Final[dict[str, Pooling]] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
}
"""What sentence-transformers calls each."""
_SWITCH: Final = "pooling_mode_"
_HARMLESS: Final = ("Transformer", "Normalize")
"""Modules that change nothing about the cosine of two embeddings."""


@dataclass(frozen=True)
class Embedding:
    """How a text becomes one vector.

    Attributes:
        pooling: of its signals behind the last norm.
        longest: tokens at which texts are cut; None where nothing says so.
    """

    pooling: Pooling
    longest: int | None = None


def embedding_of(folder: Folder, family: Family) -> Embedding | None:
    """How the model in a folder makes one vector of a text; None for one that predicts tokens instead.

    A model without a head embeds, and so does whatever sentence-transformers has written down as such.

    Raises:
        RequestError: its folder names a step that is not known here.
    """
    modules = folder.path / MODULES
    if not modules.is_file():
        return None if family.has_head else Embedding(family.pooling)
    pooling = family.pooling
    for name, place in _modules(modules):
        if name == "Pooling":
            pooling = _pooling(folder.path / place / "config.json")
        elif name not in _HARMLESS:
            refuse(
                "bad-embedding", f"embeddings of {str(folder.path)!r}", f"{MODULES} has a module {name}, not known here"
            )
    settings = folder.path / _SETTINGS
    longest = read_json(settings).get("max_seq_length") if settings.is_file() else None
    return Embedding(pooling, longest if isinstance(longest, int) and longest > 0 else None)


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of every module, in their order."""
    try:
        listed: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in listed]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        refuse("bad-json", f"reading {MODULES}", f"it is no list of modules ({error!r})", "fetch the checkpoint again")
    for _, place in found:
        if place and not all(map(can_name, place.split("/"))):
            refuse("bad-json", f"reading {MODULES}", f"path {place!r} leaves the folder", "fetch the checkpoint again")
    return found


def _pooling(path: Path) -> Pooling:
    """The one pooling that a ``1_Pooling/config.json`` names."""
    content = read_json(path) if path.is_file() else {}
    named = content.get("pooling_mode")  # newer files name it, older ones have a switch for each
    switches = {key.removeprefix(_SWITCH): on for key, on in content.items() if key.startswith(_SWITCH)}
    found = [named] if isinstance(named, str) else [name for name, on in switches.items() if on is True]
    if len(found) != 1 or found[0] not in _POOLINGS:
        what = f"it pools by {', '.join(found) or 'nothing'}"
        refuse("bad-embedding", f"reading {path}", what, f"known are {', '.join(sorted(set(_POOLINGS.values())))}")
    return _POOLINGS[found[0]]
