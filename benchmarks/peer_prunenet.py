"""Runs inside the peer's environment (see bench_prunenet.py): efficient_pruners on a checkpoint, times and rows out."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time

import torch
from efficient_pruners import PruneNet, PruningConfig
from safetensors.torch import save_file


def main() -> None:
    """Arguments: model folder, neurons to remove (share), episodes, file for the chosen rows."""
    model, share, episodes, rows = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        pruner = PruneNet(PruningConfig(num_episodes=episodes, device="cpu", save_dir=folder))
        started = time.perf_counter()
        pruner.fit(model, compression_ratio=share)
        trained = time.perf_counter()
        pruned = pruner.compress(share)
        done = time.perf_counter()
    layers = pruned.model.decoder.layers
    save_file({str(i): layer.fc1.weight.detach().float().contiguous() for i, layer in enumerate(layers)}, rows)
    seconds = {"fit_s": trained - started, "compress_s": done - trained, "threads": torch.get_num_threads()}
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
