"""OBSPA (arXiv:2403.18955): coupled channels that cost least when all their readers make up for them, with any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from secateur.budgets.channels import Units
from secateur.budgets.targets import Target
from secateur.evidence.batches import batch_size, first, noise
from secateur.evidence.signals import product_moments, reads, total_variances
from secateur.graph.following import Tensors
from secateur.graph.host import Batch
from secateur.graph.ir import Operation
from secateur.graph.readers import destination, norms_behind, readers
from secateur.mends.readers import Mender, Statistics
from secateur.methods.base import Data
from secateur.methods.channels import ChannelStudy, Choose, Mending
from secateur.methods.rescored import Rescored
from secateur.scores.obs import Share, elimination_scores

_NOISY = 64  # inputs of noise that are run at a time
_ON_DATA, _ON_NOISE = 1e-2, 10.0  # ridges; that for noise was chosen on training images (ResNet-20 and 56, CIFAR-10)


class Obspa(Rescored):
    """Delete what costs least by Optimal Brain Surgeon over all readers of a channel, and refit these."""

    name = "obspa"
    title = "Structurally Prune Anything, Optimal Brain SPA"
    paper = "arXiv:2403.18955"

    samples: int = Field(512, ge=1, description="inputs to calibrate on, of the data or else of noise")
    damping: PositiveFloat | None = Field(
        None,
        description="ridge over the mean of the Gram's diagonal, raised if need be; if not given 0.01 with data and 10 "
        "on noise, which is believed less",
    )
    per: Literal["unit", "saving"] = Field(
        "saving", description="whether what a unit costs is compared as it is, or by what it saves of the target"
    )
    refit: Literal["all", "cut"] = Field(
        "all", description="which readers are refitted: all behind a cut, or those that lose inputs"
    )
    norms: Statistics = Field(
        "own",
        description="statistics of batch norms behind a cut, with data: left, as they are now on the data (own), or "
        " so that what a norm gives has the mean and deviation that it had (match); without data they stay",
    )

    mending: Mending = Field("least-squares", description="how what stays makes up for what goes")

    def score(self, study: ChannelStudy) -> dict[str, Tensor]:
        """What a unit costs at all its readers when it goes; a space that nothing reads with a matrix is left alone.

        An error counts as a share of the variance of what it is added to.
        """
        network, batches = study.host.network, self._batches(study)
        users = {space.name: reads(space, readers(network)) for space in study.spaces}
        needed = {reader.step: reader for found in users.values() for reader, _ in found}
        ordered = [needed[step] for step in network.operations if step in needed]
        variances = total_variances(study.host, [destination(network, reader.out) for reader in ordered], batches)
        norms, scores = norms_behind(network), dict[str, Tensor]()
        shares: dict[str, list[Share]] = {name: [] for name in users}
        for reader, products in product_moments(study.host, ordered, batches):
            matrix = reader.matrix(study.tensor(reader.weight).detach()).double()
            if norm := norms.get(reader.out):
                matrix = matrix * reader.by_row(_scale(study, norm))
            worth = 1 / max(variances[destination(network, reader.out)], 1e-30)
            for name, found in users.items():
                for positions in (at for own, at in found if own.step is reader.step):
                    columns = torch.stack([reader.columns(unit) for unit in positions])
                    shares[name] += [
                        Share.of(rows, gram, columns, self._ridge(study), worth)
                        for rows, gram in zip(matrix, products, strict=True)
                    ]
                if found and found[-1][0].step is reader.step:  # no other reader of this space comes
                    scores[name] = elimination_scores(shares.pop(name))
        return scores

    def decide(self, study: ChannelStudy, target: Target, choose: Choose) -> Units:
        if self.per == "unit":
            return super().decide(study, target, choose)

        def by_saving(scores: Mapping[str, Tensor], target: Target, way: float = 1.0) -> Units:
            return choose(
                {name: found / self._saving(study, name, target) for name, found in scores.items()}, target, way
            )

        return super().decide(study, target, by_saving)

    def _saving(self, study: ChannelStudy, name: str, target: Target) -> int:
        """What the first unit of a space saves of the target's measure."""
        costs, gone = study.graph.costs, study.graph.gone
        count = costs.macs if target.measure == "flops" else costs.params
        return max(1, count(gone({})) - count(gone({name: [0]})))

    @property
    def data(self) -> Data:  # type: ignore[override]
        return "none"

    def mend(self, study: ChannelStudy, units: Units) -> Tensors:
        if self.mending != "least-squares":
            return super().mend(study, units)
        real = study.batches is not None
        mender = Mender(
            study.host,
            study.graph,
            study.graph.gone(units),
            self._ridge(study),
            everywhere=self.refit == "all",
            shifts=real,
            norms=self.norms if real else "keep",
        )
        return mender.mend(self._batches(study))

    def _ridge(self, study: ChannelStudy) -> float:
        return self.damping or (_ON_DATA if study.batches is not None else _ON_NOISE)

    def _batches(self, study: ChannelStudy) -> list[Batch]:
        if study.batches is not None:
            return first(study.batches, self.samples)
        for rows in (_NOISY, batch_size(study.example)):
            generator = torch.Generator().manual_seed(study.generator.initial_seed())
            found = first(noise(study.example, -(-self.samples // rows), generator, rows), self.samples)
            try:
                study.host.run(found[0])
                break
            except Exception:  # the network may count on the size of a batch; then it is run on the example's
                continue
        return found


def _scale(study: ChannelStudy, norm: Operation) -> Tensor:
    """What a batch norm multiplies its channels with."""
    deviation = (study.tensor(norm.inputs["var"].name).double() + 1e-5).sqrt()
    return (
        study.tensor(norm.inputs["weight"].name).detach().double() / deviation
        if "weight" in norm.inputs
        else 1 / deviation
    )
