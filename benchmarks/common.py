"""What every benchmark needs: random checkpoints, measured processes, cold files, conditions, the results table."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
_READABLE = 8000  # characters of figures that are worth repeating
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"
MIB, GIB = 2**20, 2**30


# -- command line ------------------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--small", action="store_true", help="tiny sizes, to try the script; nothing is recorded")
    found.add_argument("--work", type=Path, default=None, help="folder for large temporary files")
    return found


@contextmanager
def work_folder(where: Path | None, needed: int = 0) -> Iterator[Path]:
    """A temporary folder, deleted at the end.

    Args:
        where: parent; the system's temporary folder when omitted.
        needed: bytes that must be free there.
    """
    parent = Path(tempfile.gettempdir()) if where is None else where
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        sys.exit(
            f"{needed / GIB:.0f} GiB of free disk needed, {free / GIB:.0f} GiB free in {parent}; name another --work"
        )
    folder = Path(tempfile.mkdtemp(prefix="secateur-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- conditions --------------------------------------------------------------------------------------------------------


def conditions() -> dict[str, Any]:
    """Date, machine, versions and load at this moment; call it before the work."""
    import torch
    import transformers

    from secateur.meters.machine import cpu_model

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_total() / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": load(),
        _BEGAN: (time.time(), _machine_seconds(), _own_seconds()),
    }


_BEGAN = "began"


def _finish(found: dict[str, Any]) -> None:
    """Add what is known at the end: the load, and the share of the machine that other processes had meanwhile."""
    began, machine, own = found.pop(_BEGAN)
    found["load_after"] = load()
    if machine is not None:
        busy = (_machine_seconds() or 0.0) - machine - (_own_seconds() - own)
        share = busy / ((time.time() - began) * (os.cpu_count() or 1))
        found["cpu_share_of_other_processes"] = f"{max(0.0, share):.0%}"


def _machine_seconds() -> float | None:
    """Processor seconds spent by everything on this machine; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = map(int, fields[:7])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor seconds of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def _memory_total() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- checkpoints -------------------------------------------------------------------------------------------------------

Fill = Callable[[str, Any], None]


def llama_config(
    hidden: int, layers: int, heads: int, ffn: int, vocab: int, positions: int, dtype: str
) -> dict[str, Any]:
    """``config.json`` of a Llama shape, head not tied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def opt_config(hidden: int, layers: int, heads: int, ffn: int, vocab: int) -> dict[str, Any]:
    """``config.json`` of an OPT shape."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], seed: int = 0, shard_bytes: int = GIB, fill: Fill | None = None
) -> int:
    """Write random weights shard by shard; memory never holds more than one shard.

    Args:
        config: content of ``config.json``, with ``torch_dtype``.
        fill: changes a tensor in place, given its name.

    Returns:
        Bytes of the weight files.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    dtype = getattr(torch, str(config["torch_dtype"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + shape.numel() * dtype.itemsize > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += shape.numel() * dtype.itemsize
    order = {name: number for number, name in enumerate(shapes)}

    def make(name: str) -> Any:
        tensor = torch.empty(shapes[name], dtype=dtype)
        if tensor.ndim == 1:  # norm weights and biases
            tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            tensor.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed * 100_003 + order[name]))
        if fill is not None:
            fill(name, tensor)
        return tensor

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # drawing normal numbers uses one thread each
            tensors = dict(zip(names, pool.map(make, names), strict=True))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_ids(path: Path, vocab: int, windows: int, length: int, seed: int = 0) -> Path:
    """Random token ids, [windows, length], as .npy."""
    import numpy as np

    np.save(path, np.random.default_rng(seed).integers(0, vocab, (windows, length), dtype=np.int64))
    return path


# -- cold files --------------------------------------------------------------------------------------------------------


def make_cold(*folders: Path) -> str:
    """Drop the folders' files from the page cache; returns how."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
    return "cold (sync, then posix_fadvise DONTNEED on every file of the source)"


# -- measured processes ------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A finished process.

    Attributes:
        seconds: wall time from start to exit.
        cpu_seconds: processor time, user and system.
        peak_anonymous: largest anonymous resident memory seen from outside, sampled every 10 ms; None without /proc.
        phases: seconds per phase, as its progress lines tell.
    """

    output: str
    seconds: float
    cpu_seconds: float
    peak_anonymous: int | None
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output)
        return found


def anonymous_bytes(pid: int) -> int | None:
    """Anonymous resident memory of a process."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command, watch its memory, pass its standard error on; a failure ends the benchmark."""
    marks: list[tuple[float, str]] = []
    spent = _own_seconds()
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )

    def follow() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            marks.append((time.perf_counter(), line.split(" ")[0]))
            print("   ", line.rstrip(), file=sys.stderr, flush=True)

    peak: list[int] = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes(process.pid) or 0)

    helpers = [threading.Thread(target=follow, daemon=True), threading.Thread(target=watch, daemon=True)]
    for helper in helpers:
        helper.start()
    assert process.stdout is not None
    output = process.stdout.read()
    code = process.wait()
    seconds = time.perf_counter() - started
    stop.set()
    for helper in helpers:
        helper.join()
    if code != 0:
        sys.exit(f"{' '.join(command)} ended with {code}: {output[-2000:]}")
    return Measured(
        output, seconds, round(_own_seconds() - spent, 1), peak[0] or None, _phases(started, marks, seconds)
    )


def _phases(started: float, marks: list[tuple[float, str]], seconds: float) -> dict[str, float]:
    """Seconds up to the last progress line of each phase, from the last of the phase before."""
    ends = {word: moment for moment, word in marks}
    phases: dict[str, float] = {}
    last = started
    for word, end in sorted(ends.items(), key=lambda item: item[1]):
        phases[word], last = round(end - last, 2), end
    phases["after"] = round(started + seconds - last, 2)
    return phases


def secateur(*arguments: str | Path) -> list[str]:
    """The command line of this environment's Secateur."""
    return [sys.executable, "-m", "secateur", *map(str, arguments)]


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass
class Goal:
    """One goal and what was measured for it."""

    what: str
    goal: str
    measured: str
    met: bool | None


@dataclass
class Result:
    """What a benchmark records."""

    name: str
    title: str
    conditions: dict[str, Any]
    goals: list[Goal]
    figures: dict[str, Any]
    notes: list[str]


def record(result: Result, small: bool) -> None:
    """Print a result; unless it was a small run, keep it and write the README's table anew."""
    _finish(result.conditions)
    text = json.dumps(asdict(result), indent=2)
    print(text)
    if small:
        print("small run: not recorded", file=sys.stderr)
        return
    _write(result.name, text)


def keep(result: Result) -> None:
    """Record what there is so far."""
    _finish(result.conditions)
    _write(result.name, json.dumps(asdict(result), indent=2))


def _write(name: str, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    write_readme()


def write_readme() -> None:
    """Replace the generated section of the README by what lies in ``results/``."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    lines = ["| benchmark | what | goal | measured | met |", "|---|---|---|---|---|"]
    for result in results:
        for goal in result["goals"]:
            met = {True: "yes", False: "**no**", None: "-"}[goal["met"]]
            lines.append(f"| {result['name']} | {goal['what']} | {goal['goal']} | {goal['measured']} | {met} |")
    for result in results:
        lines += ["", f"### {result['name']}: {result['title']}", ""]
        lines += [f"- {note}" for note in result["notes"]]
        figures = _flat(result["figures"])
        if len(figures) > _READABLE:
            figures = f"results/{result['name']}.json"
        lines.append(f"- figures: {figures}")
        lines.append(f"- conditions: {_flat(result['conditions'])}")
    before, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    README.write_text(f"{before}{_BEGIN}\n{chr(10).join(lines)}\n{_END}{after}", encoding="utf-8")


def _flat(mapping: Mapping[str, Any]) -> str:
    parts = []
    for key, value in mapping.items():
        shown = f"({_flat(value)})" if isinstance(value, dict) else str(value)
        parts.append(f"{key.replace('_', ' ')} {shown}")
    return ", ".join(parts)
