"""``export``: a checkpoint in the format of another runtime, published only after it ran there."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from secateur.api.outputs import passing_workplace, require_free
from secateur.checkpoints import Checkpoint
from secateur.checkpoints.hub import locate
from secateur.data.windows import encode, load_tokenizer
from secateur.engine.prepare import context_of
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import next_free
from secateur.errors import InternalError, near, refuse
from secateur.families.loading import is_square, status
from secateur.inference import open_checkpoint
from secateur.meters.perplexity import fits
from secateur.runtimes import check as checks
from secateur.runtimes import gguf_file, gguf_tokens, llama_cpp, onnx

RUNTIME_OF: Final = {".gguf": "llama.cpp", ".onnx": "onnxruntime"}
DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STEP: Final = {True: 3, False: 1}


def export(
    model: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    check: bool = True,
    tokenizer: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint as one file for another runtime, run it there, and publish it if it agrees with transformers.

    Args:
        model: checkpoint folder or hub id; pruned or not.
        output: ``NAME.gguf`` (llama.cpp) or ``NAME.onnx`` (onnxruntime).
        dtype: type of the matrices; ``auto`` is the checkpoint's own in GGUF, and ONNX knows float32 only.
        check: load the file in its runtime and compare logits, greedy tokens and token ids of sample texts.
        tokenizer: put the tokenizer into a GGUF file; without it the file takes token ids.
        force: move an existing output aside first.
        progress: told what happens.

    Returns:
        ``output``, ``bytes``, ``dtype``, ``seconds``, ``check`` (None without one), ``loads_in`` (of the runtime),
        and for GGUF ``architecture``, ``context`` and ``tensors``.

    Raises:
        RequestError: the model has no form there, or a package is missing; nothing is written.
        InternalError: the runtime does not compute what transformers computes; nothing is written.
    """
    started, told = time.perf_counter(), progress or Silent()
    path = Path(output)
    runtime = RUNTIME_OF.get(path.suffix)
    if runtime is None:
        refuse("bad-format", f"output {path.name!r}", "its ending names no format", "NAME.gguf or NAME.onnx")
    if dtype not in ("auto", *DTYPES):
        refuse("bad-dtype", f"dtype {dtype!r}", "no such type for an export", near(dtype, ("auto", *DTYPES)))
    require_free(path, force)
    _require(runtime, check)
    checkpoint = open_checkpoint(Path(locate(str(model))))
    if not checkpoint.architecture.family.has_head:
        checkpoint.require_tokens(f"an export for {runtime}")
    if (check or runtime == "onnxruntime") and not fits(checkpoint, torch.float32):
        hint = "--no-check writes GGUF block by block" if runtime == "llama.cpp" else "use a machine with more memory"
        refuse("too-large", f"export of {str(model)!r}", "the whole model in float32 does not fit in memory", hint)
    with passing_workplace(path, force, [checkpoint.folder]) as work:
        told.start("export", _STEP[check])
        new = work / path.name
        if runtime == "llama.cpp":
            found, outcome = _gguf(checkpoint, new, dtype, check, tokenizer, told)
        else:
            found, outcome = _onnx(checkpoint, new, dtype, check, told)
        size = sum(file.stat().st_size for file in work.glob(f"{path.name}*"))
        checkpoint.folder.require_unchanged()
        _publish(new, path, told)
    state = f"verified({outcome['version']})" if outcome else _unchecked(checkpoint, runtime)
    return {
        "output": str(path),
        "bytes": size,
        **found,
        "seconds": round(time.perf_counter() - started, 3),
        "check": outcome,
        "loads_in": {runtime: state},
    }


def _unchecked(checkpoint: Checkpoint, runtime: str) -> str:
    """What the family file says of this form; a version that was verified elsewhere is no check of this file."""
    architecture = checkpoint.architecture
    stated = status(architecture.family, runtime, ["ffn"] if is_square(architecture.sizes) else ["residual"])
    return "expected" if stated.startswith("verified") else stated


def _require(runtime: str, check: bool) -> None:
    """Refuse to begin without the packages of a runtime."""
    wanted: Sequence[str] = onnx.PACKAGES
    extra, hint = "onnx", ""
    if runtime == "llama.cpp":
        wanted, extra = ("gguf", "llama_cpp") if check else ("gguf",), "gguf"
        hint = ", or --no-check to write without running it" if check else ""
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join({"llama_cpp": "llama-cpp-python"}.get(name, name) for name in missing)
        advice = f"pip install 'secateur[{extra}]'" + (hint if missing == ["llama_cpp"] else "")
        refuse("no-runtime", f"an export for {runtime}", f"{names} is not installed", advice)


Written = tuple[dict[str, Any], dict[str, Any] | None]


def _gguf(checkpoint: Checkpoint, path: Path, dtype: str, check: bool, tokenizer: bool, told: Progress) -> Written:
    folder, rows = checkpoint.folder.path, checkpoint.architecture.sizes.vocab
    kind = gguf_file.stored_type(checkpoint) if dtype == "auto" else DTYPES[dtype]
    name = str(kind).removeprefix("torch.")
    form = gguf_file.form_of(checkpoint.architecture)
    loaded = load_tokenizer(folder) if tokenizer else None
    vocabulary = None if loaded is None else gguf_tokens.read_vocabulary(loaded, rows)
    facts = {"dtype": name, **gguf_file.write_gguf(checkpoint, path, kind, vocabulary)}
    told.step(1)
    if not check:
        return facts, None
    expected = checks.reference(checks.load_stock(folder), int(facts["context"]))
    told.step(2)
    texts = list(gguf_tokens.SAMPLES) if loaded is not None else []
    steps = len(expected.generated)
    ran, tokens = llama_cpp.run_gguf(path, expected.prompt, steps, texts, torch.get_num_threads())
    for text, found in zip(texts, tokens, strict=True):
        wanted = encode(loaded, text).tolist()
        if found != wanted:
            message = f"llama.cpp makes {found} of it, transformers {wanted}"
            raise InternalError("export-check", f"tokenising {text!r}", message, "--no-tokenizer leaves it out")
    outcome = checks.compare("llama.cpp", expected, ran, max(checks.TOLERANCE[name], form.tolerance))
    told.step(3)
    return facts, {**outcome.as_dict(), "texts_tokenised": len(texts)}


def _onnx(checkpoint: Checkpoint, path: Path, dtype: str, check: bool, told: Progress) -> Written:
    if dtype not in ("auto", "float32"):
        refuse("bad-dtype", f"dtype {dtype!r}", "ONNX graphs are written in float32", "leave it out")
    onnx.require_context(checkpoint.architecture)
    model = checks.load_stock(checkpoint.folder.path)
    expected = checks.reference(model, context_of(checkpoint)) if check else None
    onnx.write_onnx(model, checkpoint.architecture, path)
    told.step(1)
    if expected is None:
        return {"dtype": "float32"}, None
    del model
    told.step(2)
    ran = onnx.run_onnx(path, expected.prompt, len(expected.generated))
    outcome = checks.compare("onnxruntime", expected, ran, checks.TOLERANCE["float32"])
    told.step(3)
    return {"dtype": "float32"}, outcome.as_dict()


def _publish(new: Path, path: Path, told: Progress) -> None:
    """Let the file appear by a rename; weights that lie beside the graph go first."""
    names = [f"{path.name}.data", path.name]
    old = [path.with_name(name) for name in names if path.with_name(name).exists()]
    if old:  # into a folder, under their names: a graph knows its weights by name
        aside = next_free(path)
        aside.mkdir()
        for file in old:
            file.rename(aside / file.name)
        told.note(f"the old {path.name} is now in {aside.name}")
    for name in names:
        if new.with_name(name).exists():
            new.with_name(name).rename(path.with_name(name))
