"""Runs inside the peers' environment (see bench_one_shot.py): the pruning code of a public repository, timed.

Nothing of theirs is here: what is imported comes from a checkout. Left out is what is not pruning: command lines,
downloads of data, evaluation, saving; the calibration windows are given.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def flap(model: Any, ids: Any, ratio: float) -> Callable[[], None]:
    """FLAP: ``lib.prune.prune_flap`` with its defaults, AL-AM and WIFV."""
    from lib import prune

    for layer in model.model.layers:  # its own model class has biases there
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    torch.half = torch.float32  # it stores means in the half precision that its models have; this one has another
    prune.get_loaders = lambda *_, **__: ([(row[None],) for row in ids], None)
    model.seqlen = ids.shape[1]
    options = Namespace(
        nsamples=len(ids), seed=0, metrics="WIFV", structure="AL-AM", pruning_ratio=ratio, remove_heads=8, unstr=False
    )
    return lambda: prune.prune_flap(options, model, None, torch.device("cpu"))


def cfsp(model: Any, ids: Any, ratio: float) -> Callable[[], None]:
    """CFSP: ``lib.prune.prune_cfsp`` with its defaults."""
    from lib import prune

    prune.get_loaders = lambda *_, **__: ([(row[None],) for row in ids], None)
    model.seqlen = ids.shape[1]
    options = Namespace(
        nsamples=len(ids),
        seed=0,
        global_metrics="angular",
        local_metrics="three_w_one_wa",
        a=1.0,
        b=1.0,
        c=1.0,
        pruning_ratio=ratio,
        cuda_friendly=False,
    )
    return lambda: prune.prune_cfsp(options, model, None, torch.device("cpu"))


def slicegpt(model: Any, ids: Any, ratio: float) -> Callable[[], None]:
    """SliceGPT: fusion, then ``rotate.rotate_and_slice`` with one width, batches of as many tokens as ours."""
    from slicegpt import layernorm_fusion, rotate
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter
    from slicegpt.config import config
    from slicegpt.slicing_scheduler import ConstSlicingScheduler

    config.device, config.dtype = torch.device("cpu"), torch.float32
    model.config.torch_dtype = torch.float32
    adapter = LlamaModelAdapter(model)
    split = ids.split(max(1, 4096 // ids.shape[1]))
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in split]

    def run() -> None:
        layernorm_fusion.replace_layers(adapter)
        layernorm_fusion.fuse_modules(adapter)
        width = int((1 - ratio) * adapter.hidden_size) // 8 * 8
        rotate.rotate_and_slice(adapter, batches, ConstSlicingScheduler(width))

    return run


def llm_pruner(model: Any, ids: Any, ratio: float) -> Callable[[], None]:
    """LLM-Pruner: one backward pass over all tokens, then ``MetaPruner.step`` on every block, as its script does."""
    import LLMPruner.torch_pruning as pruning
    from LLMPruner.models.hf_llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm
    from LLMPruner.pruner import hf_llama_pruner as parts

    own = LlamaForCausalLM.from_pretrained(model.name_or_path, torch_dtype=torch.float32).eval()  # what it can trace

    def run() -> None:
        layers = own.model.layers
        pruner = pruning.pruner.MetaPruner(
            own,
            ids[:2, :8],
            importance=parts.TaylorImportance(group_reduction="sum", taylor="param_first"),
            global_pruning=False,
            iterative_steps=1,
            ch_sparsity=ratio,
            ignored_layers=[],
            channel_groups={},
            consecutive_groups={layer.self_attn.q_proj: layer.self_attn.head_dim for layer in layers},
            customized_pruners={LlamaRMSNorm: parts.hf_rmsnorm_pruner},
            root_module_types=None,
            root_instances=[root for layer in layers for root in (layer.self_attn.q_proj, layer.mlp.gate_proj)],
        )
        own.zero_grad()
        own(ids, labels=ids).loss.backward()
        pruner.step()

    return run


PEERS = {"llm_pruner": llm_pruner, "flap": flap, "cfsp": cfsp, "slicegpt": slicegpt}
"""Adapter of each repository."""
ROOTS = {"slicegpt": "src"}
"""Where in its checkout a repository's packages lie, if not at the top."""


def main() -> None:
    """Arguments: peer, checkout, model folder, token ids (.npy), ratio."""
    name, checkout, folder, data, ratio = sys.argv[1:]
    sys.path.insert(0, str(Path(checkout) / ROOTS.get(name, "")))
    logging.disable(logging.CRITICAL)
    ids = torch.from_numpy(np.load(data))
    spent: dict[str, Any] = {}
    for windows in (ids[: max(8, len(ids) // 8)], ids):  # the first run warms up
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        run = PEERS[name](model, windows, float(ratio))
        started, processor = time.perf_counter(), time.process_time()
        with redirect_stdout(sys.stderr):
            run()
        spent = {"prune_s": time.perf_counter() - started, "prune_cpu_s": time.process_time() - processor}
    print(json.dumps({**spent, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
