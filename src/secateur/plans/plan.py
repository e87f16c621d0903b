"""The plan: kept units per space, optional bases of the residual stream, sizes before and after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoints import TensorHeader, TensorWriter
from secateur.errors import InternalError, refuse
from secateur.families import Sizes
from secateur.families.resizing import sizes_of
from secateur.plans.chart import Chart


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


class _Bases(Mapping[str, Tensor]):
    """Tensors of a file, loaded on access; the last one stays, for a basis that serves every block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as handle:
            self._names = list(handle.keys())
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            with safe_open(self._path, "pt") as handle:
                self._last = (name, handle.get_tensor(name))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
        notes: what the method wants the report to say, JSON-able.
        charts: what it wants the report to draw.
        artifacts: what the method learned and a later run can reuse, by name; saved into the output folder.
    """

    before: Sizes
    after: Sizes
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
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

    def save(self, folder: Path) -> str:
        """Write ``plan.safetensors`` and ``plan.json``; returns the SHA-256 over both."""
        tensors = {f"kept.{name}": indices.contiguous() for name, indices in self.kept.items()}
        # a plan without tensors still writes the file, so that a half-written plan is told apart
        save_file(tensors or {"empty": torch.zeros(0)}, folder / "plan.safetensors")
        record = {
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "notes": dict(self.notes),
            "charts": [chart.as_dict() for chart in self.charts],
            "artifacts": sorted(self.artifacts),
        }
        for name, artifact in self.artifacts.items():
            artifact.save(folder, name)
        if self.bases:  # one at a time: together they may be larger than the model
            shape = (self.before.residual, self.after.residual - self.after.mean_free)
            writer = TensorWriter(
                folder, [TensorHeader(name, _BASES, "F64", shape) for name in self.bases], index=False
            )
            for name in self.bases:
                writer.write(name, self.bases[name])
        (folder / "plan.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return self.digest(folder)

    @staticmethod
    def digest(folder: Path) -> str:
        """SHA-256 over a saved plan."""
        sha = hashlib.sha256()
        for path in (folder / "plan.safetensors", folder / "plan.json", folder / _BASES):
            if path.is_file():
                with path.open("rb") as handle:
                    sha.update(hashlib.file_digest(handle, "sha256").digest())
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
            bases=_Bases(folder / _BASES) if (folder / _BASES).is_file() else {},
            notes=record["notes"],
            charts=[Chart.from_dict(chart) for chart in record["charts"]],
            artifacts={name: Artifact.load(folder / f"{name}.safetensors") for name in record["artifacts"]},
        )
