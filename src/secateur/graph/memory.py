"""Bytes of a network, exactly, as functions of the channels that go: of what is saved, and of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from secateur.graph.atoms import Axis
from secateur.graph.costs import Products
from secateur.graph.ir import Network, Operation, Value

VIEWS: Final = frozenset({"expand", "permute", "reshape", "same", "slice", "split", "unbind", "windows"})
"""Operations that rearrange or pass on what is there already, and take no memory."""


class Memory:
    """Bytes of a network.

    Args:
        network: what was run.
        axes: classes of the axes of all its values.
    """

    def __init__(self, network: Network, axes: Mapping[Value, Sequence[Axis]]) -> None:
        names = {name: {name, *network.aliases.get(name, ())} for name in network.state}
        saved = [value for name, value in network.state.items() if not names[name] <= network.transient]
        living = lifetimes(network)
        self._products = Products([axes[value] for value in saved], [axes[value] for value in living])
        self._saved, self._living = (np.array([v.itemsize for v in part], dtype=np.int64) for part in (saved, living))
        self._first, self._last = (
            np.array([times[end] for times in living.values()], dtype=np.int64) for end in (0, 1)
        )

    def saved(self, gone: NDArray[np.bool_]) -> int:
        """Bytes of all tensors that are saved, shared ones once."""
        return int((self._products.each(0, gone) * self._saved).sum())

    def activation(self, gone: NDArray[np.bool_]) -> int:
        """Bytes of all tensors that are alive at once, at the fullest moment of one run on the example inputs."""
        sizes = self._products.each(1, gone) * self._living
        if not len(sizes):
            return 0
        change = np.zeros(int(self._last.max()) + 2, dtype=np.int64)
        np.add.at(change, self._first, sizes)
        np.subtract.at(change, self._last + 1, sizes)
        return int(change.cumsum().max())


def lifetimes(network: Network) -> dict[Value, tuple[int, int]]:
    """Every tensor that enters a run or is made by it, and the first and last moment at which it must be there.

    A tensor lives from the operation that makes it to the last one that reads it or a view of it; what is given out
    lives to the end. The state is not counted, nor are constants. Operations that work in place make views.
    """
    first = dict.fromkeys(network.inputs, 0)
    last, owner = dict(first), dict[Value, Value]()
    for moment, step in enumerate(network.operations, 1):
        given = list(step.inputs.values())
        for value in given:
            if owner.get(value, value) in first:
                last[owner.get(value, value)] = moment
        for made in step.outputs:
            if given and _is_view(step):
                owner[made] = owner.get(given[0], given[0])
            else:
                first[made] = last[made] = moment
    for value in network.outputs:
        if owner.get(value, value) in first:
            last[owner.get(value, value)] = len(network.operations) + 1
    return {value: (moment, last[value]) for value, moment in first.items()}


def _is_view(step: Operation) -> bool:
    return step.op in VIEWS or (step.source.endswith("_") and not step.source.endswith("__"))
