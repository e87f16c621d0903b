"""Charts that more than one method may want in the report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.families import CanonicalTensor
from secateur.plans import Chart, points_of
from secateur.scores.distribution import histogram, quantiles, relative

_MOST_SPACES, _FEW_UNITS = 256, 96  # drawn one by one
_FATES = {"removed": False, "kept": True}


def score_charts(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> tuple[Chart, ...]:
    """Scores of kept and removed units over all spaces, and their spread in each space; none if a score is infinite.

    Args:
        scores: one number per unit, by space.
        kept: kept units, by space.
    """
    if not all(bool(torch.isfinite(values).all()) for values in scores.values()):
        return ()
    shares = {name: relative(values) for name, values in scores.items()}
    masks = [torch.zeros(len(values), dtype=torch.bool) for values in shares.values()]
    for mask, name in zip(masks, shares, strict=True):
        mask[kept[name]] = True
    every, mask = torch.cat(list(shares.values())), torch.cat(masks)
    if len(every) <= _FEW_UNITS:
        bars = {
            name: [every[i] if mask[i] == stays else 0 for i in range(len(every))] for name, stays in _FATES.items()
        }
        series = {name: points_of(torch.tensor(values)) for name, values in bars.items()}
        return (Chart("Scores of the units", "unit", "score / mean", series, kind="bars"),)
    middles, stay, go = histogram(every, mask)
    x = [float(f"{float(middle):.4g}") for middle in middles]
    counts = {"removed": go, "kept": stay}
    bins = {name: [(at, float(n)) for at, n in zip(x, found, strict=True)] for name, found in counts.items()}
    charts = [Chart("Scores of the units", "score / mean of its space", "units", bins, kind="bars")]
    if 1 < len(scores) <= _MOST_SPACES:
        spread = quantiles(list(scores.values()))
        lines = {name: points_of(spread[:, i]) for i, name in enumerate(("lowest tenth", "median", "highest tenth"))}
        above = bool((spread > 0).all())
        charts.append(Chart("Scores by space", "space, in the order of the blocks", "score", lines, logarithmic=above))
    return tuple(charts)


def density_chart(shares: Mapping[CanonicalTensor, float]) -> Chart:
    """Share of the weights that every matrix keeps, block by block; of experts the mean."""
    by_role: dict[str, dict[int, list[float]]] = {}
    for matrix, share in shares.items():
        assert matrix.block is not None
        by_role.setdefault(matrix.role, {}).setdefault(matrix.block, []).append(share)
    series = {
        role: [(float(block), round(sum(found) / len(found), 6)) for block, found in sorted(blocks.items())]
        for role, blocks in by_role.items()
    }
    return Chart("Weights kept", "block", "share", series)


def spectrum_charts(gram: Tensor, kept: int) -> tuple[Chart, ...]:
    """Eigenvalues of a Gram matrix [width, width], largest first, and the share of the first n of them."""
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    share = values / values.sum().clamp(min=1e-300)
    mark = (float(kept), f"{kept} kept")
    sums = torch.cat([torch.zeros(1, dtype=share.dtype), share.cumsum(0)])
    return (
        Chart(
            "Spectrum of the residual stream",
            "principal direction",
            "share of the energy",
            {"eigenvalue": points_of(share, 1)},
            logarithmic=True,
            mark=mark,
        ),
        Chart("Cumulative energy", "principal directions", "share of the energy", {"sum": points_of(sums)}, mark=mark),
    )
