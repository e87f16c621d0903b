"""The last step of a run: its folder appears under the name asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

from secateur.engine.journal import work_folder
from secateur.engine.progress import Progress


def publish(result: Path, output: Path, progress: Progress) -> None:
    """Let ``result`` appear as ``output``; drops the work folder."""
    appear(result, output, progress)
    shutil.rmtree(work_folder(output))


def appear(result: Path, output: Path, progress: Progress) -> None:
    """Give a file or folder its name by one rename, an old one moved aside first."""
    if output.exists():
        aside = next_free(output)
        output.rename(aside)
        progress.note(f"the old {output.name} is now {aside.name}")
    result.rename(output)


def next_free(folder: Path) -> Path:
    """``OUT.previous``, ``OUT.previous-2``, ...: the first that does not exist."""
    aside, number = folder.with_name(f"{folder.name}.previous"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.previous-{number}")
    return aside
