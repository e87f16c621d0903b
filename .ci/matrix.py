#!/usr/bin/env python3
"""The tests on the oldest and the newest packages that pyproject.toml allows, for every Python that is installed.

    .ci/matrix.py                          every pair of a Python and {oldest, newest}, the whole suite
    .ci/matrix.py --quick                  a few files of tests, some minutes for each
    .ci/matrix.py --oldest transformers    only this package at its lower bound, the rest as new as can be
    .ci/matrix.py --borrow FOLDER          what is not pinned comes from these site-packages, which save a torch

Environments lie in --work and are kept. The table says what was installed, what passed, and what could not be
installed; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
SHOWN = ("torch", "transformers", "safetensors", "huggingface-hub", "numpy", "pydantic", "typer")
QUICK = (
    "test_api.py",
    "test_budgets.py",
    "test_cuts.py",
    "test_data.py",
    "test_errors.py",
    "test_formats.py",
    "test_graph.py",
    "test_onnx_graph.py",
    "test_resume.py",
)
_BESIDE_NUMPY = "pyarrow"  # the newest one does not import beside the oldest numpy, and does not say so when installed
GRID = "test_grid.py"
FEW = "llama-fasp or llama-slicegpt or gpt2-magnitude or mixtral-fasp or llama-wanda or llama-llm_pruner"


def requirements() -> list[str]:
    """What pyproject.toml depends on."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["project"]["dependencies"])


def dev_requirements() -> list[str]:
    """What the tests need besides."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["dependency-groups"]["dev"])


def oldest(requirement: str) -> str:
    """The requirement at its lower bound: the last patch of that version."""
    found = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
    if found is None:
        return requirement
    parts = [*found[2].split("."), "0", "0"][:3]
    return f"{found[1]}~={'.'.join(parts)}"


def environment(python: str, which: str, arguments: argparse.Namespace) -> Path | str:
    """A virtual environment with the project, or why there is none."""
    folder = arguments.work / f"{python}-{which}"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([shutil.which(f"python{python}") or python, "-m", "venv", folder], check=True)
        wanted = requirements()
        pinned = [
            r for r in wanted if which == "oldest" and (not arguments.oldest or r.split(">")[0] in arguments.oldest)
        ]
        words = [*map(oldest, pinned), *(r for r in wanted if r not in pinned)]
        if arguments.borrow:
            site = next((folder / "lib").glob("python*/site-packages"))
            (site / "zz-borrowed.pth").write_text(f"{arguments.borrow}\n")
            words = list(map(oldest, pinned))
        tools = [oldest(r) if pinned and r.startswith(_BESIDE_NUMPY) else r for r in dev_requirements()]
        ran = subprocess.run([*pip, *words, *([] if arguments.borrow else tools)], capture_output=True, text=True)
        if ran.returncode == 0 and not arguments.borrow:
            ran = subprocess.run([*pip, "--no-deps", "--editable", ROOT], capture_output=True, text=True)
        if ran.returncode != 0:
            said = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            return f"cannot be installed: {(said or ['?'])[0][:160]}"
        (folder / "ready").touch()
    return folder


def versions(folder: Path) -> dict[str, str]:
    """What is installed there."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {SHOWN!r}}}))"
    ran = subprocess.run([folder / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def run(folder: Path, quick: bool) -> tuple[bool, str]:
    """Whether the tests pass, and pytest's last line of every part."""
    parts = [[str(ROOT / "tests" / name) for name in QUICK], [str(ROOT / "tests" / GRID), "-k", FEW]] if quick else [[]]
    good, said = True, []
    for words in parts:
        command = [folder / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
        ran = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
        good = good and ran.returncode == 0
        lines = ran.stdout.strip().splitlines()
        said.append(lines[-1] if lines else ran.stderr.strip()[-200:])
        print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), file=sys.stderr, flush=True)
    return good, "; ".join(said)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def main() -> None:
    """Every pair; prints a table in Markdown."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "secateur-matrix")
    options.add_argument("--python", action="append", help=f"default: {', '.join(PYTHONS)}")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--which", choices=("oldest", "newest"), action="append")
    options.add_argument("--oldest", action="append", default=[], help="only this package at its lower bound")
    options.add_argument("--borrow", type=Path)
    arguments = options.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    failed = False
    print("| Python | packages | " + " | ".join(SHOWN) + " | result |\n" + "| --- " * (len(SHOWN) + 3) + "|")
    for python in arguments.python or PYTHONS:
        for which in arguments.which or ("oldest", "newest"):
            if shutil.which(f"python{python}") is None:
                print(f"| {python} | {which} |" + " - |" * len(SHOWN) + " not on this machine |", flush=True)
                continue
            folder = environment(python, which, arguments)
            if isinstance(folder, str):
                print(f"| {python} | {which} |" + " - |" * len(SHOWN) + f" {folder} |", flush=True)
                continue
            good, said = run(folder, arguments.quick)
            failed = failed or not good
            found = versions(folder)
            print(f"| {python} | {which} | " + " | ".join(found[n] for n in SHOWN) + f" | {said} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
