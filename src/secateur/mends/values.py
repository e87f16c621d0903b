"""Fewer dimensions per value head: the basis in which dropping the first ones costs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.scores.ridge import ridge_factor

_DAMPING = 1e-8


@dataclass(frozen=True)
class ValueBasis:
    """Components of a value head, those that matter most first.

    Attributes:
        reduce: [h, h], rows: components from the head's dimensions.
        restore: [h, h], columns: dimensions from the components; the inverse of ``reduce``.
        costs: [h + 1], what is lost when so many of the last components go.
    """

    reduce: Tensor
    restore: Tensor
    costs: Tensor


def value_basis(readers: Sequence[Tensor], grams: Sequence[Tensor], metric: Tensor | None = None) -> ValueBasis:
    """The basis of one key/value group, for all its query heads together.

    With G the sum of the heads' Grams, M that of W^T F W and G = R R^T, the eigenvectors U of R^T M R give
    reduce = U^T R^-1 and restore = R U: for one head the optimal factors of its value-output product (MoDeGPT,
    arXiv:2408.09632, alg. 3, in the metric of the loss), for several their joint form.

    Args:
        readers: W of every query head, [out, h].
        grams: mean over tokens of the products of every query head's values, [h, h] float64.
        metric: F, [out, out]; None: every output counts the same.
    """
    total = torch.stack(list(grams)).sum(0)
    wide = [reader.to(total) for reader in readers]
    factor, _ = ridge_factor(total, _DAMPING)
    weighed = torch.stack([reader.t() @ _weighed(reader, metric) for reader in wide]).sum(0)
    _, vectors = torch.linalg.eigh(factor.t() @ weighed @ factor)
    vectors = vectors.flip(1)
    restore = factor @ vectors
    reduce = vectors.t() @ torch.linalg.inv(factor)
    each = torch.zeros(len(total), dtype=torch.float64, device=total.device)
    for reader, gram in zip(wide, grams, strict=True):
        written = reader @ restore
        each += (written * _weighed(written, metric)).sum(0) * (reduce * (reduce @ gram)).sum(1) / 2
    costs = torch.cat([each.new_zeros(1), each.flip(0).cumsum(0)])
    return ValueBasis(reduce, restore, costs)


@dataclass(frozen=True)
class HeadBases:
    """The value bases of all key/value groups of a block.

    Attributes:
        groups: one basis each.
        queries: query heads that share a group.
    """

    groups: Sequence[ValueBasis]
    queries: int

    @property
    def reduce(self) -> Tensor:
        """What turns the inputs of ``out``, [heads * h, heads * h]."""
        return self._diagonal([basis.reduce for basis in self.groups])

    @property
    def restore(self) -> Tensor:
        """Its inverse, which ``out`` is multiplied with."""
        return self._diagonal([basis.restore for basis in self.groups])

    def _diagonal(self, blocks: Sequence[Tensor]) -> Tensor:
        each = [block for block in blocks for _ in range(self.queries)]
        found: Tensor = torch.block_diag(*each)  # type: ignore[no-untyped-call]
        return found

    def narrowed(self, values: Tensor, left: int) -> Tensor:
        """Rows of ``v`` (or its bias) turned, and only the first ``left`` of every head not zero."""
        size = len(self.groups[0].reduce)
        found = torch.zeros_like(values)
        for index, basis in enumerate(self.groups):
            mine = slice(index * size, (index + 1) * size)
            found[mine][:left] = basis.reduce[:left] @ values[mine]
        return found


def head_bases(weight: Tensor, gram: Tensor, groups: int, queries: int, metric: Tensor) -> HeadBases:
    """The value bases of a block.

    Args:
        weight: ``out``, [D, heads * h], heads group by group.
        gram: mean over tokens of the products of its inputs.
        groups, queries: key/value groups, and query heads of each.
        metric: F, [D, D].
    """
    head = len(gram) // (groups * queries)
    found = []
    for group in range(groups):
        first = group * queries
        spans = [slice(query * head, (query + 1) * head) for query in range(first, first + queries)]
        found.append(value_basis([weight[:, s] for s in spans], [gram[s, s] for s in spans], metric.to(gram)))
    return HeadBases(found, queries)


def _weighed(outputs: Tensor, metric: Tensor | None) -> Tensor:
    return outputs if metric is None else metric @ outputs
