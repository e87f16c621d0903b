"""The plan: kept units per space, an optional basis of the residual stream, sizes before and after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import InternalError, refuse
from secateur.families import BlockSizes, Sizes


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


@dataclass(frozen=True)
class Plan:
    """What a method decided.

    Attributes:
        before: sizes of the dense model.
        after: sizes of the pruned one.
        kept: kept unit indices of every cut space, int64 ascending, by space name; ``blocks`` for a depth cut.
        basis: orthonormal directions of the residual stream that survive, [width, kept] float64; None where the stream
            is cut by selection (``kept["residual"]``) or not at all.
        notes: what the method wants the report to say, JSON-able.
        artifacts: what the method learned and a later run can reuse, by name; saved into the output folder.
    """

    before: Sizes
    after: Sizes
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    basis: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)

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
        if self.basis is not None:
            tensors["basis"] = self.basis.contiguous()
        # a plan without tensors still writes the file, so that a half-written plan is told apart
        save_file(tensors or {"empty": torch.zeros(0)}, folder / "plan.safetensors")
        record = {
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "notes": dict(self.notes),
            "artifacts": sorted(self.artifacts),
        }
        for name, artifact in self.artifacts.items():
            artifact.save(folder, name)
        (folder / "plan.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return self.digest(folder)

    @staticmethod
    def digest(folder: Path) -> str:
        """SHA-256 over a saved plan."""
        sha = hashlib.sha256()
        for name in ("plan.safetensors", "plan.json"):
            sha.update((folder / name).read_bytes())
        return sha.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan that ``save`` wrote."""
        record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "plan.safetensors")
        kept = {name.removeprefix("kept."): t for name, t in tensors.items() if name.startswith("kept.")}
        return cls(
            before=_sizes(record["before"]),
            after=_sizes(record["after"]),
            kept=kept,
            basis=tensors.get("basis"),
            notes=record["notes"],
            artifacts={name: Artifact.load(folder / f"{name}.safetensors") for name in record["artifacts"]},
        )


def _sizes(record: dict[str, Any]) -> Sizes:
    blocks = tuple(BlockSizes(**block) for block in record.pop("blocks"))
    return Sizes(blocks=blocks, **record)
