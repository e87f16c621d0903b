"""A Llama-2-7B shape pruned on a GPU: seconds, share of the peak in the forward pass, ratio to the floor.

The floor is what cannot be avoided: the bytes of the model and of the result over the measured bandwidth of the disk,
and the FLOPs of one forward pass over the calibration tokens over the measured rate of large products. Without a GPU it
runs a tiny shape on the CPU, to try the script, and records nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import secateur
from common import (
    GIB,
    Goal,
    Result,
    conditions,
    llama_config,
    make_cold,
    parser,
    record,
    weight_bytes,
    work_folder,
    write_checkpoint,
    write_ids,
)
from timing import Phases

ONE_SHOT = ("fasp", "slicegpt", "flap", "wanda", "sparsegpt")
METHODS = (*ONE_SHOT, "prunenet")
LAYOUT = {"flap": "per-layer"}
WALKS = ("gather", "mend")
"""Phases in which blocks run on the calibration tokens."""
SECONDS, FLOORS, RATIO = 60.0, 5.0, 0.25


def synchronise(device: torch.device) -> None:
    """Wait for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOPs a second of square products, the best of ten."""
    one = torch.randn(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        one @ one
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best


def disk_rate(folder: Path, work: Path) -> tuple[float, float]:
    """Bytes a second of reading a model's files cold, and of writing a GiB (or as much as there is) with a sync."""
    make_cold(folder)
    started, seen = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as handle:
            while piece := handle.read(2**24):
                seen += len(piece)
    reading = seen / (time.perf_counter() - started)
    piece, amount = bytes(2**24), max(1, min(seen, GIB) // 2**24)
    started = time.perf_counter()
    with (work / "written").open("wb") as handle:
        for _ in range(amount):
            handle.write(piece)
        handle.flush()
        os.fsync(handle.fileno())
    writing = amount * len(piece) / (time.perf_counter() - started)
    (work / "written").unlink()
    return reading, writing


def forward_flops(config: dict[str, Any], tokens: int, length: int) -> float:
    """FLOPs of the blocks over the tokens: products and attention, no head."""
    hidden, ffn, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return float(tokens) * layers * (2 * (4 * hidden**2 + 3 * hidden * ffn) + 4 * length * hidden)


def main() -> None:
    """Method by method, on cold files."""
    options = parser(__doc__ or "")
    options.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="all when omitted")
    options.add_argument("--samples", type=int, default=128, help="calibration windows of 2048 tokens")
    options.add_argument("--dtype", default="bfloat16", help="of the forward pass; sums are float32 and float64")
    arguments = options.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU here: a tiny shape on the CPU, nothing is recorded", file=sys.stderr)
    small = arguments.small or not gpu
    device, where = torch.device("cuda" if gpu else "cpu"), conditions()
    hidden, layers, heads, ffn, vocab = (64, 3, 4, 160, 512) if small else (4096, 32, 32, 11008, 32000)
    windows, length = (8, 64) if small else (arguments.samples, 2048)
    config = llama_config(hidden, layers, heads, ffn, vocab, 4096, "bfloat16")
    goals, figures = [], dict[str, Any]()
    with work_folder(arguments.work, 0 if small else 30 * GIB) as work:
        size = write_checkpoint(work / "model", config)
        data = write_ids(work / "ids.npy", vocab, windows, length)
        rate = product_rate(device, getattr(torch, arguments.dtype), 256 if small else 8192)
        reading, writing = disk_rate(work / "model", work)
        flops = forward_flops(config, windows * length, length)
        for method in arguments.methods:
            make_cold(work / "model")
            given: dict[str, Any] = {"data": data, "samples": windows, "length": length} if method != "prunenet" else {}
            phases, started = Phases(), time.perf_counter()
            result = secateur.prune(
                work / "model",
                method=method,
                ratio=RATIO,
                layout=LAYOUT.get(method, "native"),
                output=work / "out",
                device=str(device),
                dtype=arguments.dtype,
                progress=phases,
                **given,
            )
            seconds = time.perf_counter() - started
            written = weight_bytes(work / "out")
            shutil.rmtree(work / "out")
            floor = size / reading + written / writing + (flops / rate if given else 0.0)
            spent = phases.end()
            walking = sum(spent.get(name, 0.0) for name in WALKS)
            share = flops / walking / rate if given and walking else None
            met = seconds < SECONDS if method in ONE_SHOT and not small else None
            said = f"{seconds:.1f} s" + (f", blocks run at {share:.0%} of the measured peak" if share else "")
            goals.append(Goal(f"`{method} --ratio {RATIO}`", "< 60 s" if method in ONE_SHOT else "-", said, met))
            near = seconds <= FLOORS * floor if not small else None
            goals.append(Goal(f"`{method}`: against the floor", "<= 5 x", f"{seconds / floor:.1f} x", near))
            figures[method] = {
                "phases_s": spent,
                "floor_s": round(floor, 2),
                "host_mib": result.peak_rss_bytes // 2**20,
            }
    figures |= {
        "product_tflops": round(rate / 1e12, 3),
        "disk_read_mb_s": round(reading / 1e6),
        "disk_write_mb_s": round(writing / 1e6),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
    }
    notes = [
        f"{windows} x {length} tokens, forward pass in {arguments.dtype}, random weights and ids, imports apart",
        "the share of the peak counts one forward pass; the phases it is taken over also sum evidence and mend",
    ]
    record(Result("gpu", "Llama-2-7B shape on a GPU", where, goals, figures, notes), small)


if __name__ == "__main__":
    main()
