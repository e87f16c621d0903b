"""``pack`` and ``unpack``: a sliced checkpoint as one smaller file, one with zeros as a smaller folder, and back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from secateur.api.outputs import passing_workplace, require_free
from secateur.api.sparse import SPARSE, pack_sparse, unpack_sparse
from secateur.archives.bitsback import FORMS, Content, Form, Saved, read, write
from secateur.archives.container import Archive, Header
from secateur.archives.stack import Stack, require_coder
from secateur.checkpoints import Checkpoint, Folder, TensorWriter
from secateur.checkpoints.checkpoint import EMBEDDING
from secateur.checkpoints.folder import CONFIG, DTYPES, INDEX, PACKED_INDEX, RECORD, TensorHeader, read_json
from secateur.checkpoints.hub import locate
from secateur.cuts.gauge import FreeRotations
from secateur.engine.prepare import context_of
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import appear, publish
from secateur.errors import near, refuse
from secateur.inference import open_checkpoint
from secateur.inference.opening import FAMILY_FILE
from secateur.meters.perplexity import fits
from secateur.runtimes import check as checks

_CLEAR: Final = (CONFIG, RECORD, FAMILY_FILE)
_LOOSE: Final = "file:"
"""Before the name on disk of a tensor that has no canonical one."""


def pack(
    model: str | Path,
    output: str | Path,
    *,
    form: str = "triangular",
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in fewer bytes: one whose stream was sliced as a file, one with zeros as a folder.

    The form ``sparse`` gives a folder in which every tensor takes the fewest bytes that its zeros allow, without
    loss; evaluate, prune, ``secateur.load`` and the rest take it as any other. The other forms give one file that
    does not spend bits on the basis of a stream that was rotated and sliced. Either appears only after it was read
    back, tensor by tensor, and ``check`` found that the folder a file gives computes what the model computes.

    Args:
        model: checkpoint folder or hub id; for a file, of an output of ``slicegpt`` or ``bits_back`` in either layout.
        output: the file or folder to write.
        form: ``sparse``; ``triangular`` (the smaller file) or ``square`` (the published code; per-layer outputs only).
        check: compare the logits and greedy tokens of the folder that a file gives with those of the model.
        force: move an existing output aside first.
        progress: told what happens.

    Returns:
        ``output``, ``bytes``, ``form``, ``seconds``. Of ``sparse``: ``packed``, the ``bytes`` of the weight files,
        ``dense_bytes``, ``bound_bytes`` (below which no code of zeros gets), and in ``forms`` the same for each kind of
        storage. Of the others: ``folder_bytes``, and what the file is made of
        (``header_bytes``, ``files_bytes``, ``tensor_bytes``); ``bits`` (returned, corrections, signs, table, net);
        ``angles`` (free, coded, corrected); ``square_bytes`` and ``triangular_bytes`` of the tensors with shortcuts of
        either kind, and ``saving`` against both and against the folder; ``interfaces``, each one's figures; ``check``.

    Raises:
        RequestError: the model's stream is in a basis that cannot be changed, or the coder is missing.
    """
    started, told, path = time.perf_counter(), progress or Silent(), Path(output)
    if form == SPARSE:
        return pack_sparse(model, path, force, told)
    if form not in FORMS:
        refuse("bad-form", f"form {form!r}", "there is no such form", near(form, (SPARSE, *FORMS)))
    wanted: Form = FORMS[FORMS.index(form)]
    require_free(path, force)
    require_coder()
    checkpoint = open_checkpoint(Path(locate(str(model))))
    _require_memory(checkpoint)
    tensors = _read_all(checkpoint)
    content = _content(checkpoint)
    free = content.free
    problem = free.problem(tensors)
    if problem:
        hint = "cut its stream with --method bits_back --layout per-layer, or slicegpt"
        refuse("fixed-basis", f"packing {str(model)!r}", problem, hint)
    if wanted == "square" and not free.shortcuts:
        found = "one basis serves all of its norms, so that there is no shortcut"
        refuse("bad-form", f"packing {str(model)!r} in the square form", found, "--form triangular")
    with passing_workplace(path, force, [checkpoint.folder]) as work:
        told.start("pack", len(content.groups(wanted)))
        first, files, clear = _companions(checkpoint.folder)
        stack, written, saved = write(content, tensors, wanted, first, told.step)
        weights = [(h.name, h.file, h.dtype, h.shape) for h in checkpoint.folder.headers.values()]
        figures = [gave.as_dict() for gave in saved]
        header = Header(
            form=wanted, clear=clear, files=files, weights=weights, content=_digest(first, written), saved=figures
        )
        new = work / "archive"
        Archive(header, stack.words).save(new)
        _extract(Archive.load(new), work / "out")
        outcome = _compare(checkpoint, work / "out") if check else None
        size = new.stat().st_size
        checkpoint.folder.require_unchanged()
        appear(new, path, told)
    return {
        "output": str(path),
        "bytes": size,
        "form": wanted,
        **_accounts(checkpoint, free, tensors, saved, len(first), size, stack.words.nbytes, wanted),
        "interfaces": figures,
        "check": outcome,
        "seconds": round(time.perf_counter() - started, 3),
    }


def unpack(
    archive: str | Path, output: str | Path, *, force: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the checkpoint folder that ``pack``, or a prune with a format, packed; it loads as any other in its layout.

    Args:
        archive: the file or folder.
        output: folder to write.
        force: move an existing output aside first.
        progress: told what happens.

    Returns:
        ``output``, ``form``, ``bytes`` (of all its files; of its weight files where a folder was packed, beside
        ``packed_bytes``), ``tensors`` and ``seconds``.

    Raises:
        RequestError: no such file, a damaged one, or the coder is missing; nothing is written.
    """
    started, told, path = time.perf_counter(), progress or Silent(), Path(output)
    if Path(archive).is_dir():
        return unpack_sparse(Path(archive), path, force, told)
    require_free(path, force)
    require_coder()
    source = Archive.load(Path(archive))
    with passing_workplace(path, force) as work:
        folder = work / "out"
        _extract(source, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        publish(folder, path, told)
    return {
        "output": str(path),
        "form": source.header.form,
        "bytes": size,
        "tensors": len(source.header.weights),
        "seconds": round(time.perf_counter() - started, 3),
    }


# -- around the work ---------------------------------------------------------------------------------------------------


def _require_memory(checkpoint: Checkpoint) -> None:
    if not fits(checkpoint, torch.float64):
        found = "the whole model does not fit in memory twice"
        refuse("too-large", f"packing {str(checkpoint.folder.path)!r}", found, "use a machine with more memory")


# -- folders as tensors and files --------------------------------------------------------------------------------------


def _read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a folder: canonical ones, and those that only travel along."""
    tensors: dict[str, Tensor] = {}
    for place in checkpoint.architecture.places:
        tensors.update(checkpoint.read(place))
    loose = checkpoint.folder.read(header.name for header in checkpoint.passthrough)
    return tensors | {_LOOSE + name: tensor for name, tensor in loose}


def _content(checkpoint: Checkpoint) -> Content:
    """The content of a folder as its headers give it, in the order of ``_read_all``."""
    architecture = checkpoint.architecture
    shapes, dtypes = {}, {}
    for place in architecture.places:
        for packed in checkpoint.packed[place]:
            for name in packed.canonical:
                shapes[name], dtypes[name] = architecture.shapes[name], DTYPES[checkpoint.dtypes[name]]
    for header in checkpoint.passthrough:
        shapes[_LOOSE + header.name], dtypes[_LOOSE + header.name] = header.shape, DTYPES[header.dtype]
    return Content(FreeRotations(architecture), shapes, dtypes)


def _companions(folder: Folder) -> tuple[bytes, list[tuple[str, int]], dict[str, str]]:
    """Files that travel with the weights: the content of all but those in the clear, their names, and those."""
    weights = {*folder.files, INDEX, PACKED_INDEX}
    contents, files, clear = [], [], {}
    for path in sorted(folder.path.rglob("*")):
        name = path.relative_to(folder.path).as_posix()
        if not path.is_file() or name in weights or name.startswith(".git"):
            continue
        if name in _CLEAR:
            clear[name] = path.read_text(encoding="utf-8")
        else:
            contents.append(path.read_bytes())
            files.append((name, len(contents[-1])))
    return b"".join(contents), files, clear


def _digest(first: bytes, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all that is on the stack."""
    digest = hashlib.sha256(first)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _extract(archive: Archive, folder: Path) -> None:
    """Write the folder that an archive holds."""
    header = archive.header
    folder.mkdir(parents=True)
    for name, text in header.clear.items():
        _write_file(folder / name, text.encode())
    writer = TensorWriter(folder, [TensorHeader(*weight) for weight in header.weights])
    checkpoint = open_checkpoint(folder)
    content = _content(checkpoint)
    try:
        first, tensors = read(content, Stack(archive.words), header.form, sum(size for _, size in header.files))
        same = _digest(first, tensors) == header.content
    except (ArithmeticError, LookupError, TypeError, ValueError):  # of a coder that reads what it has not written
        same = False
    if not same:
        found = "what comes out is not what was written: linear algebra differs too much from where it was packed"
        refuse("bits-back", "reading the archive", found, "unpack it where it was packed, or fetch it again")
    start = 0
    for name, size in header.files:
        _write_file(folder / name, first[start : start + size])
        start += size
    if header.form == "square":
        squares = [tensors[name] for name in content.free.shortcuts]
        identity = torch.eye(content.free.width, dtype=torch.float64)
        tensors |= content.free.triangular(tensors, identity, squares)
    digests = _store(checkpoint, writer, tensors)
    if RECORD in header.clear:
        record = {**read_json(folder / RECORD), "tensors": digests}
        record["bits_back"] = {"form": header.form, "interfaces": header.saved}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _store(checkpoint: Checkpoint, writer: TensorWriter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Put tensors in their places on disk; the SHA-256 of each."""
    digests = {}
    for place in checkpoint.architecture.places:
        for packed in checkpoint.packed[place]:
            digests[packed.name] = writer.write(packed.name, packed.pack(tensors))
    for header in checkpoint.passthrough:
        digests[header.name] = writer.write(header.name, tensors[_LOOSE + header.name])
    if checkpoint.repeated_head:
        digests[checkpoint.repeated_head] = writer.write(checkpoint.repeated_head, tensors[EMBEDDING])
    return dict(sorted(digests.items()))


# -- figures -----------------------------------------------------------------------------------------------------------


def _compare(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Hold the folder that came out of the archive against the model that went in."""
    context = context_of(checkpoint)
    expected = checks.reference(checks.load_stock(checkpoint.folder.path), context)
    found = checks.reference(checks.load_stock(folder), context)
    stored = {str(DTYPES[dtype]).removeprefix("torch.") for dtype in checkpoint.dtypes.values()}
    tolerance = max(checks.TOLERANCE.get(name, checks.TOLERANCE["float32"]) for name in stored)
    ran = checks.Ran("unpacked", found.logits, found.generated)
    return checks.compare("transformers", expected, ran, tolerance).as_dict()


def _accounts(
    checkpoint: Checkpoint,
    free: FreeRotations,
    tensors: Mapping[str, Tensor],
    saved: list[Saved],
    files: int,
    size: int,
    words: int,
    form: Form,
) -> dict[str, Any]:
    """Where the bytes are, and what they are fewer than."""
    triangular = sum(tensor.nbytes for tensor in tensors.values())
    missing = free.width * (free.width - 1) // 2
    square = triangular + sum(missing * tensors[name].element_size() for name in free.shortcuts)
    bits = {key: sum(int(gave.as_dict()[key]) for gave in saved) for key in _BITS}
    stored = words - files
    folder = sum(file.stat().st_size for file in checkpoint.folder.path.rglob("*") if file.is_file())
    return {
        "folder_bytes": folder,
        "header_bytes": size - words,
        "files_bytes": files,
        "tensor_bytes": stored,
        "square_bytes": square,
        "triangular_bytes": triangular,
        "bits": bits,
        "angles": {
            "free": missing * (len(free.names) if form == "square" else 1),
            "coded": sum(gave.angles for gave in saved),
            "corrected": sum(gave.corrected for gave in saved),
        },
        "saving": {
            "of_square": round(1 - stored / square, 6),
            "of_triangular": round(1 - stored / triangular, 6),
            "of_folder": round(1 - size / folder, 6),
        },
    }


_BITS: Final = ("returned", "corrections", "signs", "table", "net")
