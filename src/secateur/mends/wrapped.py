"""A sparse core between two block-diagonal wrappers, W ~ A (S o M) B, by steps that never raise the loss (ARMOR).

The loss is the squared error of the outputs, tr((W - A S B) G (W - A S B)^T) over tr(W G W^T), with G the second
moments of the inputs or their diagonal alone. With two of the three factors held, the third is a least-squares problem,
and a group of M weights of S has C(M, N) supports, each with its own optimum: every step below solves one exactly.
Damping holds a step back towards where it starts, so that it stays a descent (ARMOR, arXiv:2510.05528).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from secateur.cuts.factors import block_sides, times_left, times_right
from secateur.cuts.masks import Pattern

_TOLERANCE = 1e-4  # of the loss: rounds that gain less end the descent
_PROGRESS, _PATIENCE = 1e-6, 100  # steps of Adam that gain less than this share, so many on end, end it
_EPS = 1e-5


@dataclass(frozen=True)
class Wrapped:
    """A matrix as A (S o M) B, filled up with zeros to whole blocks.

    Attributes:
        left: A, [row blocks, rows, rows].
        core: S, zero where the mask is, [row blocks * rows, column blocks * columns].
        mask: M, bool, of the same shape.
        right: B, [column blocks, columns, columns].
    """

    left: Tensor
    core: Tensor
    mask: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """A (S o M) B, filled up as its core is."""
        return times_left(self.left, times_right(self.core, self.right))


def all_supports(pattern: Pattern) -> Tensor:
    """All ways of N out of M, bool [C(M, N), M]."""
    found = list(combinations(range(pattern.of), pattern.kept))
    chosen = torch.zeros(len(found), pattern.of, dtype=torch.bool)
    return chosen.scatter_(1, torch.tensor(found), True)


def supports(pattern: Pattern) -> int:
    """How many ways there are of N out of M."""
    return math.comb(pattern.of, pattern.kept)


def normalised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W / (r c): columns of unit norm, then rows (NoWag); r [out] and c [in]."""
    columns = weight.norm(dim=0).clamp(min=_EPS)
    rows = (weight / columns).norm(dim=1).clamp(min=_EPS)
    return weight / columns / rows[:, None], rows, columns


class Descent:
    """Block coordinate descent from a masked matrix, with the best state kept.

    Args:
        weight: W, [out, in], float64 for exactness.
        metric: G, [in, in], or its diagonal [in].
        start: the first core, [out, in].
        mask: which of its entries stay, [out, in], in the pattern.
        pattern: N:M.
        block: side of the wrappers' blocks; sides that it does not divide are filled up with zeros.
        damping: of every step, over the mean of the diagonal of the matrix that it inverts.
    """

    def __init__(
        self,
        weight: Tensor,
        metric: Tensor,
        start: Tensor,
        mask: Tensor,
        pattern: Pattern,
        block: int,
        damping: float = 1e-6,
    ) -> None:
        self.rows, self.columns = block_sides((weight.shape[0], weight.shape[1]), block, pattern)
        fill = (0, -weight.shape[1] % self.columns, 0, -weight.shape[0] % self.rows)
        self.weight = functional.pad(weight, fill)
        self.metric = functional.pad(metric, fill[:2] * metric.ndim)
        self.damping = damping
        self.supports = all_supports(pattern).to(weight.device)
        height, width = self.weight.shape
        eye = {side: torch.eye(side, dtype=weight.dtype, device=weight.device) for side in (self.rows, self.columns)}
        self.state = Wrapped(
            eye[self.rows].repeat(height // self.rows, 1, 1),
            functional.pad(start * mask, fill),
            functional.pad(mask, fill),
            eye[self.columns].repeat(width // self.columns, 1, 1),
        )
        self._whole = float((self._weighed(self.weight) * self.weight).sum().clamp(min=1e-30))

    # -- the loss -----------------------------------------------------------------------------------------------------

    def _weighed(self, matrix: Tensor) -> Tensor:
        """X G."""
        return matrix * self.metric if self.metric.ndim == 1 else matrix @ self.metric

    def loss(self, state: Wrapped | None = None) -> float:
        """Squared error of the outputs over their squares."""
        error = self.weight - (state or self.state).product()
        return float((self._weighed(error) * error).sum()) / self._whole

    def exactly(self, rounds: int) -> Iterator[float]:
        """Every wrapper and every group in turn, until a round gains next to nothing; yields the loss after each."""
        reached = self.loss()
        for _ in range(rounds):
            before = self.state
            for step in (self.fit_left, self.fit_right, self.sweep_core):
                step()
            loss = self.loss()
            if not loss < reached:  # what rounding does to the last digits
                self.state = before
                return
            yield loss
            if loss > (1 - _TOLERANCE) * reached:
                return
            reached = loss

    def gradually(self, steps: int, rate: float, generator: torch.Generator) -> Iterator[float]:
        """Steps of Adam on all three factors, after each of them one group of the core in every pair of blocks.

        That may go up as well: the best state is restored at the end. Ends early where nothing was gained for long.

        Args:
            steps: at most so many.
            rate: of Adam.
            generator: draws the groups, in proportion to the gradient's L1 norm over them.
        """
        best, reached, idle = self.state, self.loss(), 0
        learned = [each.clone().requires_grad_() for each in (best.left, best.core, best.right)]
        optimiser = torch.optim.Adam(learned, lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            left, core, right = learned
            error = self.weight - times_left(left, times_right(core * self.state.mask, right))
            ((self._weighed(error) * error).sum() / self._whole).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            left, core, right = (each.detach() for each in learned)
            self.state = Wrapped(left.clone(), core * self.state.mask, self.state.mask, right.clone())
            self.improve_groups(generator)
            core.copy_(self.state.core)
            loss = self.loss()
            idle = 0 if loss < (1 - _PROGRESS) * reached else idle + 1
            if loss < reached:
                best, reached = self.state, loss
            yield loss
            if idle >= _PATIENCE:
                break
        self.state = best

    # -- one factor at a time -----------------------------------------------------------------------------------------

    def fit_left(self) -> None:
        """The best A for this core and B: least squares, block by block."""
        state = self.state
        inner = times_right(state.core, state.right)
        error = self._weighed(self.weight - times_left(state.left, inner))
        inner, error, weighed = (self._by_rows(each) for each in (inner, error, self._weighed(inner)))
        change = _solved(weighed @ inner.mT, inner @ error.mT, self.damping).mT
        self.state = replace(state, left=state.left + change)

    def fit_right(self) -> None:
        """The best B for this core and A; blocks in turn where the inputs are correlated, each for those before."""
        state = self.state
        outer = times_left(state.left, state.core)
        parts = outer.view(len(outer), -1, self.columns).permute(1, 0, 2)  # [K, out, columns]
        squares = parts.mT @ parts
        error = self.weight - state.product()
        if self.metric.ndim == 1:  # which weights cancel out of
            sides = parts.mT @ error.view(len(error), -1, self.columns).permute(1, 0, 2)
            self.state = replace(state, right=state.right + _solved(squares, sides, self.damping))
            return
        right, weighed = state.right.clone(), self._weighed(error)
        for k, part in enumerate(parts):
            here = slice(k * self.columns, (k + 1) * self.columns)
            change = _solved(squares[k], part.mT @ weighed[:, here], self.damping)
            change = _solved(self.metric[here, here], change.mT, self.damping).mT
            right[k] += change
            weighed -= (part @ change) @ self.metric[here]
        self.state = replace(state, right=right)

    def _by_rows(self, matrix: Tensor) -> Tensor:
        """[out, in] as [J, rows, in]."""
        return matrix.view(-1, self.rows, matrix.shape[1])

    def sweep_core(self) -> None:
        """Every group of the core in turn, in all pairs of blocks that do not touch at once: the best of all supports.

        In terms of P = A^T A and Q = B G B^T a change of S by X changes its gradient F / 2 = P S Q - A^T W G B^T by
        P X Q, so that no product with W is needed again.
        """
        state, size = self.state, self.supports.shape[1]
        squares, inner, slope, core, mask = self._quadratic()
        choices = self._choices(inner)
        for row in range(self.rows):
            own = squares[:, row, row].clamp(min=0)[:, None]
            line, change = slope[:, :, row].clone(), torch.zeros_like(slope[:, :, row])
            for group in range(inner.shape[-1] // size):
                here = slice(group * size, (group + 1) * size)
                old, kept = core[:, :, row, here].clone(), mask[:, :, row, here]
                new, stays = self._best(old, kept, line[:, :, here], own, inner[:, here, here], choices[:, group])
                core[:, :, row, here], mask[:, :, row, here] = new, stays
                moved = ((new - old)[:, :, None] @ inner[:, here])[:, :, 0]
                line += own[..., None] * moved
                change += moved
            slope += squares[:, :, row][:, None, :, None] * change[:, :, None, :]
        self.state = replace(state, core=self._joined(core), mask=self._joined(mask))

    def improve_groups(self, generator: torch.Generator) -> None:
        """One group in every pair of blocks that do not touch, drawn by how much the loss depends on it."""
        squares, inner, slope, core, mask = self._quadratic()
        choices, size = self._choices(inner), self.supports.shape[1]
        groups = inner.shape[-1] // size
        split = [each.reshape(*core.shape[:2], -1, size) for each in (core, mask, slope)]  # [J, K, rows * groups, M]
        strength = split[2].abs().sum(-1).clamp(min=1e-30).flatten(0, 1)
        drawn = torch.multinomial(strength.cpu(), 1, generator=generator).to(core.device).view(core.shape[:2])
        row, group = drawn // groups, drawn % groups
        where = drawn[..., None, None].expand(-1, -1, 1, size)
        old, kept, here = (each.gather(2, where)[:, :, 0] for each in split)
        column = torch.arange(core.shape[1], device=core.device)[None]
        own = squares.diagonal(dim1=-2, dim2=-1).gather(1, row)
        diagonal = self._groups(inner)[column, group]
        new, stays = self._best(old, kept, here, own, diagonal, choices[column, group])
        changed = [split[0].scatter(2, where, new[:, :, None]), split[1].scatter(2, where, stays[:, :, None])]
        core, mask = (self._joined(each.view(core.shape)) for each in changed)
        self.state = replace(self.state, core=core, mask=mask)

    def _quadratic(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """P [J, rows, rows], Q [K, width, width], and in blocks [J, K, rows, width] half the gradient, core and mask.

        With correlated inputs all column blocks are one.
        """
        state = self.state
        squares = state.left.mT @ state.left
        if self.metric.ndim == 1:
            inner = (state.right * self.metric.view(-1, 1, self.columns)) @ state.right.mT
        else:
            inner = times_right(times_right(self.metric, state.right.mT).mT, state.right.mT)[None]
        error = self._weighed(state.product() - self.weight)
        slope = times_left(state.left.mT, times_right(error, state.right.mT))
        width = inner.shape[-1]
        parts = (each.view(len(squares), self.rows, -1, width) for each in (slope, state.core, state.mask))
        slope, core, mask = (each.transpose(1, 2).clone() for each in parts)
        return squares, inner, slope, core, mask

    def _joined(self, parts: Tensor) -> Tensor:
        """[J, K, rows, width] as [out, in]."""
        return parts.transpose(1, 2).reshape(self.weight.shape)

    def _choices(self, inner: Tensor) -> Tensor:
        """For every group and support T, (Q_TT + damping)^-1 with zeros around it: [K, groups, supports, M, M]."""
        size, groups = self.supports.shape[1], self._groups(inner)[:, :, None]
        mean = groups.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]
        both = self.supports[:, :, None] & self.supports[:, None, :]
        outside = torch.diag_embed((~self.supports).to(inner))
        ridge = self.damping * mean * torch.eye(size, dtype=inner.dtype, device=inner.device)
        inverse: Tensor = torch.linalg.inv((groups + ridge) * both / mean + outside)
        return inverse * both / mean

    def _groups(self, inner: Tensor) -> Tensor:
        """What lies on the diagonal of Q, group by group: [K, groups, M, M]."""
        size = self.supports.shape[1]
        split = inner.view(len(inner), -1, size, inner.shape[-1] // size, size)
        return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def _best(
        self, old: Tensor, kept: Tensor, slope: Tensor, own: Tensor, diagonal: Tensor, choices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best values and supports of one group in every pair of blocks.

        Args:
            old, kept: values and supports as they are, [J, K, M].
            slope: half the gradient there.
            own: P_ii of the row, [J, K] or [J, 1].
            diagonal: Q of the group, [K, M, M] or [J, K, M, M].
            choices: of ``_choices``, [K, supports, M, M] or [J, K, supports, M, M].
        """
        own = own[..., None, None]
        wanted = own * (old[:, :, None] @ diagonal) - slope[:, :, None]  # [J, K, 1, M]

        def gain(values: Tensor) -> Tensor:
            return (values * (2 * wanted - own * (values @ diagonal))).sum(-1)

        found = (choices @ wanted[..., None])[..., 0] / own.clamp(min=1e-30)
        gains, index = gain(found).max(2)
        better = ((gains > gain(old[:, :, None])[:, :, 0]) & (own[..., 0, 0] > 0))[..., None]
        best = found.gather(2, index[..., None, None].expand(-1, -1, 1, found.shape[-1]))[:, :, 0]
        return torch.where(better, best, old), torch.where(better, self.supports[index], kept)


def _solved(squares: Tensor, sides: Tensor, damping: float) -> Tensor:
    """(G + damping mean(diag G))^-1 Y of symmetric [..., n, n]."""
    mean = squares.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    ridge = (damping * mean)[..., None, None] * torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device)
    found: Tensor = torch.linalg.solve(squares + ridge, sides)
    return found
