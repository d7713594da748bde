"""Diagnostics through ArviZ, old (0.x) and new (1.x)."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def pareto_khat(tail: Tensor, num_samples: int) -> Tensor:
    r"""Pareto k of importance weights, given their largest ones.

    Smoothing looks only at the M = min(K/5, 3√K) largest of the K weights and at the next one,
    their threshold; the others are filled in at that threshold, so memory does not grow with K.

    Args:
        tail: the largest log-weights of each datum, (M + 1, N).
        num_samples: number K of weights that they are the largest of.

    Returns:
        Pareto k of each datum, (N,): 0 where the weights are equal, so that there is no tail; NaN
        where no tail can be fitted, because K < 25, a log-weight is not finite, or fewer than five
        weights exceed the threshold (as with few distinct codes); look at the ESS then.

    Reference:
        Vehtari et al., Pareto smoothed importance sampling, 2024.

    Example:
        >>> pareto_khat(torch.randn(100, 2), num_samples=100).shape
        torch.Size([2])
    """
    if num_samples < 25:
        return tail.new_full((tail.shape[1],), torch.nan)
    kept = tail.detach().double().cpu().numpy().T  # (N, M + 1)
    khat = np.empty(len(kept))
    for n, largest in enumerate(kept):
        if np.isfinite(largest).all() and np.ptp(largest) < 1e-10:
            khat[n] = 0.0
            continue
        if not np.isfinite(largest).all() or (largest > largest.min()).sum() < 5:
            khat[n] = np.nan
            continue
        weights = np.full(num_samples, largest.min())
        weights[: len(largest)] = largest
        khat[n] = _psis(weights)
    return torch.from_numpy(khat).to(tail)


def _psis(log_weights: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x at every import
        import arviz
    if hasattr(arviz, "psislw"):
        with np.errstate(over="ignore"):  # one weight far above the others
            return float(arviz.psislw(log_weights)[1])
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-log_weights)[1])  # 1.x takes minus the log-weights
