"""What a method knows of the stream where norms read it, and a rotation for each of these places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.cuts.stream import interfaces, triangular
from secateur.families import place_name
from secateur.plans.lazy import OneAtATime
from secateur.scores.directions import centred, in_hyperplane
from secateur.spaces import BlockView

_ENOUGH = 4096  # sampled rows for a basis that serves all norms


@dataclass(frozen=True)
class Signal:
    """What is known of the stream where norms read it.

    Attributes:
        gram: [width, width] float64.
        samples: [rows, width], empty unless the method's evidence has ``samples``.
        mean_free: whether both are without their mean, because the norms take it away.
    """

    gram: Tensor
    samples: Tensor
    mean_free: bool = False

    @classmethod
    def of(cls, summaries: Mapping[str, Iterable[Tensor]], name: str) -> Signal:
        """What the summaries say of one interface, or of all together (``stream``)."""
        parts = iter(summaries[name])
        gram = next(parts).clone()
        for part in parts:
            gram += part
        rows = summaries.get(f"{name}.samples")
        return cls(gram, torch.zeros(0, len(gram)) if rows is None else torch.cat(list(rows)))

    @property
    def weight(self) -> float:
        """Weight of the interface in a sum: its inverse energy, so that each counts the same."""
        return weight_of(self.gram)

    def centred(self) -> Signal:
        """The same without its mean: what a LayerNorm sees."""
        return Signal(centred(self.gram), self.samples - self.samples.mean(1, keepdim=True), mean_free=True)


def weight_of(gram: Tensor) -> float:
    """Inverse energy of a signal."""
    return 1 / max(float(gram.trace()), 1e-30)


def summarised(view: BlockView, evidence: Mapping[str, Tensor], each: bool) -> dict[str, Tensor]:
    """What ``Signal.of`` reads: Grams of a place's norm inputs, [width, width] each, or their weighted sum.

    Samples go the same way: each apart, or rows of all, as many of each and weighted alike.

    Args:
        evidence: by norm, its samples beside it; what is not of a norm stays as it is.
        each: whether every interface has a rotation of its own, or all share one.
    """
    found = {name: tensor for name, tensor in evidence.items() if not name.endswith("_norm")}
    norms = [name for name in evidence if name.endswith("_norm")]
    rows = {name: found.pop(f"{name}.samples") for name in norms if f"{name}.samples" in found}
    if each:
        found |= {f"{place_name(view.place)}.{name}": evidence[name] for name in norms}
        return found | {f"{place_name(view.place)}.{name}.samples": samples for name, samples in rows.items()}
    weights = {name: weight_of(evidence[name]) for name in norms}
    if rows:
        share = max(1, _ENOUGH // len(interfaces(view.architecture)))
        spread = [r[:: max(1, len(r) // share)] * weights[name] ** 0.5 for name, r in rows.items()]
        found["stream.samples"] = torch.cat(spread)
    return found | {"stream": torch.stack([evidence[name] * weights[name] for name in norms]).sum(0)}


class Rotations(OneAtATime):
    """The rotation of every interface, computed when asked for; asked in order, each is computed once.

    Each is in the gauge that makes the shortcut from the one before lower triangular: half of it need not be stored.

    Args:
        names: of the interfaces, in order.
        signal: what is known of one.
        directions: which survive there, [width, count] orthonormal columns.
    """

    def __init__(
        self,
        names: Sequence[str],
        signal: Callable[[str], Signal],
        directions: Callable[[str, Signal], Tensor],
    ) -> None:
        super().__init__(names, self._rotation)
        self._signal, self._directions = signal, directions

    def mean(self) -> Tensor:
        """Gram of all interfaces together, each weighed as where one rotation is shared: what the report draws."""
        total = torch.zeros(())
        for name in self._names:
            signal = self._signal(name)
            total = total + signal.gram * signal.weight / len(self._names)
        return total

    def _rotation(self, name: str) -> Tensor:
        index = self._names.index(name)
        before = self[self._names[index - 1]] if index else None
        signal = self._signal(name)
        directions = self._directions(name, signal)
        if signal.mean_free:
            directions = in_hyperplane(directions, signal.gram)
        return directions.contiguous() if before is None else triangular(directions, before)
