"""How alike two representations of the same inputs are."""

from __future__ import annotations

from torch import Tensor


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centred kernel alignment with linear kernels (arXiv:1905.00414); 1 where they differ by a rotation and a scale.

    Args:
        first, second: [samples, ...], each flattened behind its first axis; in a batch of one sample the second axis
            counts as the samples.

    Returns:
        Between 0 and 1; 0 where one of them is constant.
    """
    a, b = (x.double().flatten(1) if len(x) > 1 else x[0].double().reshape(len(x[0]), -1) for x in (first, second))
    a, b = a - a.mean(0), b - b.mean(0)
    if a.shape[1] > len(a):  # the same from the smaller side
        ka, kb = a @ a.T, b @ b.T
        cross, left, right = (ka * kb).sum(), ka.square().sum().sqrt(), kb.square().sum().sqrt()
    else:
        cross, left, right = (a.T @ b).square().sum(), (a.T @ a).norm(), (b.T @ b).norm()
    scale = float(left * right)
    return float(cross) / scale if scale > 0 else 0.0
