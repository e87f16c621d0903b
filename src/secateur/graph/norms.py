"""Root mean square norms that a network writes out: found by their pattern, so that they count as norms."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Final

from secateur.graph.ir import Network, Operation, Value

MEAN_SQUARE: Final = "mean_square"
"""Kind of a reduction that is the statistic of such a norm."""
_ON_THE_WAY: Final = frozenset({"add", "sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "maximum"})
_APPLIED: Final = frozenset({"mul", "div", "true_divide", "multiply", "divide"})


def name_norms(network: Network) -> None:
    """Mark the means of squares of what they later scale: ``x * rsqrt(mean(x ** 2) + eps)``, casts between included."""
    maker = {made: step for step in network.operations for made in step.outputs}
    readers: dict[Value, list[Operation]] = defaultdict(list)
    for step in network.operations:
        for value in step.inputs.values():
            readers[value].append(step)
    for number, step in enumerate(network.operations):
        last = step.op == "reduce" and step.attrs["dims"] == [len(step.inputs["x"].shape) - 1]
        if last and step.source == "mean" and step.attrs["keepdim"]:
            squared = _squared(_behind(step.inputs["x"], maker), maker)
            if squared is not None and _scales(step.outputs[0], squared, maker, readers):
                network.operations[number] = replace(step, attrs={**step.attrs, "kind": MEAN_SQUARE})


def _behind(value: Value, maker: dict[Value, Operation]) -> Value:
    """What a value is before casts and copies."""
    while value in maker and maker[value].op == "same":
        value = next(iter(maker[value].inputs.values()))
    return value


def _squared(value: Value, maker: dict[Value, Operation]) -> Value | None:
    """What a value is the square of."""
    step = maker.get(value)
    if step is None:
        return None
    given = [_behind(each, maker) for each in step.inputs.values()]
    power = step.source == "pow" and step.attrs.get("exponent") == 2
    product = step.source == "mul" and len(given) == 2 and given[0] is given[1]
    return given[0] if power or product or step.source == "square" else None


def _scales(mean: Value, x: Value, maker: dict[Value, Operation], readers: dict[Value, list[Operation]]) -> bool:
    """Whether all that is done with a mean is to scale what it was taken of."""
    value = mean
    while len(readers[value]) == 1:
        (step,) = readers[value]
        if step.op == "same" or (step.source in _ON_THE_WAY and len(step.inputs) == 1):
            value = step.outputs[0]
            continue
        others = [_behind(each, maker) for each in step.inputs.values() if each is not value]
        return step.source in _APPLIED and len(others) == 1 and others[0] is x
    return False
