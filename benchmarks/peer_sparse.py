"""Runs inside the peers' environment (see bench_sparse.py): the released code that prunes single weights.

Nothing of theirs is here: what is imported comes from a checkout. Two things are asked of it: the whole prune of a
model, loading and saving included; and one matrix after the other, fed with given inputs. For the latter each matrix
stands alone in a model of one layer, so that the same released functions run as for the whole model.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SPARSITY = 0.5
PATTERNS = {"element": (0, 0), "2:4": (2, 4)}
"""What their functions call n and m: of every m inputs n go."""
CPU = torch.device("cpu")


# -- their functions on a machine without CUDA -------------------------------------------------------------------------


def without_cuda() -> None:
    """Let calls that move tensors to a GPU or wait for one do nothing."""
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    torch.cuda.synchronize = lambda *_, **__: None


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Where their code makes room for 128 windows, make it for as many as there are."""
    zeros = torch.zeros

    def fitting(*size: Any, **more: Any) -> Tensor:
        if size and isinstance(size[0], tuple) and len(size[0]) == 3 and size[0][0] == 128:
            return zeros((count, *size[0][1:]), **more)
        return zeros(*size, **more)

    torch.zeros = fitting
    try:
        yield
    finally:
        torch.zeros = zeros


Prune = Callable[[Any, Sequence[Tensor], str], None]
"""Prunes a model in place, given what its windows are and a pattern."""


def function_of(module: str, name: str, **options: Any) -> Prune:
    """A pruning function of a repository whose functions are called as Wanda's are."""
    prune = import_module(module)
    caught = prune.prepare_calibration_input

    def run(model: Any, windows: Sequence[Tensor], pattern: str) -> None:
        def prepare(*arguments: Any) -> Any:
            with room_for(len(windows)):
                return caught(*arguments)

        prune.prepare_calibration_input = prepare
        prune.get_loaders = lambda *_, **__: ([(window[None],) for window in windows], None)
        model.seqlen, model.hf_device_map = windows[0].shape[0], {}
        n, m = PATTERNS[pattern]
        seen = Namespace(nsamples=len(windows), seqlen=model.seqlen, seed=0, sparsity_ratio=SPARSITY, **options)
        getattr(prune, name)(seen, model, None, CPU, prune_n=n, prune_m=m)

    return run


def functions(peer: str) -> dict[str, Prune]:
    """What a repository has, by our names."""
    if peer == "wanda":
        names = {"magnitude": "prune_magnitude", "wanda": "prune_wanda", "sparsegpt": "prune_sparsegpt"}
        return {ours: function_of("lib.prune", theirs, use_variant=False) for ours, theirs in names.items()}
    if peer == "ria":
        plain = {
            "reconstruction": False,
            "gptq": False,
            "per_outneuron": True,
            "reallocation": False,
            "semi_sparse_acc": False,
        }
        options = {"model": "llama", "calib_dataset": "", "prune_method": "ria", "a": 0.5, **plain}
        return {"ria": function_of("lib.prune", "prune_ria", **options)}
    return {"sparsegpt": swept}


def swept(model: Any, windows: Sequence[Tensor], pattern: str) -> None:
    """SparseGPT's class on the one matrix of a model, as its ``llama_sequential`` uses it."""
    (linear,) = (module for module in model.modules() if type(module) is nn.Linear)
    gpt, (n, m) = import_module("sparsegpt").SparseGPT(linear), PATTERNS[pattern]
    for window in windows:
        gpt.add_batch(window[None], None)
    model.hessian = gpt.H.clone()
    gpt.fasterprune(SPARSITY, prunen=n, prunem=m)


# -- a matrix alone ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that holds one matrix and passes its inputs on."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight.clone()

    def forward(self, inputs: Tensor, **_: Any) -> tuple[Tensor]:
        self.linear(inputs)
        return (inputs,)


class Alone(nn.Module):
    """A model of that layer, whose windows are the matrix's inputs."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(weight)])
        self.config = SimpleNamespace(use_cache=False, hidden_size=weight.shape[1])

    def forward(self, inputs: Tensor) -> None:
        self.model.layers[0](inputs, attention_mask=None, position_ids=None)


def matrices(peer: str, folder: Path, output: Path) -> None:
    """Prune every matrix of a folder as every function and pattern says; writes the weights that come out.

    The folder holds files of ``weight.NAME`` [out, in] and the ``inputs.KEY`` [windows, length, in] that they read, and
    ``keys.json``, which says who reads what.
    """
    keys: dict[str, dict[str, str]] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
    made = functions(peer)
    if peer == "wanda":
        del made["sparsegpt"]  # a copy of the class that the repository of that name is asked for
    for file, readers in keys.items():
        found = {}
        with safe_open(folder / file, framework="pt") as handle:
            for name, key in readers.items():
                weight, inputs = handle.get_tensor(f"weight.{name}"), handle.get_tensor(f"inputs.{key}")
                for method, run in made.items():
                    for pattern in PATTERNS:
                        model = Alone(weight)
                        run(model, list(inputs), pattern)
                        found[f"{method}.{pattern}.{name}"] = model.model.layers[0].linear.weight.data.contiguous()
                        if hasattr(model, "hessian"):
                            found[f"hessian.{pattern}.{name}"] = model.hessian
        save_file(found, output / file)


# -- a whole model -----------------------------------------------------------------------------------------------------


def whole(peer: str, method: str, pattern: str, folder: str, data: str, output: str) -> dict[str, float]:
    """Load, prune, save."""
    from transformers import AutoModelForCausalLM

    run, started, processor = functions(peer)[method], time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    run(model, list(torch.from_numpy(np.load(data))), pattern)
    model.save_pretrained(output)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - processor}


def main() -> None:
    """Arguments: peer, checkout, then ``matrices FOLDER OUT`` or ``whole METHOD PATTERN MODEL IDS OUT``."""
    peer, checkout, task, *rest = sys.argv[1:]
    sys.path.insert(0, checkout)
    logging.disable(logging.CRITICAL)
    without_cuda()
    with torch.no_grad(), redirect_stdout(sys.stderr):
        told = whole(peer, *rest) if task == "whole" else matrices(peer, *map(Path, rest))
    print(json.dumps({**(told or {}), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
