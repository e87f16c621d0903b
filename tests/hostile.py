"""Damaged and hostile files, and what reads them: the outcome is a result or a refusal, and nothing else is touched.

A target is a folder with one file that is made bad, and a call that reads it. Mutations know the structure (JSON trees,
safetensors headers, lengths and hashes that are made right again), so that they come past the first check.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import models
import secateur
from secateur.archives.container import Archive
from secateur.archives.delta_file import DeltaFile
from secateur.checkpoints import Folder
from secateur.data.windows import calibration_windows
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.errors import RequestError
from secateur.inference.opening import family_text, read_family

Mutation = Callable[[bytes, Random], bytes]

OUTPUT = "out"
"""What a target writes, if anything, beside its files."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    0.5,
    "",
    "x",
    "F64",
    "BF16",
    "llama",
    "gpt2",
    "../canary",
    "../../canary",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "a" * 5000,
    [],
    [[]],
    {},
    {"a": {"b": []}},
    [0, 0],
    [2**40, 2**40],
    [-1, 8],
    [1] * 300,
)
"""What is put in the place of something else."""
YAMLS = (
    b"!!python/object/apply:os.system ['touch canary2']",
    b"a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n",
    b"&a {a: *a}",
    b"- 1\n- 2\n",
    b"\xff\xfe\x00",
    b"{" * 400,
    b"? [1]\n: 2\n",
    b"2026-01-01: 3\n",
)


# -- mutations ---------------------------------------------------------------------------------------------------------


def of_bytes(content: bytes, random: Random) -> bytes:
    """Bytes changed, cut, doubled, added."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = random.randrange(256)
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            del found[at : at + random.choice((1, 4, 8, 64))]
        elif kind == 4:
            found[at:at] = random.choice((b"\0", b"\xff" * 8, b"{", b'"', b"[" * 300, b"-", b"1e999", b"\n", b"../"))
        else:
            found[at:at] = found[max(0, at - 40) : at]
    return bytes(found)


def of_tree(tree: Any, random: Random) -> Any:
    """A JSON value in which some node was replaced, removed, added or moved; the one given is changed."""
    holder: Any = [tree]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        parent, keys = holder, [0]
        while True:
            key = random.choice(keys)
            below = parent[key]
            inner = list(below) if isinstance(below, dict) else list(range(len(below))) if _long(below) else []
            if not inner or random.random() < 0.25:
                break
            parent, keys = below, inner
        kind = random.randrange(8)
        if kind == 0 and parent is not holder:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            added = random.choice(("", "x", "../x", "shape", "__metadata__", "model.norm.weight"))
            parent[added] = deepcopy(parent[key])
        elif kind == 2 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += random.choice((-1, 1, 8, -8, 2**32))
        elif kind == 3 and parent is not holder:
            other = random.choice(keys)
            parent[key], parent[other] = deepcopy(parent[other]), deepcopy(parent[key])
        elif kind == 4 and isinstance(parent[key], str):
            at = random.randrange(len(parent[key]) + 1)
            parent[key] = parent[key][:at] + random.choice(("", "x", "/", "..", "\0", "9")) + parent[key][at + 1 :]
        else:
            parent[key] = deepcopy(random.choice(VALUES))
    return holder[0]


def _long(node: Any) -> bool:
    return isinstance(node, list) and bool(node)


def of_json(content: bytes, random: Random) -> bytes:
    """A JSON file with a changed tree, at times with changed bytes."""
    if random.random() < 0.2:
        return of_bytes(content, random)
    return json.dumps(of_tree(json.loads(content), random)).encode("utf-8", "surrogatepass")


def of_lines(content: bytes, random: Random) -> bytes:
    """Lines of JSON, of which one is changed, doubled, lost or moved."""
    lines = content.splitlines()
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 2:
        return of_bytes(content, random)
    else:
        lines[at] = of_json(lines[at], random)
    return b"\n".join(lines) + b"\n"


def of_yaml(content: bytes, random: Random) -> bytes:
    """A YAML file with a changed tree, changed bytes, or something of bad repute."""
    kind = random.random()
    if kind < 0.2:
        return of_bytes(content, random)
    if kind < 0.3:
        return random.choice(YAMLS)
    tree = of_tree(yaml.safe_load(content), random)
    return json.dumps(tree).encode("utf-8", "surrogatepass")  # which is YAML as well


def of_safetensors(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header, its length right; at times with a wrong length or changed bytes."""
    kind = random.random()
    length = int.from_bytes(content[:8], "little")
    if kind < 0.15:
        return of_bytes(content[: 8 + length], random) + content[8 + length :]
    if kind < 0.25:
        wrong = random.choice((0, 1, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + content[8:]
    if kind < 0.35:
        return content[: random.randrange(len(content))]
    if kind < 0.4:
        return content + b"\0" * random.choice((1, 8, 1000))
    header = json.loads(content[8 : 8 + length])
    meta = header.get("__metadata__")
    inner = [key for key, value in (meta or {}).items() if value[:1] in "{["]
    if inner and random.random() < 0.7:  # JSON within: what Secateur's own files say of their tensors
        key = random.choice(inner)
        meta[key] = json.dumps(of_tree(json.loads(meta[key]), random))
    else:
        header = of_tree(header, random)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def of_archive(content: bytes, random: Random) -> bytes:
    """A bits-back archive with another header or other words, its lengths and its hash right."""
    if random.random() < 0.2:
        return of_bytes(content, random)
    start = 16 + int.from_bytes(content[8:16], "little")
    header, words = content[16:start], content[start:-32]
    if random.random() < 0.7:
        header = json.dumps(of_tree(json.loads(header), random)).encode("utf-8", "surrogatepass")
    else:
        words = of_bytes(words, random)
        words = words[: len(words) // 4 * 4]
    data = content[:8] + len(header).to_bytes(8, "little") + header + words
    return data + hashlib.sha256(data).digest()


# -- targets -----------------------------------------------------------------------------------------------------------


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
    """Interrupts a run in the middle of its last sweep."""

    what = ""

    def start(self, what: str, total: int) -> None:
        del total
        self.what = what

    def step(self, done: int) -> None:
        if self.what == "cut" and done == 2:
            raise KeyboardInterrupt


def _interrupted(folder: Path) -> None:
    (folder / "notes.txt").write_text(models.text(200))
    _model(folder)
    _run(folder, "done")
    with pytest.raises(KeyboardInterrupt):
        _run(folder, "out", _Stop())
    (folder / ".out.secateur").rename(folder / "interrupted")


def _run(folder: Path, output: str, progress: Silent | None = None) -> None:
    options = {"ratio": 0.2, "data": folder / "notes.txt", "samples": 8, "length": 16, "progress": progress}
    secateur.prune(folder / "model", method="fasp", output=folder / output, **options)


def resume(folder: Path) -> None:
    """The same command again: the bytes of a straight run, whatever became of its journal and files."""
    work = folder / ".out.secateur"
    shutil.copytree(folder / "interrupted", work)
    try:
        _run(folder, "out")
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
    "journal": Target(_interrupted, "interrupted/journal.jsonl", of_lines, resume, 0.1),
    "plan": Target(_interrupted, "interrupted/plan.json", of_json, resume, 0.05),
    "kept units": Target(_interrupted, "interrupted/plan.safetensors", of_safetensors, resume, 0.05),
    "edits": Target(_interrupted, "interrupted/plan-edits-blocks.1.safetensors", of_safetensors, resume, 0.05),
    "decision": Target(_interrupted, "interrupted/decided/plan.json", of_json, resume, 0.05),
    "half an output": Target(_interrupted, "interrupted/out/model.safetensors", of_safetensors, resume, 0.05),
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
