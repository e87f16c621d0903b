"""SynFlow: the flow of ones through the absolute weights; no data, and no layer runs dry (arXiv:2006.05467)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor

from secateur.errors import refuse
from secateur.families import Architecture, canonical_name, place_name
from secateur.families.sizes import Expert
from secateur.methods.base import Study
from secateur.methods.saliency import Saliency
from secateur.plans import Edits
from secateur.spaces.weights import matrices_of

_PAPER_ROUNDS = 100


class SynFlow(Saliency):
    """|w| dR/d|w|, with R what a stream of ones becomes behind all blocks made of absolute weights.

    For a decoder (derived; the paper has convolutions): norms are left out, a token attends to itself, so that values
    and ``out`` carry the flow; ``gate`` and ``up`` run side by side, experts too; queries and keys, which only choose,
    are given as much of it as the values of their block.
    """

    name = "synflow"
    title = "Pruning Neural Networks Without Any Data by Iteratively Conserving Synaptic Flow"
    paper = "arXiv:2006.05467"

    steps: int = Field(
        _PAPER_ROUNDS, ge=1, description="rounds, after each of which the share kept is the same factor smaller"
    )

    def saliencies(self, study: Study, weights: Mapping[str, Tensor], into: Edits) -> None:
        for block, scores in Flow(study.budget.architecture, weights):
            into.write(place_name(block), {name: score.float() for name, score in scores.items()})


class Flow:
    """The linear network of absolute weights."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        self._architecture, self._weights = architecture, weights
        self._block, self._held = -1, dict[str, Tensor]()  # of one block, which is looked at several times
        for matrix in (t for t in architecture.tensors.values() if t.role.startswith("latent")):
            found = f"attention of low rank ({matrix.role})"
            refuse("not-supported", "the synaptic flow of this model", found, "another score, e.g. magnitude")

    def _matrix(self, block: int, role: str, expert: Expert = None) -> Tensor | None:
        if block != self._block:
            self._block, self._held = block, {}
        name = canonical_name(block, role, "weight", expert)
        if name in self._weights and name not in self._held:
            self._held[name] = self._weights[name].double().abs()
        return self._held.get(name)

    def _experts(self, block: int) -> list[Expert]:
        return list(dict.fromkeys(m.expert for m in matrices_of(self._architecture, block, "ffn")))

    def _copied(self, block: int, values: Tensor) -> Tensor:
        """Each value head, once for every query head of its group."""
        sizes = self._architecture.sizes
        heads = values.view(-1, sizes.head)
        return heads.repeat_interleave(sizes.blocks[block].group, 0).flatten()

    def _gathered(self, block: int, copies: Tensor) -> Tensor:
        """The transpose of that."""
        sizes = self._architecture.sizes
        return copies.view(-1, sizes.blocks[block].group, sizes.head).sum(1).flatten()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Every block, from the last to the first, and the scores of its matrices, over what comes out of all."""
        stream, level = torch.ones(self._architecture.sizes.residual, dtype=torch.float64), 0.0
        streams = []
        for block in range(len(self._architecture.sizes.blocks)):
            streams.append((stream, level))
            stream = stream + self._attention(block, stream)[1]
            stream = stream + sum(self._ffn(block, expert, stream)[1] for expert in self._experts(block))
            stream, level = _levelled(stream, level)  # the flow grows beyond all numbers
        end, back, behind = level, torch.ones_like(stream) / float(stream.sum()), 0.0
        for block, (entering, before) in reversed(list(enumerate(streams))):
            scores, earlier = self.backward(block, entering, back)
            share = math.exp(before + behind - end)
            yield block, {name: score * share for name, score in scores.items()}
            back, behind = _levelled(earlier, behind)

    def scores(self) -> dict[str, Tensor]:
        """Of all matrices at once."""
        return {name: score for _, scores in self for name, score in scores.items()}

    def _attention(self, block: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What ``out`` reads and what it gives."""
        values, out = self._matrix(block, "v"), self._matrix(block, "out")
        if values is None or out is None:
            return torch.zeros(0, dtype=torch.float64), torch.zeros_like(stream)
        inner = self._copied(block, values @ stream)
        return inner, out @ inner

    def _ffn(self, block: int, expert: Expert, stream: Tensor) -> tuple[Tensor, Tensor]:
        """What ``down`` reads and what it gives."""
        down = self._matrix(block, "down", expert)
        ups = [matrix for role in ("gate", "up") if (matrix := self._matrix(block, role, expert)) is not None]
        if down is None or not ups:
            return torch.zeros(0, dtype=torch.float64), torch.zeros_like(stream)
        inner = torch.stack([matrix @ stream for matrix in ups]).sum(0)
        return inner, down @ inner

    def backward(self, block: int, stream: Tensor, back: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Scores of the matrices of a block, and dR by what enters it.

        Args:
            stream: what enters the block.
            back: dR by what leaves it.
        """
        scores: dict[str, Tensor] = {}

        def note(role: str, expert: Expert, by_output: Tensor, inputs: Tensor) -> Tensor:
            """Score a matrix and go through it: dR by what it reads."""
            matrix = self._matrix(block, role, expert)
            if matrix is None:
                return torch.zeros_like(inputs)
            scores[canonical_name(block, role, "weight", expert)] = by_output[:, None] * matrix * inputs
            return matrix.t() @ by_output

        inner, given = self._attention(block, stream)
        middle = stream + given
        through = back.clone()
        for expert in self._experts(block):
            hidden, _ = self._ffn(block, expert, middle)
            by_hidden = note("down", expert, back, hidden) if len(hidden) else None
            for role in ("gate", "up"):
                if by_hidden is not None:
                    through += note(role, expert, by_hidden, middle)
        found = through.clone()
        if len(inner):
            by_values = self._gathered(block, note("out", None, through, inner))
            found += note("v", None, by_values, stream)
        for role in ("q", "k"):
            matrix, flow = self._matrix(block, role), scores.get(canonical_name(block, "v", "weight"))
            if matrix is not None and flow is not None:
                own = matrix * stream
                scores[canonical_name(block, role, "weight")] = own * (flow.sum() / own.sum().clamp(min=1e-300))
        return scores, found


def _levelled(values: Tensor, level: float) -> tuple[Tensor, float]:
    """Numbers with a mean of one, and the logarithm of what was taken out."""
    mean = float(values.mean())
    return values / mean, level + math.log(mean)
