"""Several processes write the bytes of one, whatever the method; and none waits for one that is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import grid
from conftest import Checkpoints
from secateur.engine.journal import work_folder
from secateur.evidence import Samples

REQUESTS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "ratio": 0.3},
    "flap": {"method": "flap"},
    "fasp": {"method": "fasp"},
    "slicegpt": {"method": "slicegpt"},
    "modegpt": {"method": "modegpt", "layout": "per-layer", "options": {"modules": "ffn+vo", "sequential": True}},
    "sparsegpt": {"method": "sparsegpt", "ratio": 0.3},
    "dotresize": {"method": "dotresize"},
    "shortgpt": {"method": "shortgpt", "ratio": 0.2},
    "blockpruner": {"method": "blockpruner", "ratio": 0.2, "options": {"objective": "kl"}},
    "llm_pruner": {"method": "llm_pruner", "options": {"taylor": "param_mix", "iterative_steps": 2}},
    "channels": {"method": "llm_pruner", "options": {"mode": "channel"}},
    "snip": {"method": "snip", "ratio": 0.3},
    "joint": {"method": "joint", "layout": "per-layer"},
    "disp_llm": {"method": "disp_llm", "layout": "per-layer", "options": {"steps": 4, "batch_tokens": 64}},
    "experts": {"model": "mixtral", "method": "stun", "ratio": 0.3, "options": {"weights": "wanda"}},
    "routed": {"model": "mixtral", "method": "dotresize", "options": {"spaces": "ffn"}},
}
"""One of every kind: data-free, dense then cut, sequential, mended, by samples, trials, gradients, labels, experts."""


Several = Callable[..., tuple[list[int], str]]
SHARES = {
    2: ("magnitude", "fasp", "slicegpt", "llm_pruner", "joint", "routed"),
    3: ("flap", "modegpt", "sparsegpt", "dotresize", "blockpruner", "channels", "experts"),
}
"""What CI runs in how many processes; all of them were run in 2, and most in 3 (docs/processes.md)."""


@pytest.fixture
def several(tmp_path: Path, checkpoint: Checkpoints, notes: Path) -> Several:
    """Runs requests in several processes; their exit status and what they said."""

    def run(count: int, requests: dict[str, dict[str, Any]], folder: str, **more: Any) -> tuple[list[int], str]:
        silence = {"SECATEUR_SILENCE": "20"} if more else {}  # somebody will fall silent
        made = []
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, request in requests.items():
            given = {"ratio": 0.15, "data": str(notes), "samples": 20, "length": 16, **request}
            model, output = checkpoint(request.get("model", "llama")), tmp_path / folder / name
            made.append({**given, "model": str(model), "output": str(output)})
        (tmp_path / "requests.json").write_text(json.dumps({"requests": made, **more}))
        script = Path(__file__).with_name("several.py")
        done = subprocess.run(
            [sys.executable, script, str(count), tmp_path / "requests.json"],
            capture_output=True,
            text=True,
            timeout=540,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **silence},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def _same(one: Path, other: Path) -> bool:
    return grid.hashes(one, *grid.TIMED) == grid.hashes(other, *grid.TIMED)


@pytest.mark.parametrize("count", sorted(SHARES))
def test_the_bytes_are_those_of_one_process(several: Several, tmp_path: Path, count: int) -> None:
    requests = {name: REQUESTS[name] for name in SHARES[count]}
    for processes, folder in ((1, "one"), (count, "several")):
        codes, said = several(processes, requests, folder)
        assert codes == [0] * processes, said
    for name in requests:
        assert _same(tmp_path / "one" / name, tmp_path / "several" / name), name
        assert not work_folder(tmp_path / "several" / name).exists()


ENDS = [(0, "kill"), (1, "stop"), (1, "kill")]
"""Ways to go; CI tries the first two, with SECATEUR_FULL set there are all."""


@pytest.mark.parametrize(("rank", "how"), ENDS if os.environ.get("SECATEUR_FULL") else ENDS[:2])
def test_nobody_waits_for_one_that_is_gone_and_the_same_command_resumes(
    several: Several, tmp_path: Path, rank: int, how: str
) -> None:
    request = {"fasp": REQUESTS["fasp"]}
    codes, said = several(3, request, "killed", **{how: [rank, 3]})
    for other in {0, 1, 2} - {rank}:
        assert codes[other] == 1, said
        assert f"{other}: process-died:" in said
    assert not (tmp_path / "killed" / "fasp").exists()
    assert (work_folder(tmp_path / "killed" / "fasp") / "journal.jsonl").exists()
    codes, said = several(2, request, "killed")  # also with another number of processes
    assert codes == [0, 0], said
    several(1, request, "one")
    assert _same(tmp_path / "one" / "fasp", tmp_path / "killed" / "fasp")


def test_what_is_at_fault_ends_all_with_its_code(several: Several, tmp_path: Path) -> None:
    codes, said = several(2, {"fasp": {**REQUESTS["fasp"], "data": None}}, "refused")
    assert codes == [2, 2]
    assert said.count("no-data") == 2
    assert list((tmp_path / "refused").iterdir()) == []


def test_torchrun_prints_one_object(checkpoint: Checkpoints, notes: Path, tmp_path: Path) -> None:
    common = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "secateur"]
    more = ["--method", "wanda", "--ratio", "0.3", "--json"]
    data = ["--data", str(notes), "--samples", "8", "--length", "16"]
    command = [*common, "prune", str(checkpoint()), "-o", str(tmp_path / "out"), *more, *data]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")
    done = subprocess.run([*common, "methods", "fasp", "--json"], capture_output=True, text=True, timeout=300)
    assert "fasp" in json.dumps(json.loads(done.stdout))
    assert "only prune is shared" in done.stderr


@pytest.mark.skipif(not os.environ.get("SECATEUR_FULL"), reason="two agents start slowly; SECATEUR_FULL tries them")
def test_two_agents_of_torchrun_write_the_bytes_of_one_process(
    checkpoint: Checkpoints, notes: Path, tmp_path: Path
) -> None:
    """As on two hosts: each agent starts one process, and they meet at one address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free.getsockname()[1]}"]
    words = ["-m", "secateur", "prune", str(checkpoint()), "--method", "fasp", "--ratio", "0.2", "--json"]
    words += ["--data", str(notes), "--samples", "8", "--length", "16", "-o"]
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = [sys.executable, *agent, *words, str(tmp_path / "two")]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0]
    assert sum(bool(text.strip()) for text in said) == 1
    assert subprocess.run([sys.executable, *words, str(tmp_path / "one")], capture_output=True).returncode == 0
    assert _same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("shape", [(3, 5, 2), (15, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_samples_of_several_processes_are_those_of_one(shape: tuple[int, ...], known: bool) -> None:
    signals = [torch.arange(30.0).reshape(shape) + 30 * turn for turn in range(13)]
    for cuts in ((0, 5, 13), (0, 0, 4, 13), (0, 1, 2, 13), (0, 12, 13)):
        alone, parts = Samples(7), []
        for signal in signals:
            alone.add(signal)
        for begin, end in pairwise(cuts):
            start = (12 * begin, 15 * begin) if known or not begin else None
            samples = Samples(7, start, None if begin == 0 else torch.clone)
            for signal in signals[begin:end]:
                samples.add(signal)
                samples.close_shard()
            parts.append(samples)
        parts[0].join([each.part() for each in parts[1:]])
        assert torch.equal(parts[0].named("x")["x.samples"], alone.named("x")["x.samples"]), cuts
