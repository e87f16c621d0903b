"""One prune, from request to published folder: plan, write, verify, publish."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from secateur.checkpoints import Checkpoint, OutputLayout, TensorWriter, output_layout
from secateur.checkpoints.companions import copy_companions
from secateur.checkpoints.folder import CONFIG, RECORD
from secateur.cuts import cut_architecture
from secateur.data.windows import Windows
from secateur.engine.journal import Journal, raised_damping, work_folder
from secateur.engine.packing import packed_result
from secateur.engine.planning import Planning
from secateur.engine.prepare import Prepared, draw_windows
from secateur.engine.progress import Progress
from secateur.engine.publish import publish
from secateur.engine.sweeps import cut_sweep
from secateur.engine.verify import verify_output
from secateur.errors import refuse
from secateur.families import Architecture
from secateur.families.loading import loads_in
from secateur.families.resizing import layer_record, modeling_file
from secateur.plans import Artifact, FactorFiles, Plan
from secateur.version import __version__

LEARNED: Final = "learned"


class Run:
    """The phases of a prune. Everything is written beside the output until ``publish`` moves it there in one step.

    Args:
        prepared: the resolved request.
        output: the folder to appear.
        progress: who is told.
    """

    def __init__(self, prepared: Prepared, output: Path, progress: Progress) -> None:
        self.prepared, self.output, self.progress = prepared, output, progress
        self.work = work_folder(output)
        self.result = self.work / "out"
        self.windows = self._draw_windows()
        self.texts = {name: self._drawn(source) for name, source in prepared.method.texts().items()}
        self.artifacts = {name: Artifact.load(Path(path)) for name, path in prepared.method.files().items()}
        self.work.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.work, self._fingerprint())
        if self.journal.resumed:
            progress.note(f"resuming the run in {self.work.name}")

    @property
    def checkpoint(self) -> Checkpoint:
        return self.prepared.checkpoint

    def _draw_windows(self) -> Windows | None:
        request, method = self.prepared.request, self.prepared.method
        if method.data == "none":
            return None
        if request.data is None:
            refuse(
                "no-data",
                f"method {method.name}",
                "it needs calibration text and --data is not given",
                "--data notes.txt",
            )
        return self._drawn(request.data)

    def _drawn(self, source: str) -> Windows:
        """Windows of a text, as the request wants them."""
        request = self.prepared.request
        return draw_windows(
            source,
            self.checkpoint,
            request.samples,
            request.length,
            request.seed,
            request.text_field,
            request.trust_remote_code,
        )

    def _fingerprint(self) -> dict[str, Any]:
        request = self.prepared.request
        return {
            "version": __version__,
            "model": model_digest(self.checkpoint),
            "method": self.prepared.method.name,
            "options": self.prepared.method.model_dump(mode="json"),
            "artifacts": {name: artifact.digest() for name, artifact in self.artifacts.items()},
            "targets": [str(target) for target in request.targets],
            "data": None if self.windows is None else self.windows.record(),
            **({"texts": {name: text.record() for name, text in self.texts.items()}} if self.texts else {}),
            "layout": request.layout,
            "format": request.format,
            "quantum": request.quantum,
            "tolerance": request.tolerance,
            "device": self.prepared.device.type,
            "dtype": str(self.prepared.dtype),
            "threads": torch.get_num_threads(),
            "seed": request.seed,
        }

    # -- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide, or take the decision of the interrupted run."""
        recorded = self.journal.done("plan")
        if recorded and Plan.digest(self.work) == recorded[-1]["sha256"]:
            return Plan.load(self.work)
        plan = Planning(
            self.prepared, self.windows, self.texts, self.artifacts, self.work, self.journal, self.progress
        ).plan()
        self.journal.add("plan", sha256=plan.save(self.work))
        return Plan.load(self.work)

    # -- write -----------------------------------------------------------------------------------------------------

    def target(self, plan: Plan) -> Architecture:
        """Architecture of the output."""
        return cut_architecture(self.checkpoint.architecture, plan, self.prepared.request.layout)

    def write(self, plan: Plan) -> dict[str, Any]:
        """Write the output folder and check that it reloads.

        Returns:
            The record that lies in the folder as ``secateur.json``.
        """
        target = self.target(plan)
        layout = output_layout(self.checkpoint, target, plan.survivors)
        writer = TensorWriter(self.result, layout.headers)
        digests = cut_sweep(
            self.checkpoint, target, plan, layout, writer, self.journal, self.progress, self.prepared.device
        )
        left_behind = self._copy_companions(target)
        for name, artifact in plan.artifacts.items():
            (self.result / LEARNED).mkdir(exist_ok=True)  # apart: runtimes take every *.safetensors beside the weights
            artifact.save(self.result / LEARNED, name)
        if len(plan.factors):
            (self.result / LEARNED).mkdir(exist_ok=True)
            FactorFiles(self.result / LEARNED).write_all(plan.factors)
        if not self.journal.newer("verified", than="cut"):
            self.progress.start("verify", 1)
            self._write_resize(target)
            version = verify_output(self.checkpoint, target, plan, self.result, writer, digests)
            self.progress.step(1)
            self.journal.add("verified", transformers=version)
        record = self._record(plan, target, layout, digests, left_behind)
        (self.result / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.prepared.request.format == "bitmask":
            self.result, record = packed_result(self.result, self.work / "packed", self.journal, self.progress)
        return record

    def _copy_companions(self, target: Architecture) -> list[str]:
        """Write config.json, copy every other file of the source; returns weight files of other formats, left out."""
        own = {self.output.resolve(), self.work.resolve()}
        left = copy_companions(self.checkpoint.folder.path, self.result, own)
        (self.result / CONFIG).write_text(json.dumps(target.raw, indent=2) + "\n", encoding="utf-8")
        return left

    def _write_resize(self, target: Architecture) -> None:
        """Where layers differ: how, and the modelling file that knows what to do about it."""
        if target.per_layer:
            (self.result / RECORD).write_text(json.dumps({"resize": layer_record(target)}) + "\n", encoding="utf-8")
            shutil.copyfile(modeling_file(), self.result / modeling_file().name)

    def _record(
        self, plan: Plan, target: Architecture, layout: OutputLayout, digests: dict[str, str], left_behind: list[str]
    ) -> dict[str, Any]:
        prepared = self.prepared
        return {
            "secateur": __version__,
            "method": prepared.method.name,
            "requested": requested(prepared),
            "before": asdict(plan.before),
            "after": asdict(plan.after),
            "notes": {**plan.notes, **raised_damping(self.work)},
            **({"resize": layer_record(target)} if target.per_layer else {}),
            "plan_sha256": Plan.digest(self.work),
            "data": None if self.windows is None else self.windows.record(),
            **({"texts": {name: text.record() for name, text in self.texts.items()}} if self.texts else {}),
            "loads_in": {
                "transformers": f"verified({self.journal.done('verified')[-1]['transformers']})",
                **loads_in(target.family, plan.before, plan.after, prepared.request.layout),
            },
            "passthrough": sorted(header.name for _, header in layout.copies),
            "left_behind": left_behind,
            "tensors": dict(sorted(digests.items())),
        }

    # -- publish ---------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Let the output appear and drop the work folder."""
        publish(self.result, self.output, self.progress)


def requested(prepared: Prepared) -> dict[str, Any]:
    """The request as it is reported."""
    request = prepared.request
    return {
        "ratio": request.ratio,
        "target": list(request.target),
        "options": prepared.method.model_dump(mode="json"),
        "quantum": request.quantum,
        "layout": request.layout,
        "format": request.format,
        "seed": request.seed,
    }


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the configuration and, for every weight file, its name, size, time and header."""
    folder = checkpoint.folder
    sha = hashlib.sha256((folder.path / CONFIG).read_bytes())
    for name in folder.files:
        path = folder.path / name
        state = path.stat()
        with path.open("rb") as handle:
            header = handle.read(8 + int.from_bytes(handle.read(8), "little"))
        sha.update(f"{name} {state.st_size} {state.st_mtime_ns}".encode() + header)
    return sha.hexdigest()
