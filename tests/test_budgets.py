"""Targets, costs and the solver, against the stock models and brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import models
from secateur.budgets import Budget, Costs, Target, parse_target, ratio_target
from secateur.errors import RequestError
from secateur.families import Architecture, resized
from secateur.families.limits import problems, refusals
from secateur.families.stock import meta_model


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("params=70%", Target("params", fraction=0.7)),
        ("params=0.7x", Target("params", fraction=0.7)),
        ("bytes=2GiB", Target("bytes", absolute=2 * 2**30)),
        ("bytes=2GB", Target("bytes", absolute=2e9)),
        ("params=1.5B", Target("params", absolute=1.5e9)),
        ("block_params=12345", Target("block_params", absolute=12345)),
        ("flops=1e9", Target("flops", absolute=1e9)),
        ("kv_bytes=100%", Target("kv_bytes", fraction=1)),
        ("latency=.8x", Target("latency", fraction=0.8)),
        ("bytes= 3 MiB", Target("bytes", absolute=3 * 2**20)),
    ],
)
def test_parse_target(text: str, wanted: Target) -> None:
    found = parse_target(text)
    assert found.measure == wanted.measure
    assert found.of(1000) == pytest.approx(wanted.of(1000))


@pytest.mark.parametrize(
    "text",
    ["", "params", "params=", "parms=70%", "params=0%", "params=101%", "params=-5", "params=abc", "params=7q",
     "latency=3", "bytes=0", "params=nan", "params=inf", "params=1.1x", "=70%"],
)  # fmt: skip
def test_bad_targets(text: str) -> None:
    with pytest.raises(RequestError, match="target"):
        parse_target(text)


def test_near_measure_is_named() -> None:
    with pytest.raises(RequestError, match="did you mean params"):
        parse_target("parms=70%")


@pytest.mark.parametrize("ratio", ["-0.1", "1", "1.5", "abc", "nan", "inf", "", -0.1, 1, 1.5, math.nan])
def test_bad_ratios(ratio: float | str) -> None:
    with pytest.raises(RequestError, match="ratio"):
        ratio_target(ratio)


def architecture(family: str, **changes: Any) -> Architecture:
    """An architecture at test sizes."""
    tiny = models.ALL[family]
    config = AutoConfig.for_model(
        tiny.model_type or family, **{"vocab_size": models.VOCABULARY, **tiny.config, **changes}
    )
    return Architecture(config.to_dict())


def stock_params(made: Architecture) -> int:
    """Parameters of the stock model, shared storage once."""
    return sum(p.numel() for p in meta_model(made.config).parameters())


@settings(max_examples=30)
@given(
    family=st.sampled_from(["llama", "llama-tied", "mistral", "qwen2", "qwen3", "mixtral"]),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    head=st.sampled_from([2, 4, 6]),
    width=st.integers(1, 4),
    ffn=st.integers(1, 4),
    blocks=st.integers(1, 3),
    data=st.data(),
)
def test_params_are_those_of_the_stock_model(
    family: str, kv: int, group: int, head: int, width: int, ffn: int, blocks: int, data: st.DataObject
) -> None:
    """Before and after any cut that the stock class admits, for all head groupings."""
    made = architecture(
        family,
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=head,
        hidden_size=8 * width * kv * group,
        intermediate_size=8 * ffn,
        num_hidden_layers=blocks,
        layer_types=None,
    )
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    sizes = made.sizes
    assert costs.params(sizes) == stock_params(made)
    for kind in ("kv", "ffn", "residual", "blocks"):
        present = sizes.uniform(kind)
        assert present is not None
        sizes = sizes.resized(kind, data.draw(st.integers(1, present), label=kind))
    if data.draw(st.booleans(), label="untie"):
        sizes = sizes.untied()
    assume(not problems(made, sizes, 4))
    smaller = resized(made, sizes, range(len(sizes.blocks)))
    assert smaller.sizes == sizes
    assert costs.params(sizes) == stock_params(smaller)
    assert costs.bytes(sizes) == 4 * stock_params(smaller)


@settings(max_examples=15)
@given(
    family=st.sampled_from(["gpt2", "gpt2-inner", "opt"]),
    heads=st.integers(1, 4),
    blocks=st.integers(1, 3),
    data=st.data(),
)
def test_params_of_layer_norm_families(family: str, heads: int, blocks: int, data: st.DataObject) -> None:
    names = {"opt": ("hidden_size", "num_attention_heads", "num_hidden_layers")}.get(
        family, ("n_embd", "n_head", "n_layer")
    )
    values = {**dict(zip(names, (12 * heads, heads, blocks), strict=True))}
    if family == "opt":
        values["word_embed_proj_dim"] = 12 * heads
    made = architecture(family, **values)
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    sizes = made.sizes
    assert costs.params(sizes) == stock_params(made)
    sizes = sizes.resized("ffn", data.draw(st.integers(1, sizes.uniform("ffn") or 1)))
    sizes = sizes.resized("blocks", data.draw(st.integers(1, blocks)))
    assert costs.params(sizes) == stock_params(resized(made, sizes, range(len(sizes.blocks))))


def test_flops_and_cache_by_hand() -> None:
    """Two per multiply-add of every matrix a token meets; keys and values of every block."""
    made = architecture("mixtral")
    costs = Costs(made, dict.fromkeys(made.tensors, 2))
    attention = 48 * (64 + 32 + 32 + 64)
    experts = 2 * 3 * 48 * 32 + 4 * 48  # two of four visited, and the router
    assert costs.flops(made.sizes) == 2 * (3 * (attention + experts) + 48 * models.VOCABULARY)
    assert costs.kv_bytes(made.sizes) == 3 * 2 * 4 * 8 * 2


@settings(max_examples=80)
@given(
    family=st.sampled_from(["llama", "llama-tied", "mistral", "gpt2", "mixtral"]),
    kind=st.sampled_from(["ffn", "kv", "residual", "blocks"]),
    measure=st.sampled_from(["params", "block_params", "bytes", "flops", "kv_bytes"]),
    fraction=st.floats(0.05, 1),
    quantum=st.sampled_from([None, 1, 3, 8]),
    untie=st.booleans(),
)
def test_solver_against_brute_force(
    family: str, kind: str, measure: str, fraction: float, quantum: int | None, untie: bool
) -> None:
    """The reachable size whose cost is nearest, the smaller of two; refused only out of reach."""
    made = architecture(family)
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    base = made.sizes.untied() if untie else made.sizes
    cost = getattr(costs, measure)
    present = made.sizes.uniform(kind)
    assert present is not None
    if refusals(made, kind):
        with pytest.raises(RequestError, match="native"):
            Budget(made, costs, (Target("params", fraction=0.9),), 4, quantum).solve(kind, base)
        return
    budget = Budget(made, costs, (Target(measure, fraction=fraction),), 4, quantum)  # type: ignore[arg-type]
    step = 1 if kind in ("kv", "blocks") else (quantum or budget.quantum_of(kind))
    allowed = []
    for n in range(1, present + 1):
        sizes = base.resized(kind, n)
        whole = n == present or n % step == 0
        heads = (
            8
            if family.startswith("llama") and kind == "residual"
            else 4
            if family == "mixtral" and kind in ("ffn", "residual")
            else 1
        )
        if whole and (n % heads == 0 or sizes == made.sizes):
            allowed.append(sizes)
    wanted = fraction * cost(made.sizes)
    best = min(allowed, key=lambda s: (abs(cost(s) - wanted), cost(s)))
    try:
        found = budget.solve(kind, base)
    except RequestError as error:
        refusal = error
    else:
        assert abs(cost(found) - wanted) == abs(cost(best) - wanted)
        assert cost(found) == cost(best)
        assert budget.gap == pytest.approx((cost(best) - wanted) / cost(made.sizes))
        return
    assert refusal.code == "out-of-reach"
    assert wanted < min(map(cost, allowed)) or wanted > max(map(cost, allowed))


def test_ties_go_to_the_smaller() -> None:
    made = architecture("llama")
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    middle = (costs.params(made.sizes.resized("ffn", 32)) + costs.params(made.sizes.resized("ffn", 33))) / 2
    budget = Budget(made, costs, (Target("params", absolute=middle),), 4, quantum=1)
    assert budget.solve("ffn").uniform("ffn") == 32


def test_all_targets_are_met() -> None:
    made = architecture("llama")
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    both = (Target("params", fraction=0.9), Target("flops", fraction=0.75))
    alone = [Budget(made, costs, (t,), 4).solve("ffn").uniform("ffn") for t in both]
    assert Budget(made, costs, both, 4).solve("ffn").uniform("ffn") == min(alone)  # type: ignore[type-var]


def test_tolerance_refuses_a_gap() -> None:
    made = architecture("llama")
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    target = (ratio_target(0.1),)
    assert Budget(made, costs, target, 4, tolerance=0.05).solve("kv")
    with pytest.raises(RequestError, match="tolerance"):
        Budget(made, costs, target, 4, tolerance=0.001).solve("kv")


def test_quantum_is_a_power_of_two_below_one_per_cent() -> None:
    made = architecture("llama", intermediate_size=4096)
    costs = Costs(made, dict.fromkeys(made.tensors, 4))
    assert Budget(made, costs, (), 4).quantum_of("ffn") == 8
    assert Budget(made, costs, (), 4, largest_quantum=64).quantum_of("ffn") in (16, 32)
    assert Budget(made, costs, (), 4, quantum=5).quantum_of("ffn") == 5
