"""``pack --form sparse`` and back: a checkpoint folder whose zeros take no bytes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Final

from secateur.api.outputs import passing_workplace, require_free
from secateur.checkpoints import Folder
from secateur.checkpoints.hub import locate
from secateur.engine.packing import mark_packed, pack_folder, unpack_folder
from secateur.engine.progress import Progress
from secateur.engine.publish import publish
from secateur.errors import refuse

SPARSE: Final = "sparse"


def pack_sparse(model: str | Path, output: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """Write a folder with packed weight files; see :func:`secateur.pack`."""
    started = time.perf_counter()
    source = _free(Folder(Path(locate(str(model)))), output, force)
    with passing_workplace(output, force, [source]) as work:
        accounts = pack_folder(source, work / "out", progress)
        mark_packed(work / "out", accounts)
        source.require_unchanged()
        publish(work / "out", output, progress)
    return {
        "output": str(output),
        "bytes": accounts["bytes"],
        "form": SPARSE,
        "packed": accounts,
        "seconds": round(time.perf_counter() - started, 3),
    }


def unpack_sparse(folder: Path, output: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """Write the dense folder of a packed one; see :func:`secateur.unpack`."""
    started = time.perf_counter()
    source = _free(Folder(folder), output, force)
    if not source.is_packed:
        refuse("not-packed", f"unpacking {str(folder)!r}", "its weight files are not packed", "it loads as it is")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if source.dense_bytes > free:
        found = f"its tensors have {source.dense_bytes:,} bytes, {free:,} are free there"
        refuse("no-space", f"unpacking {str(folder)!r}", found, "free some space, or choose another disk")
    with passing_workplace(output, force, [source]) as work:
        unpack_folder(source, work / "out", progress)
        size = Folder(work / "out").bytes
        source.require_unchanged()
        publish(work / "out", output, progress)
    return {
        "output": str(output),
        "form": SPARSE,
        "bytes": size,
        "packed_bytes": source.bytes,
        "tensors": len(source.headers),
        "seconds": round(time.perf_counter() - started, 3),
    }


def _free(source: Folder, output: Path, force: bool) -> Folder:
    require_free(output, force)
    if output.resolve() == source.path.resolve():
        refuse("output-is-input", f"output {str(output)!r}", "it is the model's own folder", "name another folder")
    return source
