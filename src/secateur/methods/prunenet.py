"""PruneNet: a policy learned from the weights alone keeps FFN neurons (Sengupta et al., ICLR 2025, arXiv:2501.15296).

A scorer reads the rows of each block's first FFN matrix and is rewarded when the singular values of the rows it keeps
are distributed like those of the whole matrix. It is trained once and serves every ratio.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from secateur.budgets import Budget
from secateur.errors import refuse
from secateur.methods.base import Method, Study
from secateur.plans import Artifact, Chart, Plan, points_of
from secateur.scores.learning import train
from secateur.scores.policy import Policy, PolicyOptions, sketched
from secateur.scores.spectrum import Spectrum, ks_distance
from secateur.spaces import Space, all_spaces

POLICY = "prunenet-policy"
_STATE = ("gate", "up")  # the first FFN matrix is the first of these: gate_proj where the FFN is gated, else fc1


class PruneNet(Method, PolicyOptions):
    """Learn which rows matter, keep the same number in every block."""

    name = "prunenet"
    title = "You Only Prune Once: Calibration-Free Model Compression With Policy Learning"
    paper = "arXiv:2501.15296"

    policy: str | None = Field(
        None, description=f"{POLICY}.safetensors of an earlier run: reuse it instead of training"
    )

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """It learns by drawing rows; what was learned before may draw them too."""
        return self.policy is None or self.select != "topk"

    def files(self) -> dict[str, str]:
        return {} if self.policy is None else {POLICY: self.policy}

    def foresees(self, budget: Budget) -> bool:
        return True

    def decide(self, study: Study) -> Plan:
        """Train the policy on all matrices (or take a trained one), then keep the rows it selects."""
        after, spaces = self.sizes(study.budget), study.spaces("ffn")
        counts = [space.size for space in all_spaces(after, "ffn")]
        loaders = [partial(_matrix, study, space) for space in spaces]
        notes: dict[str, float] = {}
        learned: list[tuple[float, float]] = []

        def told(episode: int, episodes: int, reward: float, distance: float) -> None:
            notes.update(mean_reward=round(reward, 6), mean_ks=round(distance, 6))
            learned.append((reward, distance))
            study.progress(episode + 1, episodes, "learn")

        if POLICY in study.artifacts:
            policy = self._trained(study.artifacts[POLICY])
        else:
            policy = train(loaders, counts[0] / spaces[0].size, self, study.generator, told)
        kept: dict[str, Tensor] = {}
        distances = []
        for space, load, count in zip(spaces, loaders, counts, strict=True):
            matrix = load()
            kept[space.name] = policy.select(matrix, count, study.generator)
            spectrum = Spectrum(sketched(matrix, policy.tensors))  # what the policy sees of it
            distances.append(ks_distance(spectrum.values(), spectrum.values(kept[space.name])))
        return Plan(
            study.budget.sizes,
            after,
            kept,
            notes=notes,
            artifacts={POLICY: Artifact(policy.tensors, policy.settings)},
            charts=_charts(learned, torch.stack(distances)),
        )

    def _trained(self, artifact: Artifact) -> Policy:
        """A policy of an earlier run, with this run's way of selecting."""
        try:
            options = PolicyOptions.model_validate({**artifact.settings, "select": self.select})
        except ValueError as error:
            refuse("bad-artifact", f"policy {self.policy!r}", f"its settings are not a policy's ({error})")
        return Policy(options, artifact.tensors)


def _matrix(study: Study, space: Space) -> Tensor:
    """First FFN matrix of a space, [neurons, width]."""
    found = (study.view(space.place, (role,)).matrix(role, space.expert) for role in _STATE)
    return next(matrix for matrix in found if matrix is not None)


def _charts(learned: list[tuple[float, float]], distances: Tensor) -> tuple[Chart, ...]:
    """Mean reward and mean distance of every episode, and the distance of each space's kept rows."""
    final = Chart(
        "Spectral distance of the kept rows",
        "FFN, in the order of the blocks",
        "Kolmogorov-Smirnov distance",
        {"distance": points_of(distances)},
        kind="bars",
    )
    if not learned:
        return (final,)
    rewards, means = torch.tensor(learned, dtype=torch.float64).unbind(1)
    return (
        Chart("Learning: distance", "episode", "mean distance of the drawn rows", {"distance": points_of(means, 1)}),
        Chart("Learning: reward", "episode", "mean reward", {"reward": points_of(rewards, 1)}),
        final,
    )
