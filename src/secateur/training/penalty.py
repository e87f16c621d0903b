"""A penalty on chosen entries of parameters, for training loops: that of MaskSparsity (arXiv:2201.06776)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from secateur.graph.spaces import Graph


class MaskedPenalty:
    """Pulls some entries of some parameters to nought; nothing else notices.

        penalty = MaskedPenalty.of_norms(model, secateur.graph(model, x), chosen, strength=5e-4)
        optimizer = torch.optim.SGD(penalty.groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
        ...
        loss.backward()
        penalty.add()      # to the gradients, between backward and step
        optimizer.step()

    Args:
        parameters: of a module, by name.
        masks: True where the penalty acts, by name, in the parameters' shapes.
        strength: what is added to a gradient: ``strength * sign(w)`` (``l1``) or ``strength * w`` (``l2``).
        kind: ``smooth-l1`` is l1 that does not step across nought with plain SGD.

    Raises:
        ValueError: a mask without a parameter or of another shape.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        strength: float = 5e-4,
        kind: Literal["l1", "l2", "smooth-l1"] = "l1",
    ) -> None:
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ValueError(f"the mask of {name!r} fits no parameter")
        self._parts = {name: (parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()}
        self.strength, self.kind = strength, kind

    @classmethod
    def of_norms(
        cls,
        module: nn.Module,
        graph: Graph,
        units: Mapping[str, Sequence[int]],
        strength: float = 5e-4,
        kind: Any = "l1",
    ) -> Self:
        """The penalty on the norms' scales of some channels.

        Args:
            module: what is trained.
            graph: of the module.
            units: channels by the name of their space, as in ``removed`` of a prune by any method.
        """
        masks: dict[str, Tensor] = {}
        parameters = dict(module.named_parameters())
        for name, chosen in units.items():
            for entry in graph.space(name).entries:
                if "norm" in entry.roles and entry.parameter and entry.name.rpartition(".")[2] == "weight":
                    mask = masks.setdefault(entry.name, torch.zeros(parameters[entry.name].shape, dtype=torch.bool))
                    mask[torch.from_numpy(entry.index[list(chosen)]).flatten()] = True
        return cls(parameters, masks, strength, kind)

    def groups(self, module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: no weight decay on what is under the penalty, for it would add to it."""
        under = {id(parameter) for parameter, _ in self._parts.values()}
        parts = ([p for p in module.parameters() if (id(p) in under) == held] for held in (False, True))
        return [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (weight_decay, 0.0), strict=True)]

    @torch.no_grad()
    def add(self, lr: float | None = None) -> None:
        """Add to the gradients of the chosen entries; those of all others keep their bits.

        Args:
            lr: the present learning rate, which ``smooth-l1`` needs.
        """
        for parameter, mask in self._parts.values():
            if parameter.grad is None:
                continue
            value = parameter[mask]
            if self.kind == "l2":
                pull = self.strength * value
            elif self.kind == "l1":
                pull = self.strength * value.sign()
            else:
                if lr is None:
                    raise ValueError("smooth-l1 needs the learning rate")
                pull = (value / lr).clamp(-self.strength, self.strength)
            parameter.grad[mask] += pull

    def left(self) -> float:
        """The largest absolute value among the chosen entries."""
        return max(
            (float(parameter[mask].abs().max()) for parameter, mask in self._parts.values() if mask.any()), default=0.0
        )
