"""A checkpoint folder whose weight files are packed, and back.

Everything is done tensor by tensor: one pass finds the smallest form of each, so that the files' headers are known,
and a second writes them. A packed folder is finished only after every tensor was read back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint, Folder, TensorHeader, TensorWriter
from secateur.checkpoints.companions import copy_folder
from secateur.checkpoints.folder import INDEX, PACKED_INDEX, RECORD, WEIGHT_DTYPES, read_json
from secateur.checkpoints.forms import Form, bound, foreseen, measure, name_of
from secateur.checkpoints.packed import Record, bits_of, packed_name, packed_parts, part_names, tensor_of
from secateur.engine.journal import Journal
from secateur.engine.progress import Progress
from secateur.errors import InternalError
from secateur.plans.plan import file_digest
from secateur.version import __version__

Accounts = dict[str, Any]
_ENTRIES: Final = 300  # bytes of the header that a second tensor and a form in the record take, about


def packed_result(result: Path, target: Path, journal: Journal, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """The phase of a run that packs what was written and checked; taken up again where it was finished.

    Args:
        result: the finished dense folder.
        target: the packed folder to write, beside it.

    Returns:
        The packed folder, and its record.
    """
    record = read_json(result / RECORD)
    done = journal.done("packed")
    if not (journal.newer("packed", than="verified") and _hashes(target) == done[-1]["files"]):
        accounts = pack_folder(Folder(result), target, progress, record["tensors"])
        journal.add("packed", files=_hashes(target), accounts=accounts)
        done = journal.done("packed")
    else:
        copy_companions(Folder(result), target)  # the record in it may be marked already
    return target, mark_packed(target, done[-1]["accounts"]) or record


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a packed folder; none where it is not complete."""
    return {path.name: file_digest(path) for path in sorted(folder.glob("packed*"))}


def foreseen_bytes(
    checkpoint: Checkpoint, zeros: int, among: Collection[str], pattern: tuple[int, int] | None = None
) -> int:
    """Bytes of a checkpoint's weight files, packed, with zeros spread evenly over some of its matrices.

    Args:
        zeros: their number.
        among: canonical names of the matrices.
        pattern: N and M, where N of every M consecutive inputs are left.
    """
    headers, every = checkpoint.folder.headers, (p for place in checkpoint.packed.values() for p in place)
    matrices = [headers[p.name] for p in every if not set(p.canonical).isdisjoint(among)]
    share = min(1.0, zeros / max(1, sum(header.elements for header in matrices)))
    saved = sum(h.bytes - foreseen(h.elements, round((1 - share) * h.elements), h.itemsize, pattern) for h in matrices)
    return checkpoint.folder.dense_bytes - saved


# -- packing -----------------------------------------------------------------------------------------------------------


def pack_folder(
    source: Folder, target: Path, progress: Progress, expected: Mapping[str, str] | None = None
) -> Accounts:
    """Write a folder with packed weight files and check that every tensor is read back from it to the bit.

    Args:
        source: a folder; one that is packed already is packed anew.
        target: the folder to write.
        expected: SHA-256 of every tensor by its name, where they are known.

    Returns:
        ``bytes`` of the packed files, ``dense_bytes``, ``bound_bytes``, and in ``forms`` for each form ``tensors``,
        ``bytes``, ``dense_bytes`` and ``bound_bytes`` of its tensors.

    Raises:
        InternalError: what is read back is not what was packed.
    """
    copy_companions(source, target)
    progress.start("pack", 3 * len(source.headers))
    forms, counts = {}, {}
    for done, (name, tensor) in enumerate(source.read(source.headers), 1):
        forms[name], counts[name] = _smallest(source.headers[name], tensor)
        progress.step(done)
    digests = _write(source, target, forms, counts, progress)
    found = {}
    packed = Folder(target)
    for done, (name, tensor) in enumerate(packed.read(packed.headers), 2 * len(forms) + 1):
        found[name] = _digest(tensor)
        progress.step(done)
    if packed.headers != dict(source.headers) or found != digests or (expected is not None and found != expected):
        raise InternalError("packing", f"packing {str(source.path)!r}", "the packed files hold something else")
    return _accounts(source, packed, counts)


def _smallest(header: TensorHeader, tensor: Tensor) -> tuple[Form | None, int]:
    """The form of a tensor and its number of non-zeros; what holds no weights is stored as it is."""
    if header.dtype not in WEIGHT_DTYPES:
        return None, header.elements
    return measure(bits_of(tensor), header.shape, _ENTRIES + 4 * len(header.name))


def _write(
    source: Folder, target: Path, forms: Mapping[str, Form | None], counts: Mapping[str, int], progress: Progress
) -> dict[str, str]:
    """Write the packed files and their index; returns the SHA-256 of every tensor."""
    parts = [part for name, form in forms.items() for part in packed_parts(source.headers[name], form, counts[name])]
    files = sorted({header.file for header in source.headers.values()})
    metadata = {}
    for file in files:
        members = {n: f for n, f in forms.items() if f is not None and source.headers[n].file == file}
        metadata[packed_name(file)] = Record(file=file, tensors=members).metadata
    writer = TensorWriter(target, parts, index=False, metadata=metadata)
    digests = {}
    for done, (name, tensor) in enumerate(source.read(forms), len(forms) + 1):
        digests[name], form = _digest(tensor), forms[name]
        if form is None:
            writer.write(name, tensor)
        else:
            bits, where = form.encode(bits_of(tensor))
            for part, content in zip(part_names(name), (tensor_of(bits, tensor.dtype), where), strict=True):
                writer.write(part, torch.as_tensor(content))
        progress.step(done)
    if list(metadata) != ["packed.safetensors"]:
        content = {"weight_map": {name: packed_name(header.file) for name, header in sorted(source.headers.items())}}
        (target / PACKED_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return digests


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _accounts(source: Folder, packed: Folder, counts: Mapping[str, int]) -> Accounts:
    """Where the bytes are, beside those of the dense tensors and the bound."""
    forms: dict[str, dict[str, float]] = defaultdict(
        lambda: {"tensors": 0, "bytes": 0, "dense_bytes": 0, "bound_bytes": 0}
    )
    for name, stored in packed.stored.items():
        header = stored.header
        entry = forms[name_of(stored.form)]
        entry["tensors"] += 1
        entry["bytes"] += stored.bytes
        entry["dense_bytes"] += header.bytes
        entry["bound_bytes"] += bound(stored.form, header.elements, counts[name], header.itemsize)
    return {
        "bytes": packed.bytes,
        "dense_bytes": source.dense_bytes,
        "bound_bytes": math.ceil(sum(entry["bound_bytes"] for entry in forms.values())),
        "forms": {form: {k: math.ceil(v) for k, v in forms[form].items()} for form in sorted(forms)},
    }


# -- unpacking ---------------------------------------------------------------------------------------------------------


def unpack_folder(source: Folder, target: Path, progress: Progress) -> None:
    """Write a packed folder as a dense one and check what was written.

    Raises:
        InternalError: the files do not hold what was read.
    """
    copy_companions(source, target)
    writer, digests = TensorWriter(target, source.headers.values()), {}
    progress.start("unpack", len(source.headers))
    for done, (name, tensor) in enumerate(source.read(source.headers), 1):
        digests[name] = writer.write(name, tensor)
        progress.step(done)
    if writer.digests() != digests:
        raise InternalError("packing", f"unpacking {str(source.path)!r}", "the files do not hold what was written")
    _mark_unpacked(target)


# -- what lies beside the weights --------------------------------------------------------------------------------------


def copy_companions(source: Folder, target: Path) -> None:
    """Copy every file but the weights, byte for byte."""
    weights = {source.path / name for name in (*source.files, INDEX, PACKED_INDEX)}
    copy_folder(source.path, target, lambda path: path not in weights and target not in (path, *path.parents))


def loads_packed(loads: Iterable[str]) -> dict[str, str]:
    """What loads a packed folder: no runtime does, and Secateur read every tensor back from it."""
    return {**dict.fromkeys(loads, "no (secateur unpack)"), "secateur": f"verified({__version__})"}


def mark_packed(folder: Path, accounts: Accounts) -> dict[str, Any] | None:
    """Say in a folder's record, where it has one, how it is packed and what loads it; returns the record."""
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    loads = record.get("loads_in", {})
    record["packed"], record["loads_in"] = {**accounts, "loads_in": loads}, loads_packed(loads)
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return record


def _mark_unpacked(folder: Path) -> None:
    """The inverse of ``mark_packed``."""
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if isinstance(record.get("packed"), dict):
        record["loads_in"] = record.pop("packed").get("loads_in", {})
        (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
