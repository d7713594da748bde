"""Numbers about sparse codes and reconstructions: plain functions of tensors, no pair needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .part import as_number, require_parameter


def l0_norm(z: Tensor) -> Tensor:
    r"""Mean number of active entries of a code, :math:`\frac1N \sum_n \|z_n\|_0`.

    Args:
        z: codes (N, K).

    Raises:
        ValueError: ``z`` is not of shape (N, K), or is empty.

    Example:
        >>> import torch
        >>> l0_norm(torch.tensor([[0.0, 2.0, 0.0], [1.0, -1.0, 0.5]]))
        tensor(2.)
    """
    return _active(z).sum(-1).mean()


def feature_density(z: Tensor) -> Tensor:
    r"""Share of the data on which each feature is active, (K,).

    .. math:: d_i = \frac1N \sum_n 1[z_{ni} \ne 0]

    Args:
        z: codes (N, K).

    Raises:
        ValueError: ``z`` is not of shape (N, K), or is empty.

    Reference:
        Bricken et al., Towards monosemanticity, 2023.

    Example:
        >>> import torch
        >>> feature_density(torch.tensor([[0.0, 2.0, 0.0], [1.0, -1.0, 0.0]]))
        tensor([0.5000, 1.0000, 0.0000])
    """
    return _active(z).mean(0)


def dead_features(z: Tensor, threshold: float = 0.0) -> Tensor:
    """Mask of the features that are active on no datum, or on at most a share ``threshold``, (K,).

    Args:
        z: codes (N, K).
        threshold: largest density, in [0, 1), at which a feature counts as dead.

    Raises:
        ValueError: ``z`` is not of shape (N, K), or is empty, or ``threshold`` is not in [0, 1).

    Reference:
        Gao et al., Scaling and evaluating sparse autoencoders, 2024.

    Example:
        >>> import torch
        >>> dead_features(torch.tensor([[0.0, 2.0, 0.0], [1.0, -1.0, 0.0]]))
        tensor([False, False,  True])
    """
    if not 0 <= as_number(threshold) < 1:
        raise ValueError(f"threshold must be a share in [0, 1), got {threshold!r}")
    return feature_density(z) <= threshold


def fraction_of_variance_unexplained(x: Tensor, x_hat: Tensor) -> Tensor:
    r"""Squared error of a reconstruction over the variance of the data: 0 is perfect.

    .. math:: FVU = \frac{\sum_n \|x_n - \hat x_n\|^2}{\sum_n \|x_n - \bar x\|^2}

    It is 1 for the mean of the data, more for worse, and does not change when x and x_hat are
    shifted and scaled together. 1 - FVU is the fraction of variance explained, R².

    Args:
        x: data (N, *x_shape).
        x_hat: their reconstructions, same shape.

    Raises:
        ValueError: the shapes differ, there is no data dimension, all data are equal, or the sums
            do not fit into the dtype.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
        >>> fraction_of_variance_unexplained(x, torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
        tensor(0.1000)
    """
    for argument, value in (("x", x), ("x_hat", x_hat)):
        if not isinstance(value, Tensor) or value.dim() < 1 or not value.is_floating_point():
            raise ValueError(
                f"{argument} must be a floating tensor of shape (N, *x_shape), got "
                f"{_describe(value)}"
            )
        if not require_parameter(value, argument).isfinite().all():
            raise ValueError(f"{argument} must be finite")
    if x.shape != x_hat.shape:
        raise ValueError(
            f"x_hat must have the shape of x, {tuple(x.shape)}, got {tuple(x_hat.shape)}"
        )
    variance = (x - x.mean(0)).square().sum() if len(x) else x.new_zeros(())
    if len(x) == 0 or bool((x == x[:1]).all()):
        raise ValueError(
            f"x must hold at least two different data, or it has no variance to explain, got "
            f"{len(x)} equal ones"
        )
    error = (x - x_hat).square().sum()
    if not (error / variance).isfinite() or not variance.isfinite():
        raise ValueError(
            f"x and x_hat must be numbers whose squares fit into {x.dtype}; scale both, or pass "
            "them as float64"
        )
    return error / variance


def _active(z: Tensor) -> Tensor:
    """Return 1 where an entry of a code is not zero, (N, K)."""
    if not isinstance(z, Tensor) or z.dim() != 2 or z.numel() == 0:
        raise ValueError(
            f"z must be a tensor of codes of shape (N, K), not empty, got {_describe(z)}; flatten "
            "other batch dimensions with z.flatten(0, -2)"
        )
    if z.is_meta or z.layout != torch.strided:
        raise ValueError("z must hold numbers, in a dense tensor; z.to_dense() makes it one")
    if not z.isfinite().all():
        raise ValueError(f"z must be finite, got {int((~z.isfinite()).sum())} values that are not")
    return (z != 0).to(torch.promote_types(z.dtype, torch.float32))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
