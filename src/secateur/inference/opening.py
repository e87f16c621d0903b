"""Open a checkpoint of any stock decoder: by its family file, by one that lies beside it, or by inference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from secateur.checkpoints import Checkpoint, Folder
from secateur.errors import SecateurError, refuse
from secateur.families import Family, family_names
from secateur.families.schema import parse_family
from secateur.inference.verdict import Inferred, confirm, infer

FAMILY_FILE: Final = "secateur-family.yaml"
"""A family file that may lie beside ``config.json``; it is checked like an inferred one."""
Note = Callable[[str], None]


def inferred(folder: Folder) -> Inferred | None:
    """What is believed of an architecture that Secateur brings no family file for; None where it brings one."""
    if folder.config["model_type"] in family_names():
        return None
    beside = folder.path / FAMILY_FILE
    if not beside.is_file():
        return infer(folder.config)
    family = read_family(beside)
    try:
        return confirm(folder.config, family)
    except SecateurError:
        raise
    except Exception as error:  # roles, modules and sizes that it makes up are missed anywhere
        found = f"the model cannot be built by it ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        refuse("bad-family", f"family file {str(beside)!r}", found, "correct it, or delete it to have it inferred")


def read_checkpoint(path: Path, note: Note = lambda _: None) -> Checkpoint:
    """A folder through its architecture, with what is wrong with its files in ``problems``.

    Args:
        note: told in one line when the architecture has no family file.
    """
    folder = Folder(path)
    found = inferred(folder)
    if found is None:
        return Checkpoint(folder)
    note(found.summary)
    return Checkpoint(folder, found.family)


def open_checkpoint(path: Path, note: Note = lambda _: None) -> Checkpoint:
    """``read_checkpoint``, refused unless every tensor is there as described."""
    checkpoint = read_checkpoint(path, note)
    if checkpoint.problems:
        raise checkpoint.problems[0]
    return checkpoint


def read_family(path: Path) -> Family:
    """The family in a YAML file."""
    try:
        return Family.model_validate(parse_family(path.read_text(encoding="utf-8"), path.name))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        refuse("bad-family", f"family file {str(path)!r}", str(error))


def family_text(family: Family) -> str:
    """A family as a family file."""
    raw = family.model_dump(exclude_defaults=True, mode="json")
    raw["block"], raw["stem"] = _brief(raw["block"]), _brief(raw["stem"])
    if family.parallel is not None:
        raw["parallel"] = family.parallel
    return str(yaml.safe_dump(raw, sort_keys=False, width=120))


def _brief(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Entries that say no more than their roles as these, the way they are written by hand."""
    found: dict[str, Any] = {}
    for name, entry in table.items():
        roles = entry["roles"][0] if len(entry["roles"]) == 1 else entry["roles"]
        found[name] = roles if len(entry) == 1 else {**entry, "roles": roles}
    return found
