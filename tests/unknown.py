"""Types of transformers without a family file, tiny, with the module names an oracle needs: what is inferred is tried.

``python tests/unknown.py`` prunes each of them in every space and writes the table in ``docs/inference.md``. A cell is
*right* where the pruned model computes what the dense one computes with the removed units silenced by hooks
(``masking.py``, whose module names are written down here by hand), *refused* where Secateur says no, *wrong* otherwise.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import masking
import models
import secateur
from secateur.engine.prepare import prepare
from secateur.engine.progress import Silent
from secateur.engine.request import make_request
from secateur.engine.run import Run
from secateur.errors import RequestError
from secateur.inference import open_checkpoint
from secateur.plans import Plan
from secateur.reports.documentation import regenerate
from secateur.reports.markdown import table
from zoo import CONTEXT, GQA, Tiny, Where

_MHA: dict[str, Any] = {**GQA, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_EXPERTS: dict[str, Any] = {**GQA, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT_TABLES = ("transformer.wte", "transformer.wpe")

UNKNOWN: dict[str, Tiny] = {
    "apertus": Tiny(GQA),
    "arcee": Tiny(GQA),
    "biogpt": Tiny(
        {k: v for k, v in _MHA.items() if k not in ("num_key_value_heads", "head_dim")},
        Where("biogpt.layers", ("biogpt.embed_tokens", "biogpt.embed_positions"), "self_attn.out_proj", "fc2", "fc2"),
    ),
    "bitnet": Tiny({**GQA, "hidden_size": 64}),
    "codegen": Tiny(
        {**_GPT, "rotary_dim": 8}, Where("transformer.h", ("transformer.wte",), "attn.out_proj", "mlp", "mlp.fc_out")
    ),
    "cohere2": Tiny({**GQA, "sliding_window": 4, "num_hidden_layers": 4}),
    "dbrx": Tiny(
        {
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 3,
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "diffllama": Tiny(GQA),
    "doge": Tiny({**GQA, "num_hidden_layers": 3}),
    "dots1": Tiny(
        {
            **GQA,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        Where(experts="mlp.experts", shared_reader="mlp.shared_experts.down_proj"),
    ),
    "ernie4_5": Tiny(GQA),
    "exaone4": Tiny({**GQA, "num_hidden_layers": 4, "sliding_window": 4}),
    "glm": Tiny({**GQA, "head_dim": 16, "pad_token_id": 1}),
    "glm4": Tiny({**GQA, "head_dim": 16, "pad_token_id": 1}),
    "gpt_bigcode": Tiny(_GPT, Where("transformer.h", _GPT_TABLES, "attn.c_proj", "mlp", "mlp.c_proj")),
    "gpt_neo": Tiny(
        {
            "hidden_size": 48,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "max_position_embeddings": CONTEXT,
        },
        Where("transformer.h", _GPT_TABLES, "attn.attention.out_proj", "mlp", "mlp.c_proj"),
    ),
    "gptj": Tiny(
        {**_GPT, "rotary_dim": 8}, Where("transformer.h", ("transformer.wte",), "attn.out_proj", "mlp", "mlp.fc_out")
    ),
    "granitemoe": Tiny(_EXPERTS, Where(ffn_out="block_sparse_moe", experts="block_sparse_moe.experts")),
    "helium": Tiny({**GQA, "hidden_size": 64}),
    "hunyuan_v1_dense": Tiny(GQA),
    "jamba": Tiny({**_EXPERTS, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "lfm2": Tiny({**GQA, "layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": Tiny({"hidden_size": 48, "num_hidden_layers": 3}),
    "minimax": Tiny(
        {**_EXPERTS, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
        Where(experts="mlp.experts"),
    ),
    "mpt": Tiny({"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT}),
    "nemotron": Tiny(GQA),
    "olmo": Tiny(GQA),
    "olmo3": Tiny({**GQA, "sliding_window": 4}),
    "persimmon": Tiny(_MHA, Where(attention_out="self_attn.dense", ffn_reader="mlp.dense_4h_to_h")),
    "phimoe": Tiny(_EXPERTS, Where(experts="mlp.experts")),
    "recurrent_gemma": Tiny({**GQA, "num_hidden_layers": 3}),
    "rwkv": Tiny({"hidden_size": 48, "num_hidden_layers": 3, "context_length": CONTEXT}),
    "seed_oss": Tiny(GQA),
    "xglm": Tiny({"d_model": 48, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4}),
}
"""By ``model_type``."""

CUTS: dict[str, tuple[dict[str, Any], ...]] = {
    "ffn": ({"spaces": "ffn"},),
    "kv": ({"spaces": "kv"}, {"spaces": "heads"}),
    "residual": ({"spaces": "residual"}, {"basis": "pca"}),
    "blocks": ({"spaces": "blocks"},),
}
"""Prunes of each space: options of ``magnitude``, of ``slicegpt`` where a basis is named."""
_RATIO = {"kv": 0.08, "blocks": 0.25}
EXACT = 1e-9
_REFUSALS = ("not-native", "unknown-architecture", "bad-option")


def cell(folder: Path, name: str, options: dict[str, Any]) -> tuple[str, str]:
    """Prune one space of a saved model and hold the result against the oracle.

    Returns:
        ``right``, ``refused`` or ``wrong``, and why.
    """
    kind = options.get("spaces", "residual")
    arguments: dict[str, Any] = {"method": "magnitude", "ratio": _RATIO.get(kind, 0.15), "options": options}
    if "basis" in options:
        (folder.parent / "notes.txt").write_text(models.text(200))
        arguments |= {"method": "slicegpt", "data": str(folder.parent / "notes.txt"), "samples": 8, "length": 32}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            secateur.prune(folder, output=Path(scratch) / "out", **arguments)
        except RequestError as error:
            return "refused", error.found
        except Exception as error:  # neither refused nor done
            return "wrong", f"{type(error).__name__}: {error}"[:200]
        request = make_request({"model": str(folder), **arguments})
        run = Run(prepare(request, partial(open_checkpoint)), Path(scratch) / "plan", Silent())
        return _compare(folder, Path(scratch) / "out", UNKNOWN[name].where, run.plan())


def _compare(folder: Path, output: Path, where: Where, plan: Plan) -> tuple[str, str]:
    ids = models.token_ids()
    dense, cut = (models.load(f, dtype=torch.float64, experts_implementation="eager") for f in (folder, output))
    for model in (dense, cut):
        masking.swap_precise_parts(model)
    untouched = masking.logits(dense, ids)
    expected = masking.logits(masking.mask(dense, where, plan), ids)
    error = masking.difference(expected, masking.logits(cut, ids))
    moved = masking.difference(untouched, expected)
    if moved < 1e-6:
        return "wrong", "the mask changes nothing, so nothing is proven"
    return ("right", f"{error:.0e}") if error < EXACT else ("wrong", f"differs by {error:.1e}")


def row(name: str) -> dict[str, tuple[str, str]]:
    """Every space of one type."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        models.save(folder, Tiny(UNKNOWN[name].config, UNKNOWN[name].where, name), torch.float64)
        for kind, cuts in CUTS.items():
            results = [cell(folder, name, options) for options in cuts]
            states = [state for state, _ in results]
            worst = "wrong" if "wrong" in states else "right" if "right" in states else "refused"
            found[kind] = (worst, next(why for state, why in results if state == worst))
    return found


def _brief(why: str, length: int = 170) -> str:
    return why if len(why) <= length else f"{why[:length]} ..."


def main(names: list[str]) -> None:
    """Try the types named (all by default) and rewrite the table."""
    rows, counts = [], dict.fromkeys(("right", "refused", "wrong"), 0)
    for name in names or sorted(UNKNOWN):
        started = time.perf_counter()
        found = row(name)
        for kind, (state, why) in found.items():
            counts[state] += 1
            rows.append([name, kind, state, _brief(why) if state != "right" else ""])
            print(name, kind, state, why, flush=True)
        print(f"    {time.perf_counter() - started:.0f} s", flush=True)
    print(counts)
    if not names:
        page = Path(__file__).parents[1] / "docs" / "inference.md"
        summary = ", ".join(f"{count} {state}" for state, count in counts.items())
        made = f"{len(UNKNOWN)} types, {len(rows)} cells: {summary}.\n\n" + table(["type", "space", "cut", "why"], rows)
        page.write_text(regenerate(page.read_text(encoding="utf-8"), {"unknown": lambda: made}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
