"""Watch a small random model compute: what every module reads and writes, and what its norms do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor, nn

from secateur.families.packing import Shape
from secateur.families.stock import skeleton_model, stock_config
from secateur.inference.precise import Precise
from secateur.inference.specimen import VOCABULARY, Raw, seeded

ROWS: Final = (3, 14)
"""Token ids of every run: few enough to be quick, enough that every expert of a few is visited."""


def token_ids() -> Tensor:
    """Random token ids, none of them a special one."""
    return torch.randint(3, VOCABULARY, ROWS, generator=seeded(11))


def random_weights(shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Tensor]:
    """Random parameters in float64, in which no bias is zero and no norm's weight one."""
    generator, found = seeded(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) < 2:
            found[name] = 0.3 * noise + float(name.endswith("weight"))
        else:
            found[name] = noise / shape[-1] ** 0.5
    return found


def fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a model its parameters."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()


@dataclass(frozen=True)
class Seen:
    """First tensor that a module read in the first forward pass, and the first that it gave back."""

    read: Tensor
    wrote: Tensor


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor among arguments, or in an output."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        named = values.get("hidden_states")
        return named if isinstance(named, Tensor) else first_tensor(list(values.values()))
    if isinstance(values, tuple | list):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever shape."""
    return first.numel() == second.numel() and torch.equal(first.flatten(), second.flatten())


class Anatomy:
    """A small random model and what its modules did in one forward pass.

    Args:
        raw: its configuration.
        blocks: name of the list of blocks.

    Attributes:
        seen: by name, of every module that was called with a tensor.
        logits: [batch, length, words].
        chained: whether every block reads what the block before it wrote.
    """

    def __init__(self, raw: Raw, blocks: str) -> None:
        self.raw, self.blocks = raw, blocks
        self.model = skeleton_model(stock_config(raw), torch.float64)
        self.shapes = {n: tuple(p.shape) for n, p in self.model.named_parameters(remove_duplicate=False)}
        self.weights = random_weights(self.shapes)
        fill(self.model, self.weights)
        self.seen: dict[str, Seen] = {}
        handles = [
            m.register_forward_hook(self._watch(n), with_kwargs=True) for n, m in self.model.named_modules() if n
        ]
        try:
            self.logits = self.run()
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read = first_tensor(args)
            read = first_tensor(kwargs) if read is None else read
            wrote = first_tensor(output)
            if read is not None and wrote is not None and name not in self.seen:
                self.seen[name] = Seen(read.clone(), wrote.clone())

        return hook

    @torch.no_grad()
    def run(self, ids: Tensor | None = None) -> Tensor:
        """Logits of a whole forward pass."""
        with Precise():
            found: Tensor = self.model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits
        return found

    @property
    def depth(self) -> int:
        return len(self.model.get_submodule(self.blocks))

    @property
    def chained(self) -> bool:
        names = [f"{self.blocks}.{i}" for i in range(self.depth)]
        if any(name not in self.seen for name in names):
            return False
        pairs = pairwise(names)
        return all(same(self.seen[one].wrote, self.seen[two].read) for one, two in pairs)

    @property
    def causal(self) -> bool:
        """Whether no token sees those after it."""
        ids = token_ids()
        ids[:, -1] = (ids[:, -1] + 1) % VOCABULARY
        return bool(torch.allclose(self.run(ids)[:, :-1], self.logits[:, :-1], rtol=0, atol=1e-9))

    @torch.no_grad()
    def gain(self, name: str) -> tuple[str, float] | None:
        """Kind of a norm (``rms``, ``layer``) and what it adds to its weight; None where it is neither.

        A norm is odd but for its bias, so (f(x) - f(-x)) / 2 over the normalised x is what it multiplies with.
        """
        module = self.model.get_submodule(name)
        x = 8 * torch.randn(6, *self.seen[name].read.shape[1:], generator=seeded(5), dtype=torch.float64)
        with Precise():
            odd = (module(x) - module(-x)) / 2
        weight = getattr(module, "weight", None)
        for kind, centred in (("rms", x), ("layer", x - x.mean(-1, keepdim=True))):
            gains = odd * centred.square().mean(-1, keepdim=True).sqrt() / centred
            typical = gains.flatten(0, -2).median(0).values
            if (gains - typical).abs().median() > 1e-4:
                continue
            offset = typical if weight is None else typical - weight.expand_as(typical)
            added = float(offset.mean())
            if (offset - added).abs().max() < 1e-3 and min(abs(added), abs(added - 1)) < 1e-3:
                return kind, float(round(added))
        return None

    def norms(self) -> Iterator[str]:
        """Names of modules that may be norms: leaves that keep the shape of what they read."""
        for name, seen in self.seen.items():
            module = self.model.get_submodule(name)
            weight = getattr(module, "weight", None)
            flat = weight is None or weight.ndim == 1 or "norm" in type(module).__name__.lower()
            named = "norm" in type(module).__name__.lower()
            if not any(True for _ in module.children()) and flat and named and seen.read.shape == seen.wrote.shape:
                yield name

    @torch.no_grad()
    def transposed(self, name: str) -> bool:
        """Whether a module's matrix is stored [in, out]."""
        weight, seen = self.model.get_submodule(name).weight, self.seen.get(name)
        if seen is None or not isinstance(weight, Tensor):
            return False
        read, wrote = seen.read.shape[-1], seen.wrote.shape[-1]
        if tuple(weight.shape) != (read, wrote):
            return False
        bias = getattr(self.model.get_submodule(name), "bias", None)
        found = seen.wrote - (0 if bias is None else bias)
        return bool(torch.allclose(found, seen.read @ weight, atol=1e-6))
