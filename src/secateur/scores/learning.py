"""How PruneNet's policy learns (arXiv:2501.15296): REINFORCE, rewarded by spectra that stay as they were.

The state is the first FFN weight W [width, d] of a layer; no data is read. ``mode="paper"`` is the published algorithm
in its collapsed form. ``mode="advantage"`` keeps the reward, the Kolmogorov-Smirnov distance of the singular values
before and after, and repairs the learning: exact probabilities of the drawn sets, a baseline, a scorer that can
express what the reward measures. Every draw comes from the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from secateur.scores.policy import Policy, PolicyOptions, draw_paper, draw_sets, features, noisy, sketched, uniform
from secateur.scores.spectrum import Spectrum, ks_distance

Loader = Callable[[], Tensor]
Callback = Callable[[int, int, float, float], None]
_DAMPING = 0.1  # of the mean feature variance, added to the Fisher matrix
_SMALL = 512  # columns up to which one thread computes eigenvalues
_PERFECT = 99999.0  # the published reward of a distance of exactly 0


class _Layers:
    """Loads W of a layer on demand; keeps its reference spectrum and features, and within a budget the matrix read."""

    def __init__(self, loaders: Sequence[Loader], options: PolicyOptions, generator: Generator) -> None:
        self.loaders, self.options, self.room = loaders, options, options.cache_bytes
        self.spectra: dict[int, Spectrum] = {}
        self.reference: dict[int, Tensor] = {}
        self.features: dict[int, Tensor] = {}
        self.state: dict[str, Tensor] = {}  # what the policy needs besides what it learns
        first = loaders[0]()
        self.dimensions = first.shape[1]
        if options.mode != "paper" and options.sketch is not None and first.shape[1] > options.sketch:
            gauss = torch.randn(first.shape[1], options.sketch, generator=generator, device=generator.device)
            self.state["basis"] = torch.linalg.qr(gauss).Q.to(first.device)
            self.dimensions = options.sketch

    def __len__(self) -> int:
        return len(self.loaders)

    def __getitem__(self, index: int) -> Spectrum:
        if index in self.spectra:
            return self.spectra[index]
        spectrum = Spectrum(sketched(self.loaders[index](), self.state))
        if index not in self.reference:
            self.reference[index] = self._scaled(spectrum.values())
            if self.options.mode != "paper":
                self.features[index] = features(spectrum, self.options)
        if (size := 8 * (spectrum.weight.numel() + spectrum.gram.numel())) <= self.room:
            self.room -= size
            self.spectra[index] = spectrum
        return spectrum

    def distance(self, index: int, spectrum: Spectrum, kept: Tensor) -> float:
        return float(ks_distance(self.reference[index], self._scaled(spectrum.values(kept))))

    def _scaled(self, values: Tensor) -> Tensor:
        return values / values.mean().clamp(min=1e-300) if self.options.scale_free else values


def kept_count(width: int, keep_fraction: float) -> int:
    """int((1 - c) I) of section 1, safe against float noise, at least one row."""
    return max(1, min(width, math.floor(width * keep_fraction + 1e-9)))


def train(
    layers: Sequence[Loader],
    keep_fraction: float,
    options: PolicyOptions,
    generator: Generator,
    callback: Callback | None = None,
) -> Policy:
    """Learn one policy on all ``layers``; each loader returns W [width, d]. Usable later at any kept fraction.

    ``callback(episode, episodes, mean reward, mean KS)`` is called after each episode.
    """
    learn = _train_paper if options.mode == "paper" else _train_advantage
    prepared = _Layers(layers, options, generator)
    with _few_threads(prepared.dimensions):
        return learn(prepared, keep_fraction, generator, callback or (lambda *_: None))


@contextmanager
def _few_threads(dimensions: int) -> Iterator[None]:
    """One thread for small eigenvalue problems: more only wait for each other, endlessly so on a busy machine."""
    threads = torch.get_num_threads()
    if dimensions <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_paper(layers: _Layers, keep: float, generator: Generator, callback: Callback) -> Policy:
    """The published loop: fresh noise, reward 1/KS, discount gamma**l, the policy of the episode with the best sum."""
    options, first = layers.options, layers.loaders[0]()
    (width, d), device = first.shape, first.device
    p = ((uniform((width, d), generator, device) * 2 - 1) / d**0.5).requires_grad_()
    b = ((uniform((width,), generator, device) * 2 - 1) / d**0.5).requires_grad_()
    r = uniform((width,), generator, device).requires_grad_()
    optimizer = torch.optim.AdamW([p, b, r], lr=options.rate or 1e-3)
    best, best_total = {"u": (p.T @ r).detach(), "t": (b @ r).detach()}, -math.inf
    for episode in range(options.episodes):
        ks: list[float] = []
        chosen: list[Tensor] = []
        for index in range(len(layers)):  # all actions come from the policy before the episode's updates
            spectrum = layers[index]
            log_o = noisy(spectrum.weight.float() @ (p.T @ r) + b @ r, generator).detach()
            chosen.append(draw_paper(log_o, kept_count(spectrum.width, keep), generator))
            ks.append(layers.distance(index, spectrum, chosen[-1]))
        rewards = [1 / x if x > 0 else _PERFECT for x in ks]
        for index, kept in enumerate(chosen):
            log_o = noisy(layers[index].weight.float() @ (p.T @ r) + b @ r, generator)
            loss = -((options.gamma or 0.99) ** index) * rewards[index] * log_o[kept].sum()
            loss.backward()  # type: ignore[no-untyped-call]
            if options.step == "episode" and index < len(chosen) - 1:
                continue
            if options.step == "episode":
                torch.nn.utils.clip_grad_norm_([p, b, r], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if sum(rewards) > best_total:
            best, best_total = {"u": (p.T @ r).detach(), "t": (b @ r).detach()}, sum(rewards)
        callback(episode, options.episodes, sum(rewards) / len(rewards), sum(ks) / len(ks))
    return Policy(options, best)


def _train_advantage(layers: _Layers, keep: float, generator: Generator, callback: Callback) -> Policy:
    """REINFORCE by natural gradient: several sets per layer, standardised log of the published reward as advantage.

    log p(S) = theta . sum of B over S + const, so the gradient by row is the mean of advantage times indicator.
    """
    options = layers.options
    theta = torch.zeros(options.bands + (options.mode == "norm-prior"), device=layers.loaders[0]().device)
    if options.mode == "norm-prior":
        theta[-1] = 3.0
    for episode in range(options.episodes):
        seen: list[Tensor] = []
        for index in range(len(layers)):
            spectrum = layers[index]
            inputs, count = layers.features[index], kept_count(spectrum.width, keep)
            sets = draw_sets(inputs @ theta, count, options.samples, generator)
            seen.append(torch.tensor([layers.distance(index, spectrum, kept.nonzero().flatten()) for kept in sets]))
            gradient = advantages(seen[-1], 1 / spectrum.d).to(theta) @ sets.to(theta) / len(sets)
            left = 1 - (episode + index / len(layers)) / options.episodes
            rate = (options.rate or 0.2) * (options.gamma or 1) ** index * left
            theta = theta + rate * natural(inputs, gradient, count)
        ks = torch.cat(seen)
        callback(episode, options.episodes, float((1 / ks.clamp(min=1 / _PERFECT)).mean()), float(ks.mean()))
    return Policy(options, {"theta": theta, **layers.state})


def advantages(ks: Tensor, quantum: float) -> Tensor:
    """Centred log rewards -log KS of sets drawn for one layer, [samples], in units of their deviation.

    KS comes in steps of ``quantum``: a spread below one step is no evidence and is not blown up.
    """
    gain = -ks.double().clamp(min=quantum / 2).log()
    spread = gain.std(correction=0).clamp(min=quantum / float(ks.mean().clamp(min=quantum)))
    return ((gain - gain.mean()) / spread).float()


def natural(inputs: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Natural gradient for theta [bands] from the gradient by row [width], in the metric of the uniform policy."""
    width = len(inputs)
    metric = inputs.T @ inputs / width
    metric.diagonal().add_(_DAMPING)
    step: Tensor = torch.linalg.solve(metric, gradient @ inputs)
    return step / math.sqrt(max(count * (width - count) / width, 1.0))
