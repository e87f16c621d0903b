"""What a network's outputs are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from secateur.errors import refuse
from secateur.evidence.batches import Example
from secateur.graph.host import Host
from secateur.graph.modules import ModuleHost
from secateur.graph.state import shadow
from secateur.graph.tape import call

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


def measured(host: Host, losses: Mapping[str, Loss], batches: Iterable[Example]) -> dict[str, float]:
    """Every loss of a network, its mean over batches, as at evaluation.

    Args:
        host: of a module, the losses get what it returns; of anything else its one output, or a list of them.
    """
    module = shadow(host.module).eval() if isinstance(host, ModuleHost) else None
    total, count = dict.fromkeys(losses, 0.0), 0
    for example in batches:
        with torch.no_grad():
            outputs: Any = call(module, example.inputs) if module is not None else host.run(example.inputs)[0]
            if module is None and len(outputs) == 1:
                (outputs,) = outputs
            for name, loss in losses.items():
                total[name] += float(loss(outputs, example.labels))
        count += 1
    return {name: value / max(count, 1) for name, value in total.items()}
