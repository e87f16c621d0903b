"""The tiny models of the tests: a configuration of every family and its variants, and where its parts are.

Written down here again, not taken from the family files. A new family joins with one line in ``FAMILIES``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

CONTEXT = 64
VOCABULARY = 300
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GQA = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}


@dataclass(frozen=True)
class Where:
    """Module names of a stock class, for hooks. Written down here again, not taken from the family files."""

    blocks: str = "model.layers"
    tables: tuple[str, ...] = ("model.embed_tokens",)
    attention_out: str = "self_attn.o_proj"
    ffn_out: str = "mlp"
    ffn_reader: str = "mlp.down_proj"
    experts: str | None = None
    router: str = "mlp.gate"
    shared_reader: str = "mlp.shared_expert.down_proj"
    final_norm: str = "model.norm"
    parallel: bool = False
    attention: str = "self_attn"
    fused_attention: str = ""
    attention_readers: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ffn_readers: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_silent: str = ""


@dataclass(frozen=True)
class Tiny:
    """A family at a size that fits in a test."""

    config: dict[str, Any] = field(default_factory=dict)
    where: Where = Where()
    model_type: str = ""


_MOE = {**GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_PLAIN = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
}
"""Without a head size: that of a head is 8."""
_UNGROUPED = {key: value for key, value in _PLAIN.items() if key != "num_key_value_heads"}
_BLOOM = {"hidden_size": 48, "n_layer": 3, "n_head": 6}
_FALCON = {**_UNGROUPED, "intermediate_size": None, "ffn_hidden_size": 96, "bias": True}
_DEEPSEEK = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": CONTEXT,
}
_LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
_H = Where(
    "transformer.h",
    ("transformer.word_embeddings",),
    "self_attention.dense",
    "mlp",
    "mlp.dense_4h_to_h",
    attention_readers=("self_attention.query_key_value",),
    ffn_readers=("mlp.dense_h_to_4h",),
    ffn_silent="mlp.dense_4h_to_h",
)
_NEOX = Where(
    "gpt_neox.layers",
    ("gpt_neox.embed_in",),
    "attention.dense",
    "mlp",
    "mlp.dense_4h_to_h",
    attention_readers=("attention.query_key_value",),
    ffn_readers=("mlp.dense_h_to_4h",),
)
_PARALLEL = Where(parallel=True)
_EXPERTS = Where(experts="mlp.experts")

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny(GQA),
    "mistral": Tiny({**GQA, "sliding_window": 8}),
    "qwen2": Tiny({**GQA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Tiny(GQA),
    "gpt2": Tiny(
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT},
        Where(
            "transformer.h",
            ("transformer.wte", "transformer.wpe"),
            "attn.c_proj",
            "mlp",
            "mlp.c_proj",
            fused_attention="attn.c_attn",
            attention_readers=("attn.c_attn",),
            ffn_readers=("mlp.c_fc",),
        ),
    ),
    "opt": Tiny(
        {
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
        Where(
            "model.decoder.layers",
            ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            "self_attn.out_proj",
            "fc2",
            "fc2",
            ffn_readers=("fc1",),
        ),
    ),
    "mixtral": Tiny(
        {**GQA, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        _EXPERTS,
    ),
    "phi": Tiny(
        _PLAIN, Where(attention_out="self_attn.dense", ffn_reader="mlp.fc2", parallel=True, ffn_readers=("mlp.fc1",))
    ),
    "phi3": Tiny(
        {**_PLAIN, "sliding_window": 8},
        Where(
            fused_attention="self_attn.qkv_proj",
            attention_readers=("self_attn.qkv_proj",),
            ffn_readers=("mlp.gate_up_proj",),
        ),
    ),
    "gemma": Tiny(GQA),
    "gemma2": Tiny({**GQA, "sliding_window": 8, "query_pre_attn_scalar": 6}),
    "gemma3_text": Tiny({**GQA, "sliding_window": 8, "query_pre_attn_scalar": 6, "sliding_window_pattern": 2}),
    "gpt_neox": Tiny(_UNGROUPED, replace(_NEOX, parallel=True)),
    "falcon": Tiny(_FALCON, replace(_H, parallel=True)),
    "bloom": Tiny(_BLOOM, _H),
    "stablelm": Tiny(_PLAIN),
    "olmo2": Tiny(GQA),
    "starcoder2": Tiny({**_PLAIN, "sliding_window": 8}, Where(ffn_reader="mlp.c_proj", ffn_readers=("mlp.c_fc",))),
    "smollm3": Tiny({**GQA, "no_rope_layer_interval": 2}),
    "granite": Tiny(
        {
            **_PLAIN,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
        }
    ),
    "cohere": Tiny({**_PLAIN, "logit_scale": 0.3}, _PARALLEL),
    "qwen2_moe": Tiny({**_MOE, "shared_expert_intermediate_size": 48}, _EXPERTS),
    "qwen3_moe": Tiny(_MOE, _EXPERTS),
    "olmoe": Tiny({**_PLAIN, "num_experts": 4, "num_experts_per_tok": 2}, _EXPERTS),
    "deepseek_v3": Tiny(
        _DEEPSEEK,
        Where(
            experts="mlp.experts",
            shared_reader="mlp.shared_experts.down_proj",
            attention_readers=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ),
    ),
    "gpt_oss": Tiny(
        {
            **GQA,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        Where(experts="mlp.experts", router="mlp.router"),
    ),
}
"""Families by name; a variant of one names its ``model_type``."""

VARIANTS: dict[str, Tiny] = {
    "llama-tied": Tiny({**GQA, "tie_word_embeddings": True}, model_type="llama"),
    "llama-mha": Tiny(
        {**GQA, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": None, "attention_bias": True},
        model_type="llama",
    ),
    "qwen2-full": Tiny({**GQA, "tie_word_embeddings": True}, model_type="qwen2"),
    "gpt2-inner": Tiny({**FAMILIES["gpt2"].config, "n_inner": 80}, FAMILIES["gpt2"].where, "gpt2"),
    "phi-norms": Tiny({**_PLAIN, "qk_layernorm": True}, FAMILIES["phi"].where, "phi"),
    "phi3-longrope": Tiny({**_PLAIN, "rope_parameters": _LONG}, FAMILIES["phi3"].where, "phi3"),
    "gemma-one": Tiny({**GQA, "num_key_value_heads": 1}, model_type="gemma"),
    "gemma-untied": Tiny({**GQA, "tie_word_embeddings": False}, model_type="gemma"),
    "gpt_neox-sequential": Tiny({**_UNGROUPED, "use_parallel_residual": False}, _NEOX, "gpt_neox"),
    "falcon-new": Tiny(
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3}, replace(_H, parallel=True), "falcon"
    ),
    "falcon-one-norm": Tiny(
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
        replace(_H, parallel=True),
        "falcon",
    ),
    "falcon-heads": Tiny({**_FALCON, "multi_query": False, "parallel_attn": False, "bias": False}, _H, "falcon"),
    "falcon-alibi": Tiny({**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}, _H, "falcon"),
    "stablelm-parallel": Tiny({**_PLAIN, "use_parallel_residual": True, "use_qkv_bias": True}, _PARALLEL, "stablelm"),
    "stablelm-norms": Tiny({**_PLAIN, "qk_layernorm": True}, model_type="stablelm"),
    "starcoder2-untied": Tiny(
        {**_PLAIN, "tie_word_embeddings": False, "use_bias": False}, FAMILIES["starcoder2"].where, "starcoder2"
    ),
    "granite-tied": Tiny({**FAMILIES["granite"].config, "tie_word_embeddings": True}, model_type="granite"),
    "cohere-norms": Tiny(
        {**_PLAIN, "logit_scale": 0.3, "use_qk_norm": True, "tie_word_embeddings": False}, _PARALLEL, "cohere"
    ),
    "qwen2_moe-dense": Tiny(
        {**FAMILIES["qwen2_moe"].config, "num_hidden_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2},
        _EXPERTS,
        "qwen2_moe",
    ),
    "deepseek_v3-plain": Tiny(
        {**_DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 1},
        FAMILIES["deepseek_v3"].where,
        "deepseek_v3",
    ),
}
ALL = {**FAMILIES, **VARIANTS}
