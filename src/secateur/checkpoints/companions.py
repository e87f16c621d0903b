"""Copy the files that travel with the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from secateur.checkpoints.folder import INDEX, PACKED_INDEX

_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".safetensors", ".onnx", ".gguf")
CARD: Final = "README.md"
SOURCE_CARD: Final = "README.source.md"


def copy_folder(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy files by content into a folder that may exist.

    Permissions are not copied: a read-only source must not make a read-only output. Links to files are followed.

    Args:
        wanted: asked with the path of every file and folder; what it denies is left out.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = Path(entry.path)
        if not wanted(path):
            continue
        if entry.is_dir(follow_symlinks=False):
            copy_folder(path, target / entry.name, wanted)
        elif entry.is_file():
            shutil.copyfile(path, target / entry.name)


def companions_of(folder: Path) -> list[str]:
    """Names of the files that travel with the weights of a checkpoint folder, weights of any format left out."""
    found: list[str] = []

    def walk(path: Path) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name == INDEX or entry.name.startswith(".git"):
                continue
            if entry.is_dir(follow_symlinks=False):
                walk(Path(entry.path))
            elif entry.is_file() and Path(entry.name).suffix not in _OTHER_WEIGHTS:
                found.append(Path(entry.path).relative_to(folder).as_posix())

    walk(folder)
    return found


def copy_companions(source: Path, target: Path, own: Collection[Path], whole: Collection[str] = ()) -> list[str]:
    """Copy everything but weights from one checkpoint folder to another; the card steps aside as README.source.md.

    Where the source has a README.source.md already, its card is one of ours, and the older one stays.

    Args:
        own: resolved folders of the run itself, which may lie in the source.
        whole: names of folders that are copied with all that is in them.

    Returns:
        Weight files of other formats: they would be stale, and are left out.
    """
    left: list[str] = []

    def wanted(path: Path) -> bool:
        if path.resolve() in own or path.name in (INDEX, PACKED_INDEX) or path.name.startswith(".git"):
            return False
        if path.is_dir() or path.suffix not in _OTHER_WEIGHTS or path.relative_to(source).parts[0] in whole:
            return True
        if path.suffix != ".safetensors":
            left.append(str(path.relative_to(source)))
        return False

    copy_folder(source, target, wanted)
    # asked of the source: a card in the target may also be ours, of an interrupted run
    if (source / CARD).is_file() and not (source / SOURCE_CARD).is_file():
        (target / CARD).replace(target / SOURCE_CARD)
    return sorted(left)
