"""What cannot be cut, and why: written by hand, model by model of the zoo, not read from the family files."""

from __future__ import annotations

from zoo import ALL

BEHIND = "a norm stands between what writes the stream and the stream, and no map of the stream commutes with it"
TOGETHER = "queries and keys are normalised over all heads together, so without some the others change"
LOW_RANK = "its heads share low-rank queries, keys and values"
ONE = "one key/value head serves all query heads and stays; choose heads"
SLOPES = (
    "the slope of every head's positions (ALiBi) follows from the number of heads, so without some the others change"
)
PHI_NORMS = "its norms of queries and keys take their size from hidden_size / num_attention_heads"
LONG = "its tables of long positions (longrope) must have hidden_size / num_attention_heads entries"
OLMOE_NORMS = "its norms of queries and keys are as wide as the stream"
NO_EXPERTS = "its FFN has no experts"
GROUPED_EXPERTS = "its router chooses among groups of equally many experts and corrects each by a buffer of its own"
BLOOM_FFN = "its FFN is always 4 times as wide as the stream"
NORM_LIST = (
    "the family file does not describe model.layers.0.self_attn.k_layernorm.norms.0.weight, "
    "model.layers.0.self_attn.k_layernorm.norms.1.weight, model.layers.0.self_attn.k_layernorm.norms.2.weight"
)


def several(groups: int) -> str:
    """More than one key/value head."""
    return (
        f"there are {groups} key/value heads: query heads are a space of their own where one serves all of them; "
        "choose kv"
    )


def tied(family: str, consequence: str) -> str:
    """A head size that follows from the stream's width."""
    return (
        f"{family} has no head size of its own: it is the stream's width divided by the number of heads, so "
        f"{consequence}"
    )


ONE_GROUP = ("gemma-one", "falcon")
"""Models with one key/value head; all others have as many as said here."""
GROUPS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "llama-tied", "llama-mha", "qwen2-full"), 4),
    **dict.fromkeys(("gpt2", "gpt2-inner", "opt"), 4),
    **dict.fromkeys(("phi", "phi-norms", "phi3", "phi3-longrope", "granite", "granite-tied", "cohere"), 3),
    **dict.fromkeys(("cohere-norms", "starcoder2", "starcoder2-untied", "stablelm", "stablelm-parallel"), 3),
    **dict.fromkeys(("stablelm-norms", "olmoe", "falcon-new", "falcon-one-norm"), 3),
    **dict.fromkeys(("gemma", "gemma-untied", "gemma2", "gemma3_text", "olmo2", "smollm3"), 4),
    **dict.fromkeys(("qwen2_moe", "qwen2_moe-dense", "qwen3_moe", "gpt_oss"), 4),
    **dict.fromkeys(("gpt_neox", "gpt_neox-sequential", "bloom", "falcon-heads", "falcon-alibi"), 6),
    **dict.fromkeys(("deepseek_v3", "deepseek_v3-plain"), 4),
}
HEAD_SIZE_TIED = ("gpt2", "opt", "gpt_neox", "falcon", "bloom", "stablelm")
Why = dict[str, tuple[str, ...]]


def _always(name: str) -> Why:
    """Reasons in every layout, by kind."""
    family = ALL[name].model_type or name
    found: Why = {}
    if family in ("gemma2", "gemma3_text"):
        found = {"residual": (BEHIND,)}
    elif family == "olmo2":
        found = {"residual": (BEHIND,), "kv": (TOGETHER,), "heads": (TOGETHER,)}
    elif family == "olmoe":
        found = {"kv": (TOGETHER,), "heads": (TOGETHER,)}
    elif family == "deepseek_v3":
        found = {"kv": (LOW_RANK,), "heads": (LOW_RANK,), "experts": (GROUPED_EXPERTS,)}
    elif family == "bloom":
        found = {"kv": (SLOPES,), "heads": (SLOPES,), "residual": (BEHIND,)}
    elif name == "falcon-alibi":
        found = {"kv": (SLOPES,), "heads": (SLOPES,)}
    return found if ALL[name].where.experts else {**found, "experts": (NO_EXPERTS,)}


def _native(name: str) -> Why:
    """Reasons in the native layout alone, by kind."""
    if name == "phi-norms":
        return dict.fromkeys(("kv", "heads", "residual"), (PHI_NORMS,))
    if name == "phi3-longrope":
        return dict.fromkeys(("kv", "heads", "residual"), (LONG,))
    return {"olmoe": {"residual": (OLMOE_NORMS,)}, "bloom": {"ffn": (BLOOM_FFN,)}}.get(name, {})


def reasons(name: str, kind: str, layout: str) -> list[str]:
    """Why a model of the zoo refuses; nothing where it does not."""
    family = ALL[name].model_type or name
    found = list(_native(name).get(kind, ())) if layout == "native" else []
    always = list(_always(name).get(kind, ()))
    if SLOPES in always:
        found, always = [SLOPES, *found], []
    if layout == "native" and family in HEAD_SIZE_TIED:
        if kind in ("kv", "heads"):
            found.append(tied(family, "removing heads would resize the rest"))
        elif kind == "residual":
            found.append(tied(family, "a narrower stream would shrink every head"))
    found += always
    if not found and kind == "kv" and name in ONE_GROUP:
        found.append(ONE)
    if not found and kind == "heads" and name not in ONE_GROUP:
        found.append(several(GROUPS[name]))
    if name == "stablelm-norms" and kind in ("kv", "heads", "residual"):
        found.append(NORM_LIST)
    return found
