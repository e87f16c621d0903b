"""Rules of the operators that contract: products of matrices, convolutions, attention, recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.graph.atoms import Axis, frozen
from secateur.graph.ir import Operation
from secateur.graph.propagation import Axes, Propagation


def broadcast(run: Propagation, shape: Sequence[int], operands: Sequence[Axes]) -> Axes:
    """Axes of an elementwise result: those of the operands tied, aligned at the last one; size 1 ties nothing."""
    out = []
    for back in range(len(shape), 0, -1):
        size, axis = shape[-back], None
        for axes in operands:
            if len(axes) >= back and len(axes[-back]) == size and size > 1:
                axis = axes[-back] if axis is None else run.atoms.tie(axis, axes[-back])
        out.append(frozen(size) if axis is None else axis)
    return out


def linear(run: Propagation, step: Operation) -> list[Axes]:
    x, weight = run.axes(step.inputs["x"]), run.axes(step.inputs["weight"])
    run.atoms.tie(x[-1], weight[-1])
    run.role(step.inputs["weight"], "producer", 0)
    run.role(step.inputs["weight"], "consumer", len(weight) - 1)
    out = x[:-1] + weight[:-1]
    _bias(run, step, out[-1])
    run.macs([*out, x[-1]])
    return [out]


def _bias(run: Propagation, step: Operation, axis: Axis) -> None:
    if "bias" in step.inputs:
        bias = run.axes(step.inputs["bias"])
        run.role(step.inputs["bias"], "bias")
        if len(bias[-1]) == len(axis):
            run.atoms.tie(axis, bias[-1])


def matmul(run: Propagation, step: Operation) -> list[Axes]:
    a, b = run.axes(step.inputs["a"]), run.axes(step.inputs["b"])
    run.role(step.inputs["a"], "producer")
    run.role(step.inputs["a"], "consumer", len(a) - 1)
    run.role(step.inputs["b"], "producer")
    run.role(step.inputs["b"], "consumer", max(len(b) - 2, 0))
    run.atoms.tie(a[-1], b[-2] if len(b) > 1 else b[-1])
    batch_rank = max(len(a), len(b)) - 2
    shape = step.outputs[0].shape
    batch = broadcast(run, shape[:batch_rank], [a[:-2], b[:-2]]) if batch_rank > 0 else []
    out = batch + (a[-2:-1] if len(a) > 1 else []) + (b[-1:] if len(b) > 1 else [])
    run.macs([*out, a[-1]])
    _bias(run, step, out[-1])
    return [out]


def einsum(run: Propagation, step: Operation) -> list[Axes]:
    """``attrs['equation']`` has no spaces and names its output; an ellipsis stands for leading batch axes."""
    terms, result = step.attrs["equation"].split("->")
    letters: dict[str, Axis] = {}
    dots: list[Axes] = []
    for term, value in zip(terms.split(","), step.inputs.values(), strict=True):
        axes, plain = run.axes(value), term.replace("...", "")
        start = term.index("...") if "..." in term else len(term)
        count = len(axes) - len(plain)
        dots.append(axes[start : start + count])
        rest = axes[:start] + axes[start + count :]
        for position, (letter, axis) in enumerate(zip(plain, rest, strict=True)):
            run.role(value, "producer" if letter in result else "consumer", position + (position >= start) * count)
            known = letters.get(letter)
            if known is None or len(known) == 1:
                letters[letter] = axis
            elif len(axis) > 1:
                letters[letter] = run.atoms.tie(known, axis)
    rank = max(map(len, dots), default=0)
    shape = [max((len(d[-back]) for d in dots if len(d) >= back), default=1) for back in range(rank, 0, -1)]
    batch = broadcast(run, shape, dots)
    out: Axes = []
    for part in result.partition("..."):
        out += batch if part == "..." else [letters[letter] for letter in part]
    if len(step.inputs) > 1:
        run.macs([*batch, *letters.values()])
    return [out]


def convolution(run: Propagation, step: Operation) -> list[Axes]:
    x, weight, groups = run.axes(step.inputs["x"]), run.axes(step.inputs["weight"]), step.attrs["groups"]
    transposed = step.attrs.get("transposed", False)
    rank = len(weight) - 2
    for axis in [*x[-rank:], *weight[2:]]:
        run.atoms.freeze(axis)
    channels = x[-rank - 1]
    out = (_grouped_transposed if transposed else _grouped)(run, channels, weight, groups)
    run.role(step.inputs["weight"], "producer", int(transposed))
    run.role(step.inputs["weight"], "consumer", int(not transposed))
    _bias(run, step, out)
    shape = step.outputs[0].shape
    spatial = [frozen(size) for size in shape[-rank:]]
    per_group = weight[0] if transposed else weight[1]
    counted = [frozen(size) for size in (step.inputs["x"].shape if transposed else shape)[-rank:]]
    run.macs([*x[: -rank - 1], *counted, per_group, weight[1] if transposed else weight[0], *weight[2:]])
    return [[*x[: -rank - 1], out, *spatial]]


def _grouped(run: Propagation, channels: Axis, weight: Axes, groups: int) -> Axis:
    """Output channels of a convolution; how many groups remain is a fact of the weight."""
    if groups == 1:
        run.atoms.tie(channels, weight[1])
        return weight[0]
    inner, outer = len(weight[1]), len(weight[0]) // groups
    if inner == 1 and outer == 1:
        group = run.atoms.tie(channels, weight[0])
    elif inner == 1:
        group = channels
        run.atoms.link(weight[0], (group, run.atoms.fresh(outer)))
    else:
        group = run.atoms.fresh(groups)
        run.atoms.link(channels, (group, weight[1]))
        run.atoms.link(weight[0], (group, run.atoms.fresh(outer)))
    run.fact("groups", group)
    return weight[0]


def _grouped_transposed(run: Propagation, channels: Axis, weight: Axes, groups: int) -> Axis:
    run.atoms.tie(channels, weight[0])
    if groups == 1:
        return weight[1]
    inner = len(weight[0]) // groups
    group = weight[0] if inner == 1 else run.atoms.fresh(groups)
    if inner > 1:
        run.atoms.link(weight[0], (group, run.atoms.fresh(inner)))
    run.fact("groups", group)
    return run.atoms.merge((group, weight[1])) if len(weight[1]) > 1 else group


def attention(run: Propagation, step: Operation) -> list[Axes]:
    """softmax(q k^T) v; with fewer key heads than query heads, every key head serves a run of queries."""
    q, k, v = (run.axes(step.inputs[name]) for name in ("q", "k", "v"))
    run.atoms.tie(q[-1], k[-1])
    run.atoms.tie(k[-2], v[-2])
    run.flag(k[-2], step)
    if step.attrs["scaled"]:
        run.flag(q[-1], step)
    lead, heads = q[:-2], []
    for position in range(len(lead)):
        axes = [q[position], k[position], v[position]]
        size = max(map(len, axes))
        heads.append([np.repeat(a, size // len(a)) if 1 < len(a) < size else a for a in axes])
    out = [broadcast(run, [max(map(len, axes))], [[a] for a in axes])[0] for axes in heads]
    if "mask" in step.inputs:
        broadcast(run, [*step.outputs[0].shape[:-1], len(k[-2])], [[*out, q[-2], k[-2]], run.axes(step.inputs["mask"])])
    run.macs([*out, q[-2], k[-2], q[-1]])
    run.macs([*out, q[-2], k[-2], v[-1]])
    return [[*out, q[-2], v[-1]]]


def recurrent(run: Propagation, step: Operation) -> list[Axes]:
    """LSTM, GRU and plain RNN of any depth: one hidden size for all layers and directions, as the layer demands.

    A weight's rows are (gate, hidden unit). Weights come layer by layer, direction by direction: from the input, from
    the state, and their biases. Projected states are not read: the operation is a barrier then.
    """
    x = run.axes(step.inputs["x"])
    weights = [value for name, value in step.inputs.items() if name.startswith("weight")]
    gates, directions = step.attrs["gates"], 2 if step.attrs["bidirectional"] else 1
    count = 4 if step.attrs["has_biases"] else 2
    hidden = run.axes(weights[1])[-1]
    if len(weights) != step.attrs["num_layers"] * directions * count or len(hidden) * gates != weights[0].shape[0]:
        raise ValueError("projected states")
    entering = x[-1]
    for layer in range(step.attrs["num_layers"]):
        for direction in range(directions):
            start = (layer * directions + direction) * count
            for number, value in enumerate(weights[start : start + count]):
                axes = run.axes(value)
                run.atoms.link(axes[0], (frozen(gates), hidden))
                run.role(value, "producer" if number < 2 else "bias", 0)
                if number < 2:
                    run.atoms.tie(axes[1], entering if number == 0 else hidden)
                    run.role(value, "consumer", 1)
                    run.macs([*x[:-1], *axes])
        entering = np.concatenate([hidden] * directions) if directions > 1 else hidden
    for name, value in step.inputs.items():
        if name.startswith("state"):
            run.atoms.tie(run.axes(value)[-1], hidden)
    states = [[*map(frozen, out.shape[:-1]), hidden] for out in step.outputs[1:]]
    return [[*x[:-1], entering], *states]


def recurrent_onnx(run: Propagation, step: Operation) -> list[Axes]:
    """A layer as ONNX has it: x [time, batch, input]; weights [directions, gates x hidden, ...] with one hidden size.

    Both biases stand in one tensor, one behind the other; the output is [time, directions, batch, hidden].
    """
    x, gates = run.axes(step.inputs["x"]), step.attrs["gates"]
    weight, recurrence = run.axes(step.inputs["weight"]), run.axes(step.inputs["recurrence"])
    hidden = recurrence[2]
    for axes, name, entering in ((weight, "weight", x[-1]), (recurrence, "recurrence", hidden)):
        run.atoms.freeze(axes[0])
        run.atoms.link(axes[1], (frozen(gates), hidden))
        run.atoms.tie(axes[2], entering)
        run.role(step.inputs[name], "producer", 1)
        run.role(step.inputs[name], "consumer", 2)
        run.macs([*x[:-1], *axes])
    for name, parts in (("bias", 2 * gates), ("peephole", 3)):
        if name in step.inputs:
            axes = run.axes(step.inputs[name])
            run.atoms.freeze(axes[0])
            run.atoms.link(axes[1], (frozen(parts), hidden))
            run.role(step.inputs[name], "bias", 1)
    for name in ("state0", "state1"):
        if name in step.inputs:
            run.atoms.tie(run.axes(step.inputs[name])[-1], hidden)
    return [[*map(frozen, out.shape[:-1]), hidden] for out in step.outputs]
