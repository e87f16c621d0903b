"""How a checkpoint's file spells and splits what the stock class holds: found by saving a small model and looking."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from secateur.families import Architecture
from secateur.families.stock import quiet_transformers
from secateur.inference.anatomy import Anatomy


def names_on_disk(anatomy: Anatomy, architecture: Architecture) -> dict[str, str | tuple[str, ...]]:
    """``Family.disk`` of a small model: tensors are recognised by their values, which are random.

    Args:
        anatomy: the small model.
        architecture: of the same configuration.
    """
    with tempfile.TemporaryDirectory() as folder:
        with quiet_transformers():
            anatomy.model.save_pretrained(folder)
        files = {n: t for path in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(path).items()}
    by_value = {_key(tensor): name for name, tensor in files.items()}
    prefix = architecture.family.blocks + "."
    found: dict[str, str | tuple[str, ...]] = {}
    for name, packed in architecture.packed.items():
        number, _, local = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or name in files or name.partition(".")[2] in files or local in found:
            continue
        module, _, kind = local.rpartition(".")
        whole = by_value.get(_key(anatomy.weights[name]))
        place = f"{prefix}{number}."
        if whole is not None and whole.startswith(place) and whole.endswith(f".{kind}"):
            found[module] = whole.removeprefix(place).removesuffix(f".{kind}")
        elif whole is not None and whole.startswith(place):
            found[local] = whole.removeprefix(place)
        elif whole is None:
            parts = packed.unpack(anatomy.weights[name], architecture.shapes)
            templates = _templates(packed.parts, parts, by_value, place)
            if templates is not None:
                found[local] = templates
    return found


def _templates(
    parts: tuple[tuple[str, ...], ...], tensors: Mapping[str, Tensor], by_value: Mapping[bytes, str], place: str
) -> tuple[str, ...] | None:
    """Names of the parts of one expert with ``{e}`` for its number; None where they do not lie expert by expert."""
    spelled: set[tuple[str, ...]] = set()
    for expert, group in enumerate(parts):
        names = [by_value.get(_key(tensors[name]), "") for name in group]
        if not all(name.startswith(place) and name.endswith(".weight") for name in names):
            return None
        local = (name.removeprefix(place).removesuffix(".weight") for name in names)
        spelled.add(tuple(name.replace(f".{expert}.", ".{e}.") for name in local))
    return spelled.pop() if len(spelled) == 1 else None


def _key(tensor: Tensor) -> bytes:
    """Values and shape of a tensor."""
    return repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()
