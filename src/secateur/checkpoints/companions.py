"""Copy the files that travel with the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
