"""What was asked for: ``--ratio 0.3``, or what remains: ``--target params=70%``, ``bytes=2GiB``, ``latency=0.8x``.

Language models are measured in all but ``activation``, other networks in :data:`OF_NETWORKS`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from secateur.errors import near, refuse

Measure = Literal["params", "block_params", "bytes", "flops", "kv_bytes", "latency", "activation"]
MEASURES: Final[tuple[str, ...]] = get_args(Measure)
OF_NETWORKS: Final[tuple[Measure, ...]] = ("params", "flops", "bytes", "activation", "latency")
OF_LANGUAGE_MODELS: Final = tuple(measure for measure in MEASURES if measure != "activation")
_SCALES: Final = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_NUMBER: Final = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|x|[a-z]*)")


@dataclass(frozen=True)
class Target:
    """What shall remain of a measure: a ``fraction`` of what is there, or an ``absolute`` amount."""

    measure: Measure
    fraction: float | None = None
    absolute: float | None = None

    def of(self, present: float) -> float:
        """The amount that shall remain, given the present one."""
        if self.fraction is not None:
            return self.fraction * present
        assert self.absolute is not None
        return self.absolute

    def __str__(self) -> str:
        return (
            f"{self.measure}={self.fraction:.6g}x"
            if self.fraction is not None
            else f"{self.measure}={self.absolute:.9g}"
        )


def ratio_target(ratio: float | str) -> Target:
    """``--ratio r``: r of all parameters are gone, 0 <= r < 1."""
    try:
        value = float(ratio)
    except (TypeError, ValueError):
        refuse("bad-ratio", f"ratio {ratio!r}", "not a number", "give the share of parameters to remove, e.g. 0.3")
    if not (math.isfinite(value) and 0 <= value < 1):
        hint = f"did you mean {value / 100:g}?" if 5 <= value < 100 else "0.3 removes 30 % of all parameters"
        refuse("bad-ratio", f"ratio {ratio}", "it must be at least 0 and below 1", hint)
    return Target("params", fraction=1 - value)


def parse_target(text: str) -> Target:
    """A ``--target`` argument, MEASURE=AMOUNT.

    Raises:
        RequestError: unknown measure, or an amount that is none.
    """
    name, separator, amount = text.partition("=")
    if not separator or name not in MEASURES:
        refuse("bad-target", f"target {text!r}", f"{name!r} is no measure", near(name, MEASURES))
    found = _NUMBER.fullmatch(amount.strip().lower())
    if found is None:
        refuse("bad-target", f"target {text!r}", f"{amount!r} is no amount", "write 70%, 0.7x, 1.5B or 2GiB")
    value, unit = float(found[1]), found[2]
    measure: Measure = name  # type: ignore[assignment]
    if unit in ("%", "x"):
        fraction = value / 100 if unit == "%" else value
        if not 0 < fraction <= 1:
            refuse("bad-target", f"target {text!r}", "what remains must be above 0 and at most all")
        return Target(measure, fraction=fraction)
    if unit not in _SCALES or measure == "latency":
        refuse("bad-target", f"target {text!r}", f"{amount!r} is no amount of {name}", "write 70%, 0.7x, 1.5B or 2GiB")
    if value <= 0:
        refuse("bad-target", f"target {text!r}", "what remains must be above 0")
    return Target(measure, absolute=value * _SCALES[unit])
