"""Run stock classes wholly in float64: what they cast to float32 for speed stays as precise as the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Precise(TorchFunctionMode):
    """Every cast to float32 becomes one to float64, so that equal functions agree to 1e-10 and not to 1e-6."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        exchanged = tuple(torch.float64 if a is torch.float32 else a for a in args)
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*exchanged, **named)
