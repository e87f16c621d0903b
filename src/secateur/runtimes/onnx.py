"""ONNX: the stock model as one graph with its key/value cache as inputs and outputs, run in onnxruntime.

Inputs: ``input_ids`` [batch, sequence], and per block ``past.I.key`` and ``past.I.value`` [batch, key/value heads,
past, head]; outputs: ``logits`` and the ``present.I.*`` of the same form, to be fed back. An empty past (length 0)
begins a text, so that one graph serves prompts and single steps. All rows of a batch are of equal length: there is no
padding mask. Everything is float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import InternalError, refuse
from secateur.families import Architecture
from secateur.runtimes.check import Ran

PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE: Final = 3 * 2**29
"""Bytes of weights up to which they lie in the graph's own file (protobuf ends at 2 GiB); larger ones lie beside it."""


class _WithCache(nn.Module):
    """The stock model with its cache as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for block in range(len(past) // 2):
            cache.update(past[2 * block], past[2 * block + 1], block)
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def write_onnx(model: Any, architecture: Architecture, path: Path) -> None:
    """Write the graph of a stock model in float32; a large one's weights lie in ``NAME.data`` beside it.

    Raises:
        InternalError: torch cannot turn the model into ONNX.
    """
    sizes = architecture.sizes
    sample = [torch.zeros(2, block.kv, 5, sizes.head) for block in sizes.blocks for _ in range(2)]
    names = [f"{block}.{kind}" for block in range(len(sizes.blocks)) for kind in ("key", "value")]
    free = torch.export.Dim.DYNAMIC
    if any(block.experts for block in sizes.blocks):
        model.set_experts_implementation("batched_mm")  # the fused products have no form in ONNX
    bytes_of_weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    try:
        with _quietly():
            program = torch.onnx.export(
                _WithCache(model).eval(),
                (torch.zeros(2, 7, dtype=torch.int64), sample),
                input_names=["input_ids", *(f"past.{name}" for name in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
                dynamic_shapes=({0: free, 1: free}, [{0: free, 2: free}] * len(sample)),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=bytes_of_weights > ONE_FILE)
    except Exception as error:  # the exporter raises many types, with the whole graph in the message
        reason = str(error.__cause__ or error).strip().split("\n")[0][:300]
        asked = f"ONNX graph of {architecture.family.model_type}"
        raise InternalError("onnx-export", asked, f"{type(error).__name__}: {reason}") from error


def run_onnx(path: Path, prompt: list[int], steps: int) -> Ran:
    """Logits of a prompt and a greedy continuation, in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs[1:]}

    def step(ids: list[int]) -> Any:
        logits, *present = session.run(None, {"input_ids": np.asarray([ids], dtype=np.int64), **past})
        past.update(zip(past, present, strict=True))
        return logits[0]

    logits = step(prompt)
    generated: list[int] = []
    last = logits[-1]
    for _ in range(steps):
        generated.append(int(last.argmax()))
        last = step(generated[-1:])[-1]
    return Ran(str(onnxruntime.__version__), logits, generated)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's notices (missing torchvision, deprecations inside torch) out of our output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def require_context(architecture: Architecture) -> None:
    """Refuse what the graph cannot hold: rotary tables that change with the length of the text."""
    rope = getattr(architecture.config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        asked = f"ONNX graph of {architecture.family.model_type}"
        refuse("no-runtime", asked, f"its rotary tables ({kind}) change with the length of the text")
