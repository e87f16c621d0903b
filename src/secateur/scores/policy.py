"""PruneNet's policy (arXiv:2501.15296): logits for the rows of a weight matrix, exact draws of row sets from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.nn import functional

from secateur.scores.spectrum import Spectrum, standardise


class PolicyOptions(BaseModel):
    """Settings of the policy and of its training; ``None`` means "the default of the mode"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["advantage", "paper", "norm-prior"] = Field("advantage", description="how the policy learns")
    select: Literal["sample", "topk"] | None = Field(None, description="paper: sample; else topk")
    episodes: int = Field(20, ge=0, description="passes over all layers")
    samples: int = Field(8, ge=2, description="row sets drawn per layer and episode (paper: always 1)")
    rate: float | None = Field(None, gt=0, description="paper: 1e-3 (AdamW); else 0.2, decays linearly to 0")
    gamma: float | None = Field(None, gt=0, le=1, description="weight gamma**l of layer l; paper: 0.99; else 1")
    step: Literal["layer", "episode"] = Field(
        "layer", description="paper: as the script, or as the package (clips at 1)"
    )
    bands: int = Field(32, ge=2, description="groups of singular directions whose energies describe a row")
    sketch: int | None = Field(
        256, ge=8, description="if d is larger, read W Q, Q [d, sketch] orthonormal; paper: never"
    )
    scale_free: bool = Field(False, description="divide each spectrum by its mean before comparing")
    cache_bytes: int = Field(2**29, ge=0, description="matrices read stay in memory up to this size")


class Policy:
    """Logits for the rows of any matrix with ``d`` columns. ``tensors`` and ``settings`` are the whole state.

    paper: ``u`` [d] and ``t`` [], the collapse of the two published linear maps, z = W u + t.
    advantage: ``theta`` [bands], z = B theta with B the standardised band energies of the rows; it serves any d.
    With a sketch also ``basis`` Q [d, sketch]: the policy then sees W Q only, and serves any matrix with the same d.
    norm-prior: one more column of B, the standardised log row norm, whose weight starts at 3.
    """

    def __init__(self, options: PolicyOptions, tensors: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(tensors)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values for JSON; ``Policy(PolicyOptions(**settings), tensors)`` is the same policy."""
        return self.options.model_dump(include=set(PolicyOptions.model_fields))

    def logits(self, weight: Tensor) -> Tensor:
        """Importance logits z of the rows of ``weight`` [width, d] -> [width], float32."""
        if self.options.mode == "paper":
            return weight.detach().float() @ self.tensors["u"] + self.tensors["t"]
        return features(Spectrum(sketched(weight, self.tensors)), self.options) @ self.tensors["theta"]

    def select(self, weight: Tensor, count: int, generator: Generator | None = None) -> Tensor:
        """Exactly ``count`` row indices of ``weight`` [width, d], ascending. ``topk`` needs no generator."""
        logits = self.logits(weight)
        if (self.options.select or ("sample" if self.options.mode == "paper" else "topk")) == "topk":
            return logits.argsort(descending=True, stable=True)[:count].sort().values
        if generator is None:
            raise ValueError("select='sample' draws rows: pass a torch.Generator")
        if self.options.mode == "paper":
            return draw_paper(noisy(logits, generator), count, generator)
        return draw_sets(logits, count, 1, generator)[0].nonzero().flatten()


def sketched(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """W Q with the policy's ``basis`` Q [d, sketch], or W [width, d] itself when it has none."""
    return weight.detach().float() @ tensors["basis"] if "basis" in tensors else weight


def features(spectrum: Spectrum, options: PolicyOptions) -> Tensor:
    """Inputs of the scorer for the rows of one matrix, [width, bands] (norm-prior: one more), float32."""
    bands = spectrum.bands(options.bands)
    if options.mode != "norm-prior":
        return bands
    norm = spectrum.weight.norm(dim=1).clamp(min=1e-30).log()
    return torch.cat([bands, standardise(norm).float()[:, None]], 1)


def uniform(shape: Sequence[int], generator: Generator, device: torch.device) -> Tensor:
    """U(0,1) without its ends, float32, drawn where the generator lives."""
    draw = torch.rand(*shape, generator=generator, device=generator.device)
    return draw.clamp(2**-25, 1 - 2**-24).to(device)


def noisy(logits: Tensor, generator: Generator) -> Tensor:
    """Log of the binary-concrete importance o = sigmoid(z + logit(eps)), eps ~ U(0,1) fresh at each call."""
    return functional.logsigmoid(logits + uniform(logits.shape, generator, logits.device).logit())


def draw_paper(log_weights: Tensor, count: int, generator: Generator) -> Tensor:
    """Weighted sampling of ``count`` rows without replacement (Gumbel top-k), ascending indices."""
    gumbel = -(-uniform(log_weights.shape, generator, log_weights.device).log()).log()
    return (log_weights + gumbel).topk(count).indices.sort().values


def draw_sets(logits: Tensor, count: int, samples: int, generator: Generator) -> Tensor:
    """``samples`` sets of exactly ``count`` rows with p(S) proportional to exp(sum of z over S); bool [samples, width].

    Independent coins whose expected sum is ``count``, redrawn until the sum is ``count``: exactly that distribution,
    and the gradient of log p(S) is the indicator of S minus a constant that a centred advantage cancels.
    """
    width = len(logits)
    if not logits.isfinite().all():
        raise ValueError("logits must be finite")
    if count in (0, width):
        return torch.full((samples, width), count == width, device=logits.device)
    chance = inclusion(logits, count)
    found: list[Tensor] = []
    while len(found) < samples:
        coins = uniform((32, width), generator, logits.device) < chance
        found.extend(coins[coins.sum(1) == count])
    return torch.stack(found[:samples])


def inclusion(logits: Tensor, count: int) -> Tensor:
    """sigmoid(z + c) with the c that makes the sum ``count``; [width], float32."""
    z = logits.double()
    low, high = -z.max() - 50, -z.min() + 50
    for _ in range(80):
        shift = (low + high) / 2
        more = torch.sigmoid(z + shift).sum() < count
        low, high = torch.where(more, shift, low), torch.where(more, high, shift)
    return torch.sigmoid(z + shift).float()
