"""What every command that writes a folder does around its work."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur.checkpoints import Checkpoint
from secateur.engine.journal import locked, work_folder
from secateur.engine.request import Request
from secateur.errors import RequestError, refuse
from secateur.meters.counts import count, nonzero


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` did; ``as_dict`` gives the keys of the command's JSON object.

    ``model`` is the pruned module when a module was passed in, ``recipe`` the request as YAML, ``packed`` the bytes of
    a packed output by the kind of storage, ``spearman`` the rank correlation of embeddings before and after.
    """

    method: str
    requested: dict[str, Any]
    achieved: dict[str, int]
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
    if output.exists() and not force:
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
def passing_workplace(output: Path) -> Iterator[Path]:
    """A work folder beside an output that is made in one go: gone at the end, however it ends."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = work_folder(output)
    with locked(work):
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@dataclass
class Workplace:
    """The work folder of a run; once it is ``precious``, a refusal leaves it for the corrected request."""

    folder: Path
    precious: bool = False


@contextmanager
def workplace(output: Path, inputs: Sequence[Checkpoint]) -> Iterator[Workplace]:
    """Hold the work folder of an output that is none of the inputs.

    A refused request leaves no work folder behind, unless it holds somebody else's work.
    """
    if output.resolve() in {checkpoint.folder.path.resolve() for checkpoint in inputs}:
        refuse("output-is-input", f"output {str(output)!r}", "it is the model's own folder", "name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    place = Workplace(work_folder(output))
    existed = place.folder.exists()
    try:
        with locked(place.folder):
            yield place
    except RequestError:
        if not existed and not place.precious:
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
