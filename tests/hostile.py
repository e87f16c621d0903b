"""Damaged and hostile files, and what reads them: the outcome is a result or a refusal, and nothing else is touched.

A target is a folder with one file that is made bad (``mutations.py``), and a call that reads it.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import encoders
import models
import onnx_nets
import secateur
from mutations import Mutation, of_archive, of_bytes, of_json, of_lines, of_onnx, of_safetensors, of_yaml
from secateur.archives.container import Archive
from secateur.archives.delta_file import DeltaFile
from secateur.checkpoints import Folder
from secateur.data.pairs import read_pairs
from secateur.data.sources import documents
from secateur.data.windows import calibration_windows
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.errors import RequestError
from secateur.graph.onnx_files import read_onnx
from secateur.inference import open_checkpoint
from secateur.inference.opening import FAMILY_FILE, family_text, read_family
from secateur.meters.similarity import ScoredPairs
from secateur.plans import Artifact
from zoo import GQA, Tiny

OUTPUT = "out"
"""What a target writes, if anything, beside its files."""


@dataclass(frozen=True)
class Target:
    """A kind of file, what makes it bad and what reads it.

    Attributes:
        make: fills a folder with good files.
        file: the one that is made bad, by its path in that folder.
        read: reads it; given the folder.
        share: of the cases of a long run.
    """

    make: Callable[[Path], object]
    file: str
    mutate: Mutation
    read: Callable[[Path], object]
    share: float = 1.0


def _model(folder: Path) -> Path:
    return models.save(folder / "model")


def _sharded(folder: Path) -> None:
    models.save(folder / "model", shard="60KB")


def _uneven(folder: Path) -> None:
    options = {"allocation": "global"}
    secateur.prune(
        _model(folder), method="magnitude", ratio=0.2, layout="per-layer", options=options, output=folder / "cut"
    )


def _zeros(folder: Path, **how: Any) -> Path:
    options = {"spaces": "weights"}
    secateur.prune(_model(folder), method="magnitude", ratio=0.4, options=options, output=folder / "zeros", **how)
    return folder / "zeros"


def _packed(folder: Path) -> None:
    _zeros(folder, format="bitmask")


def _delta(folder: Path) -> None:
    model = _model(folder)
    shutil.copytree(model, folder / "tuned")
    tensors = load_file(model / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: t + 0.01 * torch.randn(t.shape, generator=noise) for name, t in tensors.items()}
    save_file(moved, folder / "tuned" / "model.safetensors", {"format": "pt"})
    secateur.delta_pack(model, folder / "tuned", folder / "delta", method="magnitude", ratio=0.9)
    shutil.rmtree(folder / "tuned")


def _archive(folder: Path) -> None:
    (folder / "notes.txt").write_text(models.text(100))
    secateur.prune(
        _model(folder),
        method="slicegpt",
        ratio=0.15,
        data=folder / "notes.txt",
        samples=4,
        length=16,
        output=folder / "sliced",
    )
    secateur.pack(folder / "sliced", folder / "archive", check=False)


def _family(folder: Path) -> None:
    from secateur.families.schema import load_family

    (folder / "family.yaml").write_text(family_text(load_family("qwen3")))


def _recipe(folder: Path) -> None:
    recipe = {
        "model": "model",
        "method": "wanda",
        "ratio": 0.3,
        "data": "notes.txt",
        "samples": 8,
        "target": ["params=70%"],
        "set": {"pattern": "2:4", "allocation": "uniform", "outlier": 5.0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _texts(folder: Path) -> None:
    _model(folder)
    lines = [{"text": models.text(20, i)} for i in range(5)]
    chats = [{"messages": [{"role": "user", "content": models.text(20, i)}]} for i in range(3)]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (*lines, *chats)))
    buffer = io.BytesIO()
    np.save(buffer, np.arange(400) % 200)
    (folder / "ids.npy").write_bytes(buffer.getvalue())


def _onnx(folder: Path) -> None:
    (folder / "net.onnx").write_bytes(onnx_nets.HAND["blocks"]().SerializeToString())


def _parquet(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    _model(folder)
    table = pyarrow.table({"text": [models.text(20, i) for i in range(8)]})
    pyarrow.parquet.write_table(table, folder / "data.parquet")


def _encoder(folder: Path) -> None:
    encoders.save(folder / "encoder", pooling="mean_tokens")
    encoders.write_pairs(folder / "pairs.jsonl")
    encoders.write_scored(folder / "scored.jsonl")


def _unknown(folder: Path) -> None:
    """A model without a family file of ours, and the one beside it that was inferred."""
    config = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8}
    models.save(folder / "model", Tiny({**GQA, **config}, model_type="arcee"))
    (folder / "model" / FAMILY_FILE).write_text(family_text(open_checkpoint(folder / "model").architecture.origin))


def _policy(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(4, 8, generator=generator), "bias": torch.randn(4, generator=generator)}
    Artifact(tensors, {"format": 1, "sizes": [4, 8], "rate": 0.5}).save(folder, "policy")


def _training(folder: Path) -> None:
    """A recovery that was interrupted behind a point at which its state was saved, and what it would have given."""
    (folder / "notes.txt").write_text(models.text(200))
    _model(folder)
    _recover(folder, "done")
    with pytest.raises(KeyboardInterrupt):
        _recover(folder, "out", _Stop("train", 6))
    (folder / ".out.secateur").rename(folder / "interrupted")


def _recover(folder: Path, output: str, progress: Silent | None = None) -> None:
    options = {"batch": 2, "every": 4, "validation": 2, "rank": 2}
    how = {"data": folder / "notes.txt", "steps": 8, "length": 8, "options": options, "progress": progress}
    secateur.recover(folder / "model", output=folder / output, **how)


def resume_training(folder: Path) -> None:
    """The same training again, whatever became of its state."""
    _resumed(folder, _recover)


def _windows(source: str) -> Callable[[Path], object]:
    return lambda folder: calibration_windows(str(folder / source), folder / "model", 300, 4, 16, 0)


def _headers(name: str) -> Callable[[Path], object]:
    return lambda folder: Folder(folder / name).headers


def _tensors(folder: Path) -> None:
    found = Folder(folder / "zeros")
    for _ in found.read(found.headers):
        pass


def _preview(name: str) -> Callable[[Path], object]:
    return lambda folder: secateur.preview(folder / name, method="magnitude", ratio=0.2)


class _Stop(Silent):
    """Interrupts a run in the middle of a phase."""

    def __init__(self, phase: str, steps: int) -> None:
        self.phase, self.steps, self.what = phase, steps, ""

    def start(self, what: str, total: int) -> None:
        del total
        self.what = what

    def step(self, done: int) -> None:
        if self.what == self.phase and done >= self.steps:
            raise KeyboardInterrupt


def _interrupted(folder: Path) -> None:
    (folder / "notes.txt").write_text(models.text(200))
    _model(folder)
    _run(folder, "done")
    with pytest.raises(KeyboardInterrupt):
        _run(folder, "out", _Stop("cut", 2))
    (folder / ".out.secateur").rename(folder / "interrupted")


def _run(folder: Path, output: str, progress: Silent | None = None) -> None:
    options = {"ratio": 0.2, "data": folder / "notes.txt", "samples": 8, "length": 16, "progress": progress}
    secateur.prune(folder / "model", method="fasp", output=folder / output, **options)


def resume(folder: Path) -> None:
    """The same command again: the bytes of a straight run, whatever became of its journal and files."""
    _resumed(folder, _run)


def _resumed(folder: Path, run: Callable[[Path, str], None]) -> None:
    work = folder / ".out.secateur"
    shutil.copytree(folder / "interrupted", work)
    try:
        run(folder, "out")
        written, straight = ((folder / name / "model.safetensors").read_bytes() for name in ("out", "done"))
        assert written == straight, "a resumed run wrote something else"
    finally:
        shutil.rmtree(work, ignore_errors=True)


TARGETS: Mapping[str, Target] = {
    "header": Target(_model, "model/model.safetensors", of_safetensors, _headers("model"), 8),
    "index": Target(_sharded, "model/model.safetensors.index.json", of_json, _headers("model"), 8),
    "config": Target(_model, "model/config.json", of_json, _preview("model"), 1),
    "preview of a header": Target(_model, "model/model.safetensors", of_safetensors, _preview("model"), 0.3),
    "record of layers": Target(_uneven, "cut/secateur.json", of_json, _headers("cut"), 4),
    "preview of a record": Target(_uneven, "cut/secateur.json", of_json, _preview("cut"), 0.3),
    "tokenizer": Target(_texts, "model/tokenizer.json", of_json, _windows("data.jsonl"), 1),
    "tokenizer's configuration": Target(_texts, "model/tokenizer_config.json", of_json, _windows("data.jsonl"), 0.3),
    "lines of JSON": Target(_texts, "data.jsonl", of_lines, _windows("data.jsonl"), 1),
    "token ids": Target(_texts, "ids.npy", of_bytes, _windows("ids.npy"), 8),
    "family": Target(_family, "family.yaml", of_yaml, lambda f: read_family(f / "family.yaml"), 4),
    "recipe": Target(_recipe, "recipe.yaml", of_yaml, lambda f: make_request({}, f / "recipe.yaml"), 8),
    "packed weights": Target(_packed, "zeros/packed.safetensors", of_safetensors, _tensors, 8),
    "unpacking": Target(
        _packed, "zeros/packed.safetensors", of_safetensors, lambda f: secateur.unpack(f / "zeros", f / "out"), 0.5
    ),
    "delta": Target(_delta, "delta", of_safetensors, lambda f: DeltaFile(f / "delta"), 8),
    "applying a delta": Target(
        _delta, "delta", of_safetensors, lambda f: secateur.delta_apply(f / "model", f / "delta", f / "out"), 0.5
    ),
    "journal": Target(_interrupted, "interrupted/journal.jsonl", of_lines, resume, 0.06),
    "plan": Target(_interrupted, "interrupted/plan.json", of_json, resume, 0.03),
    "kept units": Target(_interrupted, "interrupted/plan.safetensors", of_safetensors, resume, 0.03),
    "edits": Target(_interrupted, "interrupted/plan-edits-blocks.1.safetensors", of_safetensors, resume, 0.03),
    "decision": Target(_interrupted, "interrupted/decided/plan.json", of_json, resume, 0.03),
    "half an output": Target(_interrupted, "interrupted/out/model.safetensors", of_safetensors, resume, 0.03),
    "state of a training": Target(_training, "interrupted/state-4.safetensors", of_safetensors, resume_training, 0.03),
    "journal of a training": Target(_training, "interrupted/journal.jsonl", of_lines, resume_training, 0.03),
    "artifact": Target(_policy, "policy.safetensors", of_safetensors, lambda f: Artifact.load(f / "policy"), 4),
    "settings of an artifact": Target(_policy, "policy.json", of_json, lambda f: Artifact.load(f / "policy"), 2),
    "parquet": Target(_parquet, "data.parquet", of_bytes, lambda f: list(documents(str(f / "data.parquet"))), 4),
    "steps of an encoder": Target(_encoder, "encoder/modules.json", of_json, _preview("encoder"), 0.3),
    "pooling": Target(_encoder, "encoder/1_Pooling/config.json", of_json, _preview("encoder"), 0.3),
    "pairs": Target(_encoder, "pairs.jsonl", of_lines, lambda f: read_pairs(str(f / "pairs.jsonl")), 4),
    "scored pairs": Target(_encoder, "scored.jsonl", of_lines, lambda f: ScoredPairs.read(str(f / "scored.jsonl")), 4),
    "family beside a model": Target(_unknown, f"model/{FAMILY_FILE}", of_yaml, _preview("model"), 0.1),
    "configuration of an unknown type": Target(_unknown, "model/config.json", of_json, _preview("model"), 0.1),
    "ONNX": Target(_onnx, "net.onnx", of_onnx, lambda f: read_onnx(f / "net.onnx"), 4),
    "cut of an ONNX": Target(
        _onnx,
        "net.onnx",
        of_onnx,
        lambda f: secateur.prune(
            f / "net.onnx", method="spa", ratio=0.3, tolerance=1.0, output=f / OUTPUT / "cut.onnx"
        ),
        0.3,
    ),
    "archive": Target(_archive, "archive", of_archive, lambda f: Archive.load(f / "archive"), 8),
    "unpacking an archive": Target(
        _archive, "archive", of_archive, lambda f: secateur.unpack(f / "archive", f / "out"), 0.2
    ),
}


class Sandbox:
    """A folder with the files of a target, beside one that nothing may touch.

    Args:
        root: an empty folder.
        target: what to read there.
    """

    def __init__(self, root: Path, target: Target) -> None:
        self.root, self.target = root, target
        self.folder = root / "inside"
        self.folder.mkdir(parents=True)
        target.make(self.folder)
        (root / "canary").write_text("nothing may touch this")
        self.file = self.folder / target.file
        self.good = self.file.read_bytes()
        self.before = self._listing()

    def _listing(self) -> dict[str, int]:
        """Every file but the bad one, with when it was written."""
        files = (path for path in self.root.rglob("*") if path.is_file() and path != self.file)
        return {str(path.relative_to(self.root)): path.stat().st_mtime_ns for path in files}

    def try_one(self, random: Random) -> str:
        """``read`` or ``refused``.

        Raises:
            AssertionError: something else than the output was written, or a refusal left one behind.
            Exception: whatever else came out of it.
        """
        self.file.write_bytes(self.target.mutate(self.good, random))
        output = self.folder / OUTPUT
        outcome, said = "read", ("", "")
        try:
            self.target.read(self.folder)
        except RequestError as error:
            outcome, said = "refused", (error.asked, error.found)
        if outcome == "refused":
            assert all(said), "a refusal that says nothing"
            assert not output.exists(), "a refusal left its output behind"
        after = {name: time for name, time in self._listing().items() if not (self.root / name).is_relative_to(output)}
        assert after == self.before, f"touched: {sorted(set(after.items()) ^ set(self.before.items()))[:3]}"
        return outcome

    def restore(self) -> None:
        """Everything as it was, for the next case."""
        shutil.rmtree(self.folder / OUTPUT, ignore_errors=True)
        self.file.write_bytes(self.good)
        self.before = self._listing()
