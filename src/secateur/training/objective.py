"""What is minimised: cross entropy, and what a teacher adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.scores.ridge import ridge_factor
from secateur.training.options import Training

_RIDGE = 1e-6
"""Of the least squares between streams, as a share of the mean of the Gram's diagonal."""


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens, in nats; logits [rows, T, vocabulary], ids [rows, T]."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher || student) of the next-token distributions at a temperature, times its square.

    The square keeps the gradients' size from falling with the temperature (Hinton et al., arXiv:1503.02531, sec. 2).

    Args:
        student, teacher: logits [rows, T, vocabulary]; the last position, which predicts nothing, is left out.
    """
    ours = functional.log_softmax(student[:, :-1].float().flatten(0, 1) / temperature, -1)
    theirs = functional.log_softmax(teacher[:, :-1].float().flatten(0, 1) / temperature, -1)
    return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def pairs_of(student: int, teacher: int) -> list[tuple[int, int]]:
    """Blocks whose outputs are compared: all of the student's, with those at the same relative depth."""
    return [(block, round((block + 1) * teacher / student) - 1) for block in range(student)]


class Objective(nn.Module):
    """The loss of a batch: (1 - w) cross entropy + w divergence + h distance of hidden states.

    Hidden states are compared after every block, as the squared distance relative to the teacher's squared size. Where
    the widths differ, a linear map from the student's stream to the teacher's is learned along and dropped at the end;
    it starts as the least-squares one.

    Args:
        options: w = ``distill``, h = ``hidden``, ``temperature``.
        teacher: the model to learn from; it is not trained.
    """

    def __init__(self, options: Training, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.options = options
        self._teacher = (teacher,)  # no submodule: its parameters are none of ours
        self.maps = nn.ParameterList()

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    @torch.no_grad()
    def fit_maps(self, student: Any, ids: Tensor) -> None:
        """Make the maps between streams of different widths, by least squares on some windows [rows, T]."""
        if not self.options.hidden:
            return
        ours, theirs = self._hidden(student, ids), self._hidden(self.teacher, ids)
        if ours[0].shape[-1] == theirs[0].shape[-1]:
            return
        for block, other in pairs_of(len(ours), len(theirs)):
            left, right = ours[block].double().flatten(0, 1), theirs[other].double().flatten(0, 1)
            factor, _ = ridge_factor(left.T @ left, _RIDGE)
            self.maps.append(nn.Parameter(torch.cholesky_solve(left.T @ right, factor).float()))

    @staticmethod
    def _hidden(model: Any, ids: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
        return found

    def forward(self, student: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and cross entropy of a batch of windows [rows, T]."""
        options, hidden = self.options, bool(self.options.hidden)
        ours = student(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        entropy = cross_entropy(ours.logits, ids)
        if self.teacher is None:
            return entropy, entropy.detach()
        with torch.no_grad():
            theirs = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        weight = options.distill or 0.0
        loss = (1 - weight) * entropy
        if weight:
            loss = loss + weight * divergence(ours.logits, theirs.logits, options.temperature)
        if hidden:
            loss = loss + options.hidden * self._distance(ours.hidden_states[1:], theirs.hidden_states[1:])
        return loss, entropy.detach()

    def _distance(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        parts = []
        for index, (block, other) in enumerate(pairs_of(len(ours), len(theirs))):
            state, wanted = ours[block].float(), theirs[other].float()
            if len(self.maps):
                state = state @ self.maps[index].to(state.dtype)
            parts.append(functional.mse_loss(state, wanted) / wanted.square().mean().clamp(min=1e-12))
        return torch.stack(parts).mean()
