"""llama.cpp through llama-cpp-python, in a process of its own: a file it does not like may end the process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from secateur.errors import InternalError
from secateur.runtimes.check import Ran

_TIMEOUT = 3600.0  # seconds


def run_gguf(path: Path, prompt: list[int], steps: int, texts: list[str], threads: int) -> tuple[Ran, list[list[int]]]:
    """Logits of a prompt, a greedy continuation, and token ids of texts, on the CPU with a float32 cache.

    Args:
        path: the GGUF file.
        prompt: token ids.
        steps: tokens to generate.
        texts: to be tokenised by the file's own vocabulary.

    Raises:
        InternalError: llama.cpp does not load or run the file.
    """
    request = {"file": str(path), "prompt": prompt, "steps": steps, "texts": texts, "threads": threads}
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.npz"
        process = subprocess.run(
            [sys.executable, "-m", "secateur.runtimes.llama_worker", str(result)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
        if process.returncode or not result.is_file():
            lines = [line for line in process.stderr.splitlines() if line.strip()]
            telling = [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines[-1:]
            found = f"exit {process.returncode}: {' | '.join(telling[:2])[:400]}"
            raise InternalError("export-check", "loading the export in llama.cpp", found)
        with np.load(result) as arrays:
            tokens = json.loads(str(arrays["texts"]))
            ran = Ran(str(arrays["version"]), arrays["logits"], arrays["generated"].tolist())
    return ran, tokens
