"""SliceGPT, the whole prune, against one plain forward pass of the stock model over the same tokens, in one process."""

from __future__ import annotations

from common import (
    Goal,
    Result,
    conditions,
    llama_config,
    load,
    parser,
    record,
    work_folder,
    write_checkpoint,
    write_ids,
)
from timing import BATCH_TOKENS, RATIO, forward_seconds, prune_seconds

GOAL = 3.0


def main() -> None:
    """Warm up both, then forward, prune, forward; the mean of the two passes is what counts."""
    arguments = parser(__doc__ or "").parse_args()
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    small = arguments.small
    windows, length = (8, 64) if small else (64, 1024)
    hidden, layers, ffn, vocab = (64, 2, 160, 512) if small else (768, 12, 2048, 16384)
    where = conditions()
    with work_folder(arguments.work, 4 * 2**30) as work:
        config = llama_config(hidden, layers, 4 if small else 12, ffn, vocab, 2048, "float32")
        size = write_checkpoint(work / "model", config)
        data = write_ids(work / "ids.npy", vocab, windows, length)
        ids = torch.from_numpy(np.load(data))
        model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
        forward_seconds(model, ids[: max(1, BATCH_TOKENS // length)])
        warm = max(8, windows // 8)
        prune_seconds(work / "model", data, warm, length, work / "warm", "slicegpt")
        first = forward_seconds(model, ids)
        loads = [load()]
        took, phases = prune_seconds(work / "model", data, windows, length, work / "pruned", "slicegpt")
        loads.append(load())
        second = forward_seconds(model, ids)
    forward = (first + second) / 2
    ratio = took / forward
    record(
        Result(
            "slicegpt",
            "calibrated slicing of a Llama shape of 100 M parameters",
            {**where, "load_between": loads},
            [
                Goal(
                    f"`slicegpt --ratio {RATIO}`, {windows} x {length} tokens, against one plain forward pass",
                    f"<= {GOAL:g} x",
                    f"{ratio:.2f} x",
                    ratio <= GOAL,
                )
            ],
            {
                "prune_s": round(took, 2),
                "forward_before_s": round(first, 2),
                "forward_after_s": round(second, 2),
                "phases_s": phases,
                "weight_bytes": size,
            },
            [
                f"hidden {hidden}, {layers} layers, ffn {ffn}, vocabulary {vocab}, float32 weights and compute, "
                "random weights and token ids",
                "the process is warm: both were run once on an eighth of the tokens before",
                f"the plain pass, head included, runs batches of {BATCH_TOKENS} tokens, as the engine does; its model "
                "is loaded before, the prune reads its weights from the file",
            ],
        ),
        small,
    )


if __name__ == "__main__":
    main()
