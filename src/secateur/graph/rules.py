"""What every operator says about the axes of its tensors: the one table that all front ends share.

A rule is called with the axes of the operation's inputs and gives those of its outputs, saying on the way what must go
together (``tie``), what is a product (``merge``, ``split``), what must stay (``freeze``), where a statistic would
change (``flag``), what a weight's axis is for (``role``), and how many multiplications there are (``macs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from secateur.graph.atoms import Axis, frozen, is_frozen
from secateur.graph.contractions import (
    attention,
    broadcast,
    convolution,
    einsum,
    linear,
    matmul,
    recurrent,
    recurrent_onnx,
)
from secateur.graph.ir import Operation
from secateur.graph.norms import MEAN_SQUARE
from secateur.graph.propagation import Axes, Propagation

Rule = Callable[[Propagation, Operation], list[Axes]]


def _same(run: Propagation, step: Operation) -> list[Axes]:
    return [run.axes(next(iter(step.inputs.values()))) for _ in step.outputs]


def _elementwise(run: Propagation, step: Operation) -> list[Axes]:
    for value in step.inputs.values():
        run.role(value, "scale" if step.attrs.get("scales") else "bias")
    operands = [run.axes(value) for value in step.inputs.values()]
    return [broadcast(run, out.shape, operands) for out in step.outputs]


def _create(run: Propagation, step: Operation) -> list[Axes]:
    return [[run.atoms.fresh(size) for size in out.shape] for out in step.outputs]


def _batch_norm(run: Propagation, step: Operation) -> list[Axes]:
    x = run.axes(step.inputs["x"])
    for name, value in step.inputs.items():
        if name != "x":
            run.atoms.tie(x[1], run.axes(value)[0])
            run.role(value, "buffer" if name in ("mean", "var") else "norm")
    for dim in step.attrs.get("statistics", ()):  # axes over which this very run takes mean and variance
        run.flag(x[dim], step)
    return [x] + [[frozen(size) for size in out.shape] for out in step.outputs[1:]]


def _layer_norm(run: Propagation, step: Operation) -> list[Axes]:
    x, rank = run.axes(step.inputs["x"]), step.attrs["rank"]
    for name, value in step.inputs.items():
        if name != "x":
            for axis, other in zip(x[-rank:], run.axes(value), strict=True):
                run.atoms.tie(axis, other)
            run.role(value, "norm")
    for axis in x[-rank:]:
        run.flag(axis, step)
    return [x] + [[frozen(size) for size in out.shape] for out in step.outputs[1:]]


def _group_norm(run: Propagation, step: Operation) -> list[Axes]:
    x, groups = run.axes(step.inputs["x"]), step.attrs["groups"]
    channels = x[1]
    for name, value in step.inputs.items():
        if name != "x":
            run.atoms.tie(channels, run.axes(value)[0])
            run.role(value, "norm")
    if groups == 1:
        run.flag(channels, step)
    elif groups < len(channels):
        group, inner = run.atoms.split(channels, (groups, len(channels) // groups))
        run.flag(inner, step)
        run.fact("num_groups", group)
    else:
        run.fact("num_groups", channels)
    for axis in x[2:]:
        run.flag(axis, step)
    return [x] + [[frozen(size) for size in out.shape] for out in step.outputs[1:]]


def _statistic(run: Propagation, step: Operation) -> list[Axes]:
    """Softmax and the like: every entry depends on all along ``dim``."""
    x = run.axes(step.inputs["x"])
    run.flag(x[step.attrs["dim"]], step)
    return [x]


def _ordered(run: Propagation, step: Operation) -> list[Axes]:
    """Sorting, running sums, selecting at run time: the axis ``dim`` stays as it is."""
    x = list(run.axes(step.inputs["x"]))
    for dim in step.attrs["dims"]:
        run.atoms.freeze(x[dim])
    return [
        [frozen(size) if dim in step.attrs["dims"] else x[dim] for dim, size in enumerate(out.shape)]
        for out in step.outputs
    ]


def _reduce(run: Propagation, step: Operation) -> list[Axes]:
    x, dims = run.axes(step.inputs["x"]), step.attrs["dims"]
    for dim in dims:
        run.role(step.inputs["x"], "consumer", dim)
        if step.attrs["kind"] != "sum":
            run.flag(x[dim], step, "rms_norm" if step.attrs["kind"] == MEAN_SQUARE else "")
    keep = step.attrs["keepdim"]
    out = [frozen(1) if dim in dims else axis for dim, axis in enumerate(x) if keep or dim not in dims]
    return [out for _ in step.outputs]


def _reshape(run: Propagation, step: Operation) -> list[Axes]:
    x = [axis for axis in run.axes(step.inputs["x"]) if len(axis) > 1]
    shape = [size for size in step.outputs[0].shape if size > 1]
    made: list[Axis] = []
    start = position = 0
    while start < len(x):
        end, stop = start + 1, position + 1
        have, want = len(x[start]), shape[position]
        while have != want:
            if have < want:
                have, end = have * len(x[end]), end + 1
            else:
                want, stop = want * shape[stop], stop + 1
        made += run.atoms.split(run.atoms.merge(x[start:end]), shape[position:stop])
        start, position = end, stop
    rest = iter(made)
    return [[next(rest) if size > 1 else frozen(size) for size in step.outputs[0].shape]]


def _permute(run: Propagation, step: Operation) -> list[Axes]:
    x = run.axes(step.inputs["x"])
    return [[x[dim] for dim in step.attrs["dims"]]]


def _expand(run: Propagation, step: Operation) -> list[Axes]:
    x, shape = run.axes(step.inputs["x"]), step.outputs[0].shape
    new = len(shape) - len(x)
    return [
        [
            x[dim - new] if dim >= new and len(x[dim - new]) == size else run.atoms.fresh(size)
            for dim, size in enumerate(shape)
        ]
    ]


def _repeat(run: Propagation, step: Operation) -> list[Axes]:
    x, times = run.axes(step.inputs["x"]), step.attrs["times"]
    x = [frozen(1)] * (len(times) - len(x)) + list(x)
    return [[_repeated(run, axis, count) for axis, count in zip(x, times, strict=True)]]


def _repeated(run: Propagation, axis: Axis, count: int) -> Axis:
    if len(axis) == 1:
        return run.atoms.fresh(count)
    return axis if count == 1 else np.tile(axis, count)


def _repeat_interleave(run: Propagation, step: Operation) -> list[Axes]:
    x, dim = list(run.axes(step.inputs["x"])), step.attrs["dim"]
    x[dim] = np.repeat(x[dim], step.attrs["count"])
    return [x]


def _concatenate(run: Propagation, step: Operation) -> list[Axes]:
    parts, dim = [run.axes(value) for value in step.inputs.values()], step.attrs["dim"]
    parts = [axes for axes in parts if len(axes) == len(step.outputs[0].shape)]  # empty ones of rank 1 are skipped
    for value in step.inputs.values():
        run.role(value, "bias")
    out = list(parts[0])
    for axes in parts[1:]:
        for position, axis in enumerate(axes):
            if position != dim:
                out[position] = run.atoms.tie(out[position], axis)
    out[dim] = np.concatenate([axes[dim] for axes in parts])
    return [out]


def _stack(run: Propagation, step: Operation) -> list[Axes]:
    parts, dim = [run.axes(value) for value in step.inputs.values()], step.attrs["dim"]
    out = broadcast(run, next(iter(step.inputs.values())).shape, parts)
    out.insert(dim, frozen(len(parts)))
    return [out]


def _split(run: Propagation, step: Operation) -> list[Axes]:
    """Parts of an axis; equal ones stay equal, since the code may count them instead of naming their size."""
    x, dim, sizes = (
        run.axes(step.inputs["x"]),
        step.attrs["dim"],
        [out.shape[step.attrs["dim"]] for out in step.outputs],
    )
    axis = x[dim]
    if len(set(sizes)) == 1:
        parts = _equal_parts(run, axis, len(sizes))
    else:
        parts = list(np.split(axis, np.cumsum(sizes)[:-1]))
        for part in parts:
            if len(part) == 1:
                run.atoms.freeze(part)
        run.parts(parts)
    return [[*x[:dim], part, *x[dim + 1 :]] for part in parts]


def _equal_parts(run: Propagation, axis: Axis, count: int) -> list[Axis]:
    if count == 1:
        return [axis]
    inner = frozen(len(axis) // count) if is_frozen(axis) else run.atoms.fresh(len(axis) // count)
    run.atoms.link(axis, (frozen(count), inner))
    return [inner] * count


def _gate(run: Propagation, step: Operation) -> list[Axes]:
    """Half of an axis times a function of the other half."""
    x, dim = run.axes(step.inputs["x"]), step.attrs["dim"]
    (half, _) = _equal_parts(run, x[dim], 2)
    return [[*x[:dim], half, *x[dim + 1 :]]]


def _windows(run: Propagation, step: Operation) -> list[Axes]:
    """Windows of one axis on a new last one; the axis stays as it is."""
    x, dim, out = run.axes(step.inputs["x"]), step.attrs["dim"], step.outputs[0].shape
    run.atoms.freeze(x[dim])
    return [[*x[:dim], frozen(out[dim]), *x[dim + 1 :], frozen(out[-1])]]


def _unbind(run: Propagation, step: Operation) -> list[Axes]:
    """One or all positions of an axis, which is gone then: it must stay as it is."""
    x, dim = run.axes(step.inputs["x"]), step.attrs["dim"]
    run.atoms.freeze(x[dim])
    return [[*x[:dim], *x[dim + 1 :]] for _ in step.outputs]


def _slice(run: Propagation, step: Operation) -> list[Axes]:
    x, dim = list(run.axes(step.inputs["x"])), step.attrs["dim"]
    x[dim] = x[dim][step.attrs["start"] : step.attrs["end"] : step.attrs["step"]]
    if len(x[dim]) == 1:  # it cannot get smaller
        run.atoms.freeze(x[dim])
    return [x]


def _flip(run: Propagation, step: Operation) -> list[Axes]:
    return [[a[::-1] if i in step.attrs["dims"] else a for i, a in enumerate(run.axes(step.inputs["x"]))]]


def _pad(run: Propagation, step: Operation) -> list[Axes]:
    """``attrs['pads']``: (before, after) of every axis; what is added stays, negative amounts crop."""
    out = []
    for axis, (before, after) in zip(run.axes(step.inputs["x"]), step.attrs["pads"], strict=True):
        kept = axis[max(-before, 0) : len(axis) - max(-after, 0)]
        parts = [frozen(max(before, 0)), kept, frozen(max(after, 0))]
        out.append(axis if before == after == 0 else np.concatenate(parts))
    return [out]


def _spatial(run: Propagation, step: Operation) -> list[Axes]:
    """Pooling, resizing: the last ``rank`` axes are spatial, everything before them passes."""
    x, rank = run.axes(step.inputs["x"]), step.attrs["rank"]
    for axis in x[-rank:]:
        run.atoms.freeze(axis)
    return [[*x[:-rank], *(frozen(size) for size in out.shape[-rank:])] for out in step.outputs]


def _into_channels(run: Propagation, step: Operation) -> list[Axes]:
    """Unfold, pixel unshuffle: every channel becomes a run of them, or with ``outer`` one in each of several runs."""
    x, out = run.axes(step.inputs["x"]), step.outputs[0].shape
    channel = len(out) - step.attrs["rank"] - 1
    for axis in x[channel + 1 :]:
        run.atoms.freeze(axis)
    inner = out[channel] // len(x[channel])
    factors = (frozen(inner), x[channel]) if step.attrs.get("outer") else (x[channel], frozen(inner))
    merged = run.atoms.merge(factors) if inner > 1 else x[channel]
    return [[*x[:channel], merged, *(frozen(size) for size in out[channel + 1 :])]]


def _from_channels(run: Propagation, step: Operation) -> list[Axes]:
    """Fold, pixel shuffle: runs of channels become one; with ``outer`` those at the same position of each run do."""
    x, out = run.axes(step.inputs["x"]), step.outputs[0].shape
    channel = len(x) - step.attrs["rank"] - 1
    for axis in x[channel + 1 :]:
        run.atoms.freeze(axis)
    axis, size = x[channel], out[len(out) - step.attrs["out_rank"] - 1]
    outer = axis
    if size != len(axis):
        outer = frozen(size) if is_frozen(axis) or size == 1 else run.atoms.fresh(size)
        inner = frozen(len(axis) // size)
        run.atoms.link(axis, (inner, outer) if step.attrs.get("outer") else (outer, inner))
    return [[*x[:channel], outer, *(frozen(n) for n in out[len(out) - step.attrs["out_rank"] :])]]


def _embedding(run: Propagation, step: Operation) -> list[Axes]:
    table, ids = run.axes(step.inputs["weight"]), run.axes(step.inputs["ids"])
    run.atoms.freeze(table[0])
    run.role(step.inputs["weight"], "producer", 1)
    return [[*ids, *table[1:]]]


def _index(run: Propagation, step: Operation) -> list[Axes]:
    """Rows picked by adjacent index tensors, from axis ``dim`` on; the axes they index stay as they are."""
    values = list(step.inputs.values())
    x, dim, count = run.axes(values[0]), step.attrs["dim"], len(values) - 1
    for axis in x[dim : dim + count]:
        run.atoms.freeze(axis)
    run.role(values[0], "bias")
    picked = [run.axes(value) for value in values[1:]]
    for axes in picked:
        for axis in axes:
            run.atoms.freeze(axis)
    rank = max(len(axes) for axes in picked)
    return [[*x[:dim], *map(frozen, step.outputs[0].shape[dim : dim + rank]), *x[dim + count :]]]


def _barrier(run: Propagation, step: Operation) -> list[Axes]:
    for value in step.inputs.values():
        for axis in run.axes(value):
            run.atoms.freeze(axis)
    return [[frozen(size) for size in out.shape] for out in step.outputs]


RULES: Final[Mapping[str, Rule]] = {
    "attention": attention,
    "barrier": _barrier,
    "batch_norm": _batch_norm,
    "concatenate": _concatenate,
    "convolution": convolution,
    "create": _create,
    "einsum": einsum,
    "elementwise": _elementwise,
    "embedding": _embedding,
    "expand": _expand,
    "flip": _flip,
    "from_channels": _from_channels,
    "gate": _gate,
    "group_norm": _group_norm,
    "index": _index,
    "into_channels": _into_channels,
    "layer_norm": _layer_norm,
    "linear": linear,
    "matmul": matmul,
    "ordered": _ordered,
    "pad": _pad,
    "permute": _permute,
    "recurrent": recurrent,
    "recurrent_onnx": recurrent_onnx,
    "reduce": _reduce,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "reshape": _reshape,
    "same": _same,
    "slice": _slice,
    "softmax": _statistic,
    "spatial": _spatial,
    "split": _split,
    "stack": _stack,
    "unbind": _unbind,
    "windows": _windows,
}
