"""2:4 matrices on a GPU that multiplies them faster: torch's semi-structured sparse tensors in the place of weights."""

from __future__ import annotations

import warnings
from typing import Final

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from secateur.errors import refuse

PATTERN: Final = "2:4"
DTYPES: Final = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # multiples that both of torch's implementations take
_NEEDED: Final = (8, 0)  # compute capability: the first with sparse tensor cores


def eligible(model: nn.Module) -> list[str]:
    """Linear layers whose weights can be run sparse: at most 2 of every 4 consecutive inputs are not zero.

    Their data type is float16 or bfloat16, their outputs are a multiple of 32, their inputs of 64.

    Returns:
        Names of the modules.
    """
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and _fits(module.weight)]


def _fits(weight: Tensor) -> bool:
    if weight.dtype not in DTYPES or weight.is_meta or weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return False
    return bool((weight.view(-1, 4) != 0).sum(1).max() <= 2)


def require_device(device: torch.device) -> None:
    """Refuse where zeros do not make anything faster.

    Raises:
        RequestError: no CUDA device, or one without sparse tensor cores.
    """
    asked = f"running {PATTERN} zeros on {device}"
    if device.type != "cuda" or not torch.cuda.is_available():
        found = "zeros do not speed anything up there: this takes an NVIDIA GPU"
        refuse("no-sparse", asked, found, "leave out sparse=, or use a GPU")
    if torch.cuda.get_device_capability(device) < _NEEDED:
        found = f"{torch.cuda.get_device_name(device)} has no sparse tensor cores"
        refuse("no-sparse", asked, found, "leave out sparse=")


def run_sparse(model: nn.Module, device: torch.device) -> list[str]:
    """Move a model to a GPU and let its 2:4 layers run sparse, in place; for inference, it does not train then.

    Returns:
        Names of the modules that are sparse now; the others stay dense.

    Raises:
        RequestError: no such GPU, or no layer that can run sparse.
    """
    require_device(device)
    names = eligible(model)
    if not names:
        kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        found = f"no linear layer is {PATTERN} along its inputs in float16 or bfloat16 ({', '.join(kinds)} here)"
        refuse("no-sparse", f"running {PATTERN} zeros", found, "prune with pattern=2:4; dtype=torch.bfloat16")
    model.to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype.*")  # torch says so of the whole API
        for name in names:
            module = model.get_submodule(name)
            weight: Tensor = module.weight.detach()  # type: ignore[operator]
            sparse = to_sparse_semi_structured(weight.contiguous())
            module.weight = nn.Parameter(sparse, requires_grad=False)
    return names
