"""One process of one thread against two of one thread each: the same calibrated prune, in turns, and the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import (
    MIB,
    Goal,
    Result,
    anonymous_bytes,
    conditions,
    llama_config,
    parser,
    record,
    secateur,
    work_folder,
    write_checkpoint,
    write_ids,
)

RATIO, TIMED = 0.25, ("secateur-report.md", "secateur-report.html")
METHODS = ("fasp", "slicegpt")


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def run(command: list[str], count: int) -> dict[str, Any]:
    """Start as many processes, as torchrun does, each with one thread; seconds of the prune and peaks of memory."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    base = {**os.environ, "OMP_NUM_THREADS": "1", **(where if count > 1 else {})}
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=None if rank == 0 else subprocess.DEVNULL,
            text=True,
            env={**base, **({"RANK": str(rank)} if count > 1 else {})},
        )
        for rank in range(count)
    ]
    peaks, stop = [0] * count, threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for index, process in enumerate(processes):
                peaks[index] = max(peaks[index], anonymous_bytes(process.pid) or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    outputs = [process.communicate()[0] for process in processes]
    stop.set()
    watcher.join()
    if any(process.returncode for process in processes):
        sys.exit(f"{' '.join(command)} ended with {[process.returncode for process in processes]}: {outputs[0]}")
    said = json.loads(outputs[0])
    return {"seconds": said["seconds"], "wall": time.perf_counter() - started, "peaks_mib": [p // MIB for p in peaks]}


def digest(folder: Path) -> str:
    """SHA-256 over the files of an output that do not tell times."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()


def compared(method: str, turns: int, small: bool, work: Path | None) -> Result:
    """The two in turns; medians of both."""
    hidden, layers, heads, ffn, vocab = (64, 3, 4, 160, 512) if small else (768, 12, 12, 3072, 32000)
    windows, length = (16, 32) if small else (32, 512)
    where, found, bytes_of = conditions(), {1: [], 2: []}, {}
    with work_folder(work) as folder:
        write_checkpoint(folder / "model", llama_config(hidden, layers, heads, ffn, vocab, 2048, "float32"))
        data = write_ids(folder / "ids.npy", vocab, windows, length)
        for _ in range(turns):
            for count in (1, 2):
                command = secateur("prune", folder / "model", "-o", folder / "out", "--method", method)
                command += ["--ratio", str(RATIO), "--data", str(data), "--samples", str(windows)]
                command += ["--length", str(length), "--device", "cpu", "--json"]
                found[count].append(run(command, count))
                bytes_of.setdefault(count, set()).add(digest(folder / "out"))
                shutil.rmtree(folder / "out")
    seconds = {count: sorted(each["seconds"] for each in runs)[len(runs) // 2] for count, runs in found.items()}
    speed, same = seconds[1] / seconds[2], bytes_of[1] == bytes_of[2] and len(bytes_of[1]) == 1
    return Result(
        f"processes_{method}",
        f"{method} in two processes, {'tiny' if small else '110 M'} shape",
        where,
        [
            Goal(
                f"`{method}`: one process / two, one thread each, seconds",
                "-",
                f"{speed:.2f} x",
                None,
            ),
            Goal(f"`{method}`: the same bytes", "yes", "yes" if same else "no", same),
        ],
        {"one": found[1], "two": found[2], "windows": windows, "length": length},
        [
            f"hidden {hidden}, {layers} layers, ffn {ffn}, vocabulary {vocab}, float32, random weights and token ids",
            "seconds as the command reports them (imports are not in them); peaks of anonymous memory of every process",
        ],
    )


def main() -> None:
    """Method by method."""
    options = parser(__doc__ or "")
    options.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS, help="all when omitted")
    options.add_argument("--turns", type=int, default=3, help="runs of each")
    arguments = options.parse_args()
    for method in arguments.methods:
        record(
            compared(method, 1 if arguments.small else arguments.turns, arguments.small, arguments.work),
            arguments.small,
        )


if __name__ == "__main__":
    main()
