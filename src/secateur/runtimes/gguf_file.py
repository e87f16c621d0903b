"""GGUF, the format of llama.cpp, written from canonical tensors: block by block, whatever the size of the model.

llama.cpp fixes the shapes per architecture. Where its form of a family insists that the attention is as wide as the
stream (which a cut of either undoes), the same function is written in its most general form, ``llama``.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints import Checkpoint
from secateur.checkpoints.folder import DTYPES
from secateur.errors import refuse
from secateur.families import Architecture, Block, canonical_name
from secateur.families.loading import is_square
from secateur.families.packing import Shape
from secateur.runtimes.gguf_tokens import Vocabulary


@dataclass(frozen=True)
class Form:
    """How llama.cpp knows an architecture.

    Attributes:
        name: ``general.architecture``.
        interleaved: rotary pairs are neighbours there, while transformers pairs the halves of a head.
        fused: q, k and v are one matrix.
        any_width: the attention may be wider or narrower than the stream.
        activations: of the feed-forward network, as transformers names them.
        frequencies: a factor per rotary frequency can be given.
        tolerance: of the check, where llama.cpp itself rounds more than the type of the weights.
    """

    name: str
    interleaved: bool = False
    fused: bool = False
    any_width: bool = True
    activations: tuple[str, ...] = ("silu",)
    frequencies: bool = False
    tolerance: float = 0.0


_LLAMA: Final = Form("llama", interleaved=True, frequencies=True)
FORMS: Final[dict[str, Form]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Form("qwen2", any_width=False),
    "qwen3": Form("qwen3"),
    # its GELU is looked up in a table of half-precision numbers
    "gpt2": Form("gpt2", fused=True, any_width=False, activations=("gelu_new", "gelu_pytorch_tanh"), tolerance=2e-3),
}
"""By ``model_type``; a family without an entry has no form in llama.cpp that Secateur writes."""

_NAMES: Final = {
    "embedding": "TOKEN_EMBD",
    "positions": "POS_EMBD",
    "final_norm": "OUTPUT_NORM",
    "head": "OUTPUT",
    "attention_norm": "ATTN_NORM",
    "ffn_norm": "FFN_NORM",
    "q": "ATTN_Q",
    "k": "ATTN_K",
    "v": "ATTN_V",
    "out": "ATTN_OUT",
    "q_norm": "ATTN_Q_NORM",
    "k_norm": "ATTN_K_NORM",
    "gate": "FFN_GATE",
    "up": "FFN_UP",
    "down": "FFN_DOWN",
    "router": "FFN_GATE_INP",
}
_EXACT: Final = ("positions", "router")  # roles that llama.cpp wants in float32, as it does vectors
_QKV: Final = ("q", "k", "v")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: canonical tensors of one place, concatenated along the written axis or stacked."""

    name: str
    block: Block
    parts: tuple[str, ...]
    shape: Shape
    narrow: bool
    stacked: bool = False
    heads: int = 0

    def tensor(self, canonical: Mapping[str, Tensor]) -> Tensor:
        """The tensor of canonical ones; ``heads`` > 0 makes neighbours of the rotary pairs."""
        pieces = [canonical[name] for name in self.parts]
        if self.stacked:
            return torch.stack(pieces)
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not self.heads:
            return whole
        rest = whole.shape[1:]
        halves = whole.reshape(self.heads, 2, whole.shape[0] // self.heads // 2, *rest)
        return halves.transpose(1, 2).reshape(whole.shape)


def form_of(architecture: Architecture) -> Form:
    """The form in which llama.cpp runs an architecture at its sizes.

    Raises:
        RequestError: there is none.
    """
    family, config, sizes = architecture.family, architecture.config, architecture.sizes
    asked = f"GGUF of {family.model_type}"
    form = FORMS.get(family.model_type)
    if form is None:
        refuse("no-runtime", asked, "llama.cpp has no form of it that Secateur writes", f"it writes {', '.join(FORMS)}")
    if not form.any_width and not is_square(sizes):
        form = _LLAMA
    if architecture.per_layer or len(set(sizes.blocks)) > 1:
        refuse("no-runtime", asked, "its layers may differ (per-layer layout)", "prune with --layout native")
    if architecture.unmapped:
        refuse("no-runtime", asked, f"the family file does not describe {', '.join(sorted(architecture.unmapped))}")
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation not in form.activations:
        refuse("no-runtime", asked, f"its activation is {activation}, llama.cpp computes {form.activations[0]}")
    for flag in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if getattr(config, flag, False):
            refuse("no-runtime", asked, f"{flag} is set, which llama.cpp does not know")
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", *(("llama3",) if form.frequencies else ())):
        refuse(
            "no-runtime", asked, f"its rotary scaling is {kind!r}", "default, linear and (for llama) llama3 are written"
        )
    return form


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def context_of(architecture: Architecture) -> int:
    """Positions the file admits. llama.cpp runs these forms without a sliding window: within one, both are the same."""
    config = architecture.config
    context = int(getattr(config, "max_position_embeddings", 2048))
    layers = getattr(config, "layer_types", None)
    slides = layers is None or "sliding_attention" in layers
    window = getattr(config, "sliding_window", None)
    return min(context, int(window)) if window and slides else context


def entries(architecture: Architecture, form: Form) -> Iterator[Entry]:
    """Every tensor of the file, place by place."""
    from gguf import MODEL_TENSOR, TENSOR_NAMES

    def named(role: str, block: Block, kind: str, stacked: bool = False) -> str:
        key = f"{_NAMES[role]}_EXP" if stacked else _NAMES[role]
        return f"{TENSOR_NAMES[MODEL_TENSOR[key]].format(bid=block)}.{kind}"

    head, experts = architecture.sizes.head, architecture.sizes.blocks[0].experts
    for block in architecture.places:
        tensors = architecture.tensors_of(block)
        for tensor in tensors:
            role, kind, shape = tensor.role, tensor.kind, architecture.shapes[tensor.name]
            narrow = len(shape) > 1 and role not in _EXACT
            if form.fused and role in _QKV:
                if role == "q":
                    parts = tuple(canonical_name(block, part, kind) for part in _QKV)
                    rows = sum(architecture.shapes[part][0] for part in parts)
                    name = f"{TENSOR_NAMES[MODEL_TENSOR.ATTN_QKV].format(bid=block)}.{kind}"
                    yield Entry(name, block, parts, (rows, *shape[1:]), narrow)
            elif tensor.expert is not None:
                if tensor.expert == 0:
                    parts = tuple(canonical_name(block, role, kind, expert) for expert in range(experts))
                    name = named(role, block, kind, stacked=True)
                    yield Entry(name, block, parts, (experts, *shape), narrow, stacked=True)
            else:
                heads = 0
                if form.interleaved and role in ("q", "k"):
                    heads = shape[0] // head
                yield Entry(named(role, block, kind), block, (tensor.name,), shape, narrow, heads=heads)


def write_gguf(checkpoint: Checkpoint, path: Path, dtype: torch.dtype, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Write a checkpoint as one GGUF file.

    Args:
        dtype: of matrices; float32, float16 or bfloat16. Vectors, position tables and routers stay float32.
        vocabulary: None for a file that takes token ids only.

    Returns:
        ``architecture``, ``context`` and ``tensors`` of the file.
    """
    from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType

    architecture = checkpoint.architecture
    form = form_of(architecture)
    types = {
        torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
        torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    }
    narrow_type, file_type = types[dtype]
    writer = GGUFWriter(path, form.name)
    try:
        _add_facts(writer, architecture, checkpoint.folder.path.name)
        writer.add_file_type(file_type)
        if vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            vocabulary.write(writer, architecture.sizes.vocab)
        factors = _frequency_factors(architecture.config)
        if factors is not None:
            name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
            writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
        listed = list(entries(architecture, form))
        for entry in listed:
            kind = dtype if entry.narrow else torch.float32
            size = int(np.prod(entry.shape)) * kind.itemsize
            numpy_type = np.dtype(np.float32 if kind.itemsize == 4 else np.float16)
            raw = narrow_type if entry.narrow else GGMLQuantizationType.F32
            writer.add_tensor_info(entry.name, entry.shape, numpy_type, size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        held: dict[str, Tensor] = {}
        place: Block | str = ""
        for entry in listed:
            if entry.block != place:
                held, place = checkpoint.read(entry.block), entry.block
            tensor = entry.tensor(held).to(dtype if entry.narrow else torch.float32).contiguous()
            # numpy knows no bfloat16; the writer only wants the bytes
            writer.write_tensor_data((tensor.view(torch.int16) if tensor.itemsize == 2 else tensor).numpy())
    finally:
        writer.close()
    return {"architecture": form.name, "context": context_of(architecture), "tensors": len(listed)}


def stored_type(checkpoint: Checkpoint) -> torch.dtype:
    """The widest type of the checkpoint's weights, at most float32."""
    widest = max((DTYPES[name] for name in checkpoint.dtypes.values()), key=lambda found: found.itemsize)
    return torch.float32 if widest == torch.float64 else widest


def _add_facts(writer: Any, architecture: Architecture, name: str) -> None:
    config, sizes, block = architecture.config, architecture.sizes, architecture.sizes.blocks[0]
    writer.add_name(name)
    writer.add_vocab_size(sizes.vocab)
    writer.add_context_length(context_of(architecture))
    writer.add_embedding_length(sizes.residual)
    writer.add_block_count(len(sizes.blocks))
    writer.add_feed_forward_length(block.ffn)
    writer.add_head_count(block.kv * block.group)
    writer.add_head_count_kv(block.kv)
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    if architecture.family.norm == "rms":
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    else:
        writer.add_layer_norm_eps(float(config.layer_norm_epsilon))
    if block.experts:
        writer.add_expert_count(block.experts)
        writer.add_expert_used_count(sizes.active_experts)
    rope = _rope(config)
    if rope:
        from gguf import RopeScalingType

        writer.add_rope_dimension_count(sizes.head)
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))


def _frequency_factors(config: Any) -> np.ndarray | None:
    """By what each rotary frequency is divided (llama3 scaling), float32 [head / 2]."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponent = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    plain = float(_rope(config)["rope_theta"]) ** -exponent
    factors: np.ndarray = (plain / scaled.double()).float().numpy()
    return factors
