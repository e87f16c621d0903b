"""What a network's outputs are judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from secateur.errors import refuse

Loss = Callable[[Any, Any], Tensor]
"""A number, the mean over a batch, of a network's outputs and of labels."""


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """Of class scores [batch, classes, ...], the only output, and class numbers [batch, ...].

    Raises:
        RequestError: the outputs or labels are something else.
    """
    found = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if len(found) != 1 or not isinstance(labels, Tensor) or found[0].ndim < 2:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found)
        refuse("no-loss", "the default loss, cross-entropy", f"outputs {shapes}", "give loss=a function")
    return functional.cross_entropy(found[0], labels)


def losses_of(asked: Any) -> dict[str, Loss]:
    """Losses by name: of a function, of a mapping, or the cross-entropy.

    Raises:
        RequestError: something else was given.
    """
    if asked is None:
        return {"cross_entropy": cross_entropy}
    found = dict(asked) if isinstance(asked, Mapping) else {"loss": asked}
    if not found or not all(map(callable, found.values())):
        refuse("bad-loss", "loss", "neither a function nor a mapping of names to functions", "loss=fn(outputs, labels)")
    return found
