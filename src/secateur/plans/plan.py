"""The plan: kept units per space, edits of what survives, bases of the residual stream, sizes before and after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoints import TensorHeader, TensorWriter
from secateur.errors import InternalError, refuse
from secateur.families import Sizes, Survivors
from secateur.families.resizing import sizes_of
from secateur.families.sizes import BlockSizes
from secateur.plans.chart import Chart
from secateur.plans.lazy import OneAtATime, Renamed


@dataclass(frozen=True)
class Artifact:
    """Tensors and JSON-able settings that a method learned; on disk ``NAME.safetensors`` and ``NAME.json``."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    def save(self, folder: Path, name: str) -> None:
        """Write both files."""
        save_file({key: tensor.contiguous() for key, tensor in self.tensors.items()}, folder / f"{name}.safetensors")
        text = json.dumps(dict(self.settings), indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")

    def digest(self) -> str:
        """SHA-256 over settings and tensors."""
        sha = hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode())
        for name in sorted(self.tensors):
            sha.update(name.encode() + self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read both files, given the path of either, or of the folder's name without suffix.

        Raises:
            RequestError: missing or damaged files.
        """
        weights, settings = path.with_suffix(".safetensors"), path.with_suffix(".json")
        for file in (weights, settings):
            if not file.is_file():
                refuse("no-artifact", f"file {str(path)!r}", f"there is no {file.name}", "name PREFIX.safetensors")
        try:
            content = json.loads(settings.read_text(encoding="utf-8"))
            tensors = load_file(weights)
        except (ValueError, SafetensorError) as error:
            refuse("bad-artifact", f"file {str(path)!r}", f"damaged ({error})")
        if not isinstance(content, dict):
            refuse("bad-artifact", f"file {str(settings)!r}", "no JSON object")
        return cls(tensors, content)


_BASES = "plan-bases.safetensors"


@dataclass(frozen=True)
class Mend:
    """What a method decides about one place while it is swept.

    Attributes:
        kept: kept units of its spaces, as in a plan.
        edits: canonical tensors of the place that take the source's place, as in a plan.
        scores: the numbers behind ``kept``, one per unit, by space: drawn in the report.
        masks: which of its weights stay, as in a plan.
        factors: of its edits, as in a plan.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)


class PlaceFiles(Mapping[str, Tensor]):
    """Canonical tensors in a folder, one file per place, each loaded when it is asked for; of masks, one bit each."""

    pattern: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob(self.pattern.format(place="*"))):
            with suppress(SafetensorError), safe_open(path, "pt") as handle:  # a damaged one is written anew
                self._files.update(dict.fromkeys(handle.keys(), path))

    def _path(self, place: str) -> Path:
        return self.folder / self.pattern.format(place=place)

    def write(self, place: str, tensors: Mapping[str, Tensor]) -> str:
        """Put the tensors of a place into its file, in one step; returns the SHA-256 of the file."""
        path = self._path(place)
        temporary = path.with_suffix(".new")
        # one entry: several would be written in any order
        shapes = {"shapes": json.dumps({name: list(tensor.shape) for name, tensor in sorted(tensors.items())})}
        save_file({name: self._stored(tensor) for name, tensor in tensors.items()}, temporary, shapes)
        temporary.replace(path)
        self._files.update(dict.fromkeys(tensors, path))
        return file_digest(path)

    def write_all(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the files of all places; never more than one place's tensors are loaded."""
        for place, names in groupby(sorted(tensors, key=place_of), key=place_of):
            self.write(place, {name: tensors[name] for name in names})

    def digest(self, place: str) -> str:
        """SHA-256 of the file of a place; empty where there is none."""
        path = self._path(place)
        return file_digest(path) if path.is_file() else ""

    def of(self, place: str) -> dict[str, Tensor]:
        """The tensors of a place, loaded."""
        return {name: self[name] for name, path in self._files.items() if path == self._path(place)}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as handle:
            return self._loaded(handle.get_tensor(name), json.loads(handle.metadata()["shapes"])[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _stored(self, tensor: Tensor) -> Tensor:
        """A tensor as it lies in the file."""
        if tensor.dtype == torch.bool:
            return torch.from_numpy(np.packbits(tensor.cpu().flatten().numpy()))
        return tensor.cpu().contiguous()

    def _loaded(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """What ``_stored`` was given."""
        if stored.dtype == torch.uint8:
            bits = np.unpackbits(stored.numpy(), count=prod(shape))
            return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))
        return stored.view(tuple(shape))


class Edits(PlaceFiles):
    """Edited tensors."""

    pattern = "plan-edits-{place}.safetensors"


class Masks(PlaceFiles):
    """Boolean masks."""

    pattern = "plan-masks-{place}.safetensors"


class FactorFiles(PlaceFiles):
    """Parts of matrices that are kept as factors, named as ``secateur.cuts.factors`` says."""

    pattern = "factors-{place}.safetensors"


class Overlay(Mapping[str, Tensor]):
    """The tensors of one mapping, and those of another that it does not have; none is loaded before it is asked for."""

    def __init__(self, over: Mapping[str, Tensor], under: Mapping[str, Tensor]) -> None:
        self._over, self._under = over, under

    def __getitem__(self, name: str) -> Tensor:
        return self._over[name] if name in self._over else self._under[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._over, *self._under)))

    def __len__(self) -> int:
        return len(set(self._over).union(self._under))


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def place_of(name: str) -> str:
    """``stem`` or ``blocks.I`` of a canonical name."""
    parts = name.split(".")
    return parts[0] if parts[0] == "stem" else ".".join(parts[:2])


def _bases_in(path: Path) -> OneAtATime:
    """Tensors of a file; the last one stays, for a basis that serves every block."""

    def load(name: str) -> Tensor:
        with safe_open(path, "pt") as handle:
            found: Tensor = handle.get_tensor(name)
        return found

    with safe_open(path, "pt") as handle:
        return OneAtATime(list(handle.keys()), load)


@dataclass(frozen=True)
class Plan:
    """What a method decided.

    Attributes:
        before: sizes of the dense model.
        after: sizes of the pruned one.
        kept: kept unit indices of every cut space, int64 ascending, by space name; ``blocks`` for a depth cut.
        bases: orthonormal directions of the residual stream that survive, [width, kept] float64: one called
            ``residual`` for all norms, or one for each (``cuts.stream.interfaces``), loaded on access; none where the
            stream is cut by selection (``kept["residual"]``) or not at all.
        edits: canonical tensors that take the source's place before anything is cut, in the shape they have there, by
            name: the mends. What is removed afterwards is zero in the matrices that read it, so the edited model
            computes what the pruned one does. A name the source does not have is a tensor the pruned model adds.
        masks: which weights of a matrix stay, bool in its shape there, by canonical name; the others become zero, after
            the edits. The rest of the matrices stays whole.
        factors: what the edits of some matrices are the products of, by the name of the matrix and of the part; saved
            into the output folder.
        counts: how many weights of a matrix stay, by canonical name: decided before the masks are.
        notes: what the method wants the report to say, JSON-able.
        charts: what it wants the report to draw.
        artifacts: what the method learned and a later run can reuse, by name; saved into the output folder.
    """

    before: Sizes
    after: Sizes
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    edits: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    charts: Sequence[Chart] = ()

    def __post_init__(self) -> None:
        for name, indices in self.kept.items():
            if indices.ndim != 1 or not len(indices) or (indices.diff() <= 0).any():
                raise InternalError("bad-plan", f"kept units of {name}", "not ascending indices")

    @property
    def blocks(self) -> list[int]:
        """Indices of the surviving blocks."""
        kept = self.kept.get("blocks")
        return list(range(len(self.before.blocks))) if kept is None else [int(i) for i in kept]

    @property
    def survivors(self) -> Survivors:
        """The blocks and experts that stay."""
        found = ((block, self.kept.get(f"blocks.{block}.experts")) for block in self.blocks)
        return Survivors(self.blocks, {block: kept.tolist() for block, kept in found if kept is not None})

    def sizes_of(self, block: int) -> BlockSizes:
        """Sizes of a surviving block, by its index in the dense model."""
        return self.after.blocks[self.blocks.index(block)]

    def then(self, later: Plan) -> Plan:
        """This plan and one for the model that it leaves, as one plan for the model before both.

        Args:
            later: sets zeros and edits, in matrices that this plan leaves whole or takes away whole.
        """
        if later.kept or later.bases or later.after != self.after:
            raise InternalError("bad-plan", "one plan behind another", "the later one removes more than single weights")
        name = self.survivors.old_name
        return replace(
            self,
            edits=Overlay(Renamed(later.edits, name), self.edits),
            masks=Overlay(Renamed(later.masks, name), self.masks),
            factors=Overlay(Renamed(later.factors, name), self.factors),
            counts={**self.counts, **{name(matrix): count for matrix, count in later.counts.items()}},
            notes={**self.notes, **later.notes},
            artifacts={**self.artifacts, **later.artifacts},
            charts=(*self.charts, *later.charts),
        )

    def edits_of(self, place: int | None) -> dict[str, Tensor]:
        """The edits of one place, loaded."""
        wanted = "stem" if place is None else f"blocks.{place}"
        return {name: self.edits[name] for name in self.edits if place_of(name) == wanted}

    def masks_of(self, place: int | None) -> dict[str, Tensor]:
        """The masks of one place, loaded."""
        wanted = "stem" if place is None else f"blocks.{place}"
        return {name: self.masks[name] for name in self.masks if place_of(name) == wanted}

    def save(self, folder: Path) -> str:
        """Write ``plan.safetensors``, ``plan.json`` and what lies beside them; returns the SHA-256 over all."""
        tensors = {f"kept.{name}": indices.contiguous() for name, indices in self.kept.items()}
        # a plan without tensors still writes the file, so that a half-written plan is told apart
        save_file(tensors or {"empty": torch.zeros(0)}, folder / "plan.safetensors")
        record = {
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "counts": dict(self.counts),
            "notes": dict(self.notes),
            "charts": [chart.as_dict() for chart in self.charts],
            "artifacts": sorted(self.artifacts),
        }
        for name, artifact in self.artifacts.items():
            artifact.save(folder, name)
        if self.bases:  # one at a time: together they may be larger than the model
            shapes = {name: (self.before.residual, self.after.directions(name)) for name in self.bases}
            headers = [TensorHeader(name, _BASES, "F64", shape) for name, shape in shapes.items()]
            writer = TensorWriter(folder, headers, index=False)
            for name in self.bases:
                writer.write(name, self.bases[name])
        kinds = ((self.edits, Edits(folder)), (self.masks, Masks(folder)), (self.factors, FactorFiles(folder)))
        for changes, files in kinds:
            if not (isinstance(changes, PlaceFiles) and changes.folder == folder):
                files.write_all(changes)
        (folder / "plan.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return self.digest(folder)

    @staticmethod
    def digest(folder: Path) -> str:
        """SHA-256 over a saved plan."""
        sha = hashlib.sha256()
        kinds: tuple[type[PlaceFiles], ...] = (Edits, Masks, FactorFiles)
        parts = [path for kind in kinds for path in sorted(folder.glob(kind.pattern.format(place="*")))]
        for path in (folder / "plan.safetensors", folder / "plan.json", folder / _BASES, *parts):
            if path.is_file():
                sha.update(bytes.fromhex(file_digest(path)))
        return sha.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan that ``save`` wrote."""
        record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "plan.safetensors")
        kept = {name.removeprefix("kept."): t for name, t in tensors.items() if name.startswith("kept.")}
        return cls(
            before=sizes_of(record["before"]),
            after=sizes_of(record["after"]),
            kept=kept,
            bases=_bases_in(folder / _BASES) if (folder / _BASES).is_file() else {},
            edits=Edits(folder),
            masks=Masks(folder),
            factors=FactorFiles(folder),
            counts=record["counts"],
            notes=record["notes"],
            charts=[Chart.from_dict(chart) for chart in record["charts"]],
            artifacts={name: Artifact.load(folder / f"{name}.safetensors") for name in record["artifacts"]},
        )
