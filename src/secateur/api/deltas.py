"""``delta_pack`` and ``delta_apply``: what a fine-tune added to its base as one sparse file, and back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from secateur.api.outputs import passing_workplace, require_free
from secateur.archives.delta_file import DeltaFile
from secateur.checkpoints.hub import locate
from secateur.deltas.applying import apply_delta
from secateur.deltas.options import DeltaRequest, make_delta_method
from secateur.deltas.packing import figures_of, write_delta
from secateur.deltas.search import found_rescale
from secateur.deltas.sources import open_tuned
from secateur.deltas.trials import Pruner, gather
from secateur.engine.prepare import draw_windows, resolve_device, resolve_dtype
from secateur.engine.progress import Progress, Silent
from secateur.engine.publish import appear, publish
from secateur.errors import refuse, validated
from secateur.inference import open_checkpoint


def delta_pack(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    method: str | None = None,
    ratio: float | str = 0.9,
    data: str | Path | None = None,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Drop most of what a fine-tune added to its base, and write the rest as one file.

    The matrices of the blocks lose entries; embeddings, head, routers, norms and biases travel whole, as far as they
    differ from the base's.

    Args:
        base: checkpoint folder or hub id of the model that was fine-tuned.
        tuned: the fine-tune: a checkpoint of the same architecture, or an adapter folder of peft (plain LoRA).
        output: the file to write.
        method: ``dare``, ``darex_q``, ``magnitude``, ``wanda`` or ``structural``; by default ``darex_q`` with ``data``,
            else ``dare``.
        ratio: share of the entries of every matrix that is dropped, to one entry.
        data: text, for what looks at inputs or tries candidates; as of ``prune``.
        options: of the method; see docs/methods/darex.md.
        progress: told what happens.
        more: ``samples``, ``length``, ``text_field``, ``seed``, ``device``, ``dtype``, ``force`` and
            ``trust_remote_code``.

    Returns:
        ``output``, ``bytes``, ``method``, ``ratio``, ``options``, ``seed``, ``seconds``; ``entries`` of the pruned
        matrices, ``kept`` and ``dropped``; ``tensors`` (pruned, whole, unchanged); what the bytes are
        (``values_bytes``, ``index_bytes``, ``whole_bytes``, ``files_bytes``, ``header_bytes``); ``tuned_bytes`` of the
        full fine-tune's weights (of an adapter: merged), ``adapter_bytes`` of an adapter's file, and ``bound_bytes``,
        which values and positions of as many arbitrary entries cost at least; ``q`` (smallest, mean, largest) and
        ``search``, what was tried to find it.

    Raises:
        SecateurError: with what was asked, what was found and what to do; then ``output`` does not exist.
    """
    started, told = time.perf_counter(), progress or Silent()
    asked: dict[str, Any] = {"base": str(base), "tuned": str(tuned), "output": str(output), **more}
    asked |= {"method": method, "ratio": ratio, "data": None if data is None else str(data), "options": options or {}}
    request = validated(DeltaRequest, asked, "a delta")
    chosen = make_delta_method(request)
    path, device = require_free(Path(request.output), request.force), resolve_device(request.device)
    origin = open_checkpoint(Path(locate(request.base)))
    fine = open_tuned(origin, Path(locate(request.tuned)), chosen.lora == "factors")
    dtype = resolve_dtype(request.dtype, fine.checkpoint, device)
    ids = None
    searches = isinstance(chosen.rescale, str) and chosen.rescale != "share"
    if request.data is not None and (searches or chosen.asks_signals):
        fine.checkpoint.require_tokens("a delta that is fitted to text")
        windows = draw_windows(
            request.data,
            fine.checkpoint,
            request.samples,
            request.length,
            request.seed,
            request.text_field,
            request.trust_remote_code,
        )
        ids = windows.ids
    sources = [origin.folder, fine.checkpoint.folder]
    with passing_workplace(path, request.force, sources) as work:
        signals = {}
        if ids is not None and (chosen.asks_signals or chosen.rescale == "analytic"):
            signals = dict(gather(fine, ids, dtype, device, work, told))
        pruner = Pruner(fine, chosen, request.ratio, signals)
        rescale, tried = found_rescale(chosen, pruner, ids, dtype, device, request.seed, told)
        new = work / "delta"
        account, header = write_delta(pruner, rescale, request.seed, new, work, told)
        DeltaFile(new)
        size = new.stat().st_size
        for source in sources:
            source.require_unchanged()
        appear(new, path, told)
    return {
        "output": str(path),
        "bytes": size,
        "method": chosen.name,
        "ratio": request.ratio,
        "options": chosen.model_dump(mode="json"),
        "seed": request.seed,
        **figures_of(account),
        "header_bytes": header,
        "tuned_bytes": fine.checkpoint.folder.bytes,
        "adapter_bytes": fine.adapter_bytes,
        "search": tried,
        "seconds": round(time.perf_counter() - started, 3),
    }


def delta_apply(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint folder that a base with a delta is: names, types and files of the fine-tune.

    Args:
        base: checkpoint folder or hub id of the model that the delta was made on; another one is refused.
        delta: the file.
        output: folder to write.
        force: move an existing output aside first.
        progress: told what happens.

    Returns:
        ``output``, ``method``, ``ratio``, ``tensors``, ``bytes`` of the folder, and ``seconds``.

    Raises:
        RequestError: no such file, a damaged one, or another base; nothing is written.
    """
    started, told, path = time.perf_counter(), progress or Silent(), Path(output)
    require_free(path, force)
    source = DeltaFile(Path(delta))
    origin = open_checkpoint(Path(locate(str(base))))
    if path.resolve() == origin.folder.path.resolve():
        refuse("output-is-input", f"output {str(output)!r}", "it is the base's own folder", "name another folder")
    with passing_workplace(path, force, [origin.folder]) as work:
        folder = work / "out"
        digests = apply_delta(origin, source, folder, told)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        origin.folder.require_unchanged()
        publish(folder, path, told)
    return {
        "output": str(path),
        "method": source.header.method,
        "ratio": source.header.ratio,
        "tensors": len(digests),
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 3),
    }
