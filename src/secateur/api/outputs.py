"""What every command that writes a folder does around its work."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import nn

from secateur.checkpoints import Checkpoint, Folder
from secateur.engine.journal import JOURNAL, LOCK, locked, work_folder
from secateur.engine.request import Request
from secateur.errors import InternalError, RequestError, refuse
from secateur.meters.counts import count, nonzero
from secateur.scores.ridge import take_raised

_MACHINE: Final = {
    errno.ENOSPC: "no-space",
    errno.EDQUOT: "no-space",
    errno.EFBIG: "no-space",
    errno.EROFS: "unwritable",
    errno.EACCES: "unwritable",
    errno.EPERM: "unwritable",
    errno.EIO: "disk-failed",
}
_AGAIN: Final = "make it possible, and give the same command again"


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` did; ``as_dict`` gives the keys of the command's JSON object.

    ``model`` is the pruned module when a module was passed in, ``recipe`` the request as YAML, ``packed`` the bytes of
    a packed output by the kind of storage, ``spearman`` the rank correlation of embeddings before and after.
    """

    method: str
    requested: dict[str, Any]
    achieved: dict[str, Any]
    perplexity: dict[str, Any] | None
    seconds: float
    peak_rss_bytes: int
    output: str | None
    layout: str
    loads_in: dict[str, str]
    seed: int
    packed: dict[str, Any] | None = None
    spearman: dict[str, Any] | None = None
    recipe: str = field(default="", repr=False)
    model: nn.Module | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        left_out = ("recipe", "model", *(key for key in ("packed", "spearman") if getattr(self, key) is None))
        return {key: value for key, value in vars(self).items() if key not in left_out}


def require_output(request: Request, what: str) -> Path:
    """The folder to write; it must be named, and free unless ``--force`` is given."""
    if request.output is None:
        refuse("no-output", what, "no output folder is named", "-o small/")
    return require_free(Path(request.output), request.force)


def require_free(output: Path, force: bool) -> Path:
    """A file or folder to write; one that exists is refused unless it may be moved aside."""
    if (output.exists() or output.is_symlink()) and not force:
        hint = "choose another name, or --force to move the old one aside"
        refuse("output-exists", f"output {str(output)!r}", "it exists already", hint)
    return output


def require_text(request: Request) -> None:
    """The held-out text must be there, and so must scored pairs; they are not opened."""
    for name in ("text", "pairs"):
        path = getattr(request, name, None)
        if path is not None and not Path(path).is_file():
            refuse("no-text", f"{name} {path!r}", "there is no such file")


@contextmanager
def faults_told(output: Path, sources: Sequence[Folder]) -> Iterator[None]:
    """What the machine refuses while an output is made, said as every other failure is.

    Args:
        sources: what it is made from; whatever fails once somebody has written to one of them is blamed on that.

    Raises:
        RequestError: a source changed.
        InternalError: no space, or no permission, where the output is made.
    """
    try:
        with _blamed(sources):
            yield
    except (OSError, SafetensorError) as error:
        said = str(error)
        number = error.errno if isinstance(error, OSError) else _number_in(said)
        if number not in _MACHINE:
            raise
        file = f" ({Path(str(error.filename)).name})" if isinstance(error, OSError) and error.filename else ""
        found = f"{os.strerror(number)}{file}"
        raise InternalError(_MACHINE[number], f"writing {str(output)!r}", found, _AGAIN) from error


@contextmanager
def _blamed(sources: Sequence[Folder]) -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Exception:
        for source in sources:
            source.require_unchanged()
        raise


def _number_in(said: str) -> int:
    """The number of the system's error that safetensors only tells of in words; 0 where there is none."""
    found = re.search(r"os error (\d+)", said)
    return int(found.group(1)) if found else 0


@contextmanager
def passing_workplace(output: Path, force: bool, sources: Sequence[Folder] = ()) -> Iterator[Path]:
    """A work folder beside an output that is made in one go: gone at the end, however it ends.

    What a killed process left there goes first; an interrupted run is not touched.

    Args:
        sources: see :func:`faults_told`.
    """
    work = work_folder(output)
    with locked(work):
        require_free(output, force)
        if (work / JOURNAL).exists():
            found = f"{work.name} holds an interrupted run of another command"
            refuse("other-request", f"output {str(output)!r}", found, f"finish that run, or delete {work.name}")
        try:
            for left in set(work.iterdir()) - {work / LOCK}:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            with faults_told(output, sources):
                yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@dataclass
class Workplace:
    """The work folder of a run; once it is ``precious``, a refusal leaves it for the corrected request."""

    folder: Path
    precious: bool = False


@contextmanager
def workplace(output: Path, inputs: Sequence[Checkpoint], free: bool) -> Iterator[Workplace]:
    """Hold the work folder of an output that is none of the inputs.

    A refused request leaves no work folder behind, unless it holds somebody else's work.

    Args:
        free: whether an output may be there already, to be moved aside or gone on with.
    """
    if output.resolve() in {checkpoint.folder.path.resolve() for checkpoint in inputs}:
        refuse("output-is-input", f"output {str(output)!r}", "it is the model's own folder", "name another folder")
    place = Workplace(work_folder(output))
    with locked(place.folder):
        take_raised()  # of whatever failed in this process before
        fresh = [path.name for path in place.folder.iterdir()] == [LOCK]
        try:
            if not free:
                require_free(output, force=False)  # again: another process may have made it meanwhile
            with faults_told(output, [checkpoint.folder for checkpoint in inputs]):
                yield place
        except RequestError:
            if fresh and not place.precious:  # while the lock is held: the folder is nobody else's
                shutil.rmtree(place.folder, ignore_errors=True)
            raise


def achieved_of(before: Checkpoint, after: Checkpoint, zeros: bool = False) -> dict[str, int]:
    """Sizes and costs of both, those of the first under ``..._before``.

    Args:
        zeros: count the parameters that are not zero, too: weights went one by one.
    """
    new, old = count(after), count(before)
    if zeros:
        new, old = ({**counts, "nonzero": nonzero(of)} for counts, of in ((new, after), (old, before)))
    return {**new, **{f"{key}_before": value for key, value in old.items()}}
