"""Checkpoints of a training: safetensors beside the output, one line of the journal each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.engine.journal import Journal
from secateur.errors import InternalError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Snapshots:
    """Saves and restores parameters and an AdamW optimiser.

    ``state-STEP`` holds everything needed to go on, ``kept-STEP`` the parameters of the best point so far. Files of
    older points go when a newer point is in the journal.

    Args:
        work: folder of the files.
        journal: holds one line per point, with the hashes of its files.
        params: what trains, by name.
    """

    def __init__(
        self, work: Path, journal: Journal, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.work, self.journal, self.params, self.optimizer = work, journal, params, optimizer

    @staticmethod
    def best_of(curve: list[dict[str, Any]], keep: str) -> dict[str, Any]:
        """The point whose weights are kept: the lowest validation (the earliest of equals), or the last."""
        measured = [point for point in curve if point["validation"] is not None]
        return min(measured, key=lambda point: float(point["validation"])) if measured and keep == "best" else curve[-1]

    def save(self, point: dict[str, Any], curve: list[dict[str, Any]], keep: str) -> dict[str, Any]:
        """Write a point's files, then its line; returns the line."""
        step = point["steps"]
        point["files"] = {f"state-{step}": self._write(f"state-{step}", self._state())} if step else {}
        best = self.best_of([*curve, point], keep)
        if best is point:
            name = f"kept-{step}"
            point["files"][name] = self._write(name, {key: p.detach() for key, p in self.params.items()})
        else:
            name = f"kept-{best['steps']}"
            point["files"][name] = best["files"][name]
        self.journal.add("point", **point)
        for path in self.work.glob("*-*.safetensors"):
            if path.stem not in point["files"]:
                path.unlink()
        return point

    def _state(self) -> dict[str, Tensor]:
        found = {key: parameter.detach() for key, parameter in self.params.items()}
        for key, parameter in self.params.items():
            found.update({f"{key}.{name}": self.optimizer.state[parameter][name] for name in _MOMENTS})
        return found

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        path = self._path(name)
        temporary = path.with_suffix(".new")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        temporary.replace(path)
        return _digest(path)

    def _path(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def resume(self) -> list[dict[str, Any]]:
        """The curve up to the last point whose files are as they were written, its state restored; else empty."""
        records = self.journal.done("point")
        starts = [index for index, record in enumerate(records) if not record["steps"]]
        if not starts or not all(  # a journal may have lost its first line
            self._path(name).is_file() and _digest(self._path(name)) == digest
            for name, digest in records[-1]["files"].items()
        ):
            return []
        last = records[-1]
        if last["steps"]:
            saved = load_file(self._path(f"state-{last['steps']}"))
            self._load(saved)
            for key, parameter in self.params.items():
                moments = {name: saved[f"{key}.{name}"].to(parameter.device) for name in _MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(last["steps"])), **moments}
        return records[starts[-1] :]  # of several starts, the last: an earlier one was not believed

    def restore(self, point: dict[str, Any]) -> None:
        """Put the weights of a kept point into the model."""
        name = f"kept-{point['steps']}"
        path = self._path(name)
        if not path.is_file() or _digest(path) != point["files"][name]:
            raise InternalError("checkpoint", f"weights of step {point['steps']}", f"{path} is damaged", "delete it")
        self._load(load_file(path))

    @torch.no_grad()
    def _load(self, saved: Mapping[str, Tensor]) -> None:
        for key, parameter in self.params.items():
            parameter.copy_(saved[key])


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
