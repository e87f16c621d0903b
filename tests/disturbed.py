"""Commands on small models, what each gives undisturbed, and whether an output is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grid
import models
import secateur
from processes import Child
from secateur.engine.journal import work_folder

SHORT = ["--samples", "8", "--length", "16"]
"""Little calibration."""
Listing = Mapping[str, str]
"""What an output says, by file or by figure; measured times left out."""


@dataclass(frozen=True)
class Command:
    """A command with everything but its output.

    Attributes:
        phase: one of its phases, and a number of steps after which much is done and much is not.
        source: the model that it reads.
        resumes: whether the same command goes on where it stood; otherwise it begins again.
    """

    name: str
    words: tuple[str, ...]
    phase: tuple[str, int]
    source: Path
    resumes: bool = True

    def on(self, out: Path) -> list[str]:
        """Words of the whole command line."""
        return [*self.words, "-o", str(out)]


class Garden:
    """Small models and texts, the commands on them, and what each gives undisturbed.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes, self.held_out = root / "notes.txt", root / "held-out.txt"
        self.notes.write_text(models.text(400))
        self.held_out.write_text(models.text(60, seed=1))
        self._straight: dict[str, Listing] = {}
        self._places = 0

    @cached_property
    def model(self) -> Path:
        return models.save(self.root / "model", shard="60KB")

    @cached_property
    def cut(self) -> Path:
        secateur.prune(self.model, method="magnitude", ratio=0.15, output=self.root / "cut")
        return self.root / "cut"

    @cached_property
    def zeros(self) -> Path:
        options = {"spaces": "weights"}
        secateur.prune(self.model, method="magnitude", ratio=0.4, options=options, output=self.root / "zeros")
        return self.root / "zeros"

    @cached_property
    def sliced(self) -> Path:
        data = {"data": self.notes, "samples": 4, "length": 16}
        secateur.prune(self.model, method="slicegpt", ratio=0.15, output=self.root / "sliced", **data)
        return self.root / "sliced"

    def command(self, name: str) -> Command:
        """One of ``NAMES``."""
        notes, held_out = str(self.notes), str(self.held_out)
        if name == "prune":
            asked = ["--method", "fasp", "--ratio", "0.15", "--data", notes, *SHORT, "--text", held_out]
            return Command(name, ("prune", str(self.model), *asked, "--context", "32"), ("cut", 2), self.model)
        if name == "compare":
            asked = ["--methods", "magnitude", "--ratio", "0.15", "--layout", "native", "--text", held_out]
            words = ("compare", str(self.model), *asked, "--context", "32", "--keep")
            return Command(name, words, ("cells", 1), self.model)
        if name == "recover":
            asked = ["--data", notes, "--steps", "12", "--length", "16", "--text", held_out, "--context", "32"]
            sets = [f"--set={k}={v}" for k, v in (("batch", 4), ("every", 4), ("validation", 4), ("rank", 4))]
            return Command(name, ("recover", str(self.cut), *asked, *sets), ("train", 8), self.cut)
        if name == "pack":
            return Command(name, ("pack", str(self.sliced)), ("pack", 1), self.sliced, resumes=False)
        words = ("pack", str(self.zeros), "--form", "sparse")
        return Command(name, words, ("pack", 40), self.zeros, resumes=False)

    def place(self) -> Path:
        """An empty folder."""
        self._places += 1
        folder = self.root / f"place-{self._places}"
        folder.mkdir()
        return folder

    def straight(self, name: str) -> Listing:
        """What the command gives undisturbed."""
        if name not in self._straight:
            folder = self.place()
            ended = Child(self.command(name).on(folder / "out"), folder).wait()
            assert ended.code == 0, ended
            self._straight[name] = listing(folder / "out")
        return self._straight[name]

    def finish(self, command: Command, folder: Path) -> None:
        """Give the command again; it must come to the undisturbed result."""
        ended = Child(command.on(folder / "out"), folder).wait()
        assert ended.code == 0, ended
        self.check(command, folder / "out")

    def check(self, command: Command, out: Path, elsewhere: bool = False) -> None:
        """The output is that of an undisturbed run, and nothing is beside it.

        Args:
            elsewhere: a source or a text lay in another place, which recipes and cards name.
        """
        found, wanted = listing(out), self.straight(command.name)
        if elsewhere:
            found, wanted = ({k: v for k, v in each.items() if not _names_places(k)} for each in (found, wanted))
        assert found == wanted, f"differs: {sorted(set(found.items()) ^ set(wanted.items()))[:4]}"
        assert not work_folder(out).exists(), "a work folder was left behind"


def _names_places(file: str) -> bool:
    return Path(file).name in ("recipe.yaml", "recipe-recover.yaml", "README.md", "secateur.json")


NAMES = ("prune", "compare", "recover", "pack", "pack sparse")
_OF_A_CELL = ("method", "layout", "ratio", "seed", "state", "achieved", "removed", "perplexity", "options")


def listing(out: Path) -> Listing:
    """What an output holds, without times and speeds: hashes of files, and of a comparison its figures."""
    if out.is_file():
        return {out.name: hashlib.sha256(out.read_bytes()).hexdigest()}
    found = grid.hashes(out, *grid.TIMED)
    if (out / "results.jsonl").is_file():
        shown = json.loads((out / "results.json").read_text())
        for file in ("results.json", "results.jsonl", "README.md", "report.html"):
            assert found.pop(file), f"{file} is missing"
        for number, cell in enumerate(shown["cells"]):
            found[f"cell {number}"] = json.dumps({key: cell.get(key) for key in _OF_A_CELL}, sort_keys=True)
    return found


def half_written(command: Command, out: Path, straight: Listing) -> str:
    """What an output that is there lacks, while the command may still run; empty where it is absent or whole."""
    if not os.path.lexists(out):
        return ""
    if command.name == "compare":  # a journal of cells, which grows
        for file, end in (("results.json", "}"), ("report.html", "</html>"), ("README.md", "")):
            if (out / file).is_file() and not (out / file).read_text().rstrip().endswith(end):
                return f"{file} is cut off"
        return "" if (out / "results.jsonl").is_file() else "no journal"
    found = listing(out)
    return "" if found == straight else f"{sorted(set(found.items()) ^ set(straight.items()))[:3]}"


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """The sources must be as they were, times included."""

    def state() -> dict[Path, tuple[int, int, str]]:
        files = (path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*")))
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
            if path.is_file()
        }

    before = state()
    yield
    assert state() == before, "the source was touched"
