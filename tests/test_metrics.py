"""Metrics against their definitions on small tensors."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import probae
from probae import dead_features, feature_density, fraction_of_variance_unexplained, l0_norm


@pytest.fixture
def codes() -> Tensor:
    z = torch.randn(50, 6, dtype=torch.float64)
    z[torch.rand(50, 6) < 0.6] = 0.0
    z[:, 2] = 0.0
    z[:, 4] = torch.tensor([-1.0] + [0.0] * 49)
    return z


def test_codes_are_counted(codes: Tensor) -> None:
    rows = codes.tolist()
    active = [sum(value != 0 for value in row) for row in rows]
    assert l0_norm(codes).item() == pytest.approx(sum(active) / 50, rel=1e-15)
    density = feature_density(codes)
    columns = [sum(row[i] != 0 for row in rows) / 50 for i in range(6)]
    assert density.tolist() == pytest.approx(columns, rel=1e-15)
    assert density.sum().item() == pytest.approx(l0_norm(codes).item(), rel=1e-14)
    assert dead_features(codes).nonzero().flatten().tolist() == [2]
    assert dead_features(codes, threshold=0.02).nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_counts_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    z = torch.zeros(5000, 3, dtype=dtype)
    z[:, 0] = 1
    assert l0_norm(z).item() == 1
    assert feature_density(z).tolist() == [1.0, 0.0, 0.0]
    assert l0_norm(z).dtype == torch.float32


@pytest.mark.parametrize("shape", [(40, 3), (40, 2, 3, 3), (40,)])
def test_variance_unexplained_is_a_ratio_of_sums_of_squares(shape: tuple[int, ...]) -> None:
    x, x_hat = torch.randn(2, *shape, dtype=torch.float64)
    a, b = x.numpy(), x_hat.numpy()
    expected = np.sum((a - b) ** 2) / np.sum((a - a.mean(0)) ** 2)
    fvu = fraction_of_variance_unexplained(x, x_hat).item()
    assert fvu == pytest.approx(expected, rel=1e-12)
    for scale, shift in ((-3.0, 0.0), (1e-3, 5.0), (40.0, -2.0)):
        moved = fraction_of_variance_unexplained(scale * x + shift, scale * x_hat + shift)
        assert moved.item() == pytest.approx(fvu, rel=1e-9)
    offset = torch.randn(shape[1:], dtype=torch.float64)  # one shift a coordinate
    moved = fraction_of_variance_unexplained(x + offset, x_hat + offset)
    assert moved.item() == pytest.approx(fvu, rel=1e-12)
    assert fraction_of_variance_unexplained(x, x).item() == 0
    mean = x.mean(0).expand_as(x)
    assert fraction_of_variance_unexplained(x, mean).item() == pytest.approx(1, rel=1e-12)


def test_variance_unexplained_of_noise_is_the_noise_over_the_variance() -> None:
    x = torch.randn(20_000, 5, dtype=torch.float64) * 2
    x_hat = x + 0.3 * torch.randn_like(x)
    fvu = fraction_of_variance_unexplained(x, x_hat).item()
    assert fvu == pytest.approx(0.09 / 4, rel=0.03)  # six standard errors


def test_metrics_refuse_what_has_no_value(codes: Tensor) -> None:
    for bad in (codes[0], codes[None], codes[:0], codes[:, :0], codes.tolist(), None):
        for metric in (l0_norm, feature_density, dead_features):
            with pytest.raises(ValueError, match=r"z must be a tensor of codes of shape \(N, K\)"):
                metric(bad)
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"threshold must be a share in \[0, 1\), got"):
            dead_features(codes, bad)
    x = torch.randn(4, 3)
    for bad in (x.long(), torch.tensor(1.0), x.tolist()):
        with pytest.raises(ValueError, match=r"x must be a floating tensor"):
            fraction_of_variance_unexplained(bad, x)
        with pytest.raises(ValueError, match=r"x_hat must be a floating tensor"):
            fraction_of_variance_unexplained(x, bad)
    with pytest.raises(ValueError, match=r"x_hat must have the shape of x, \(4, 3\), got \(4, 2\)"):
        fraction_of_variance_unexplained(x, x[:, :2])
    for constant in (torch.full((4, 3), 0.1), x[:1], x[:0]):
        with pytest.raises(ValueError, match=r"x must hold at least two different data"):
            fraction_of_variance_unexplained(constant, constant)


def test_codes_that_are_not_finite_count_as_nothing() -> None:
    z = torch.tensor([[0.0, float("nan")]])
    for measure in (probae.l0_norm, probae.feature_density, probae.dead_features):
        with pytest.raises(ValueError, match="z must be finite, got 1 values that are not"):
            measure(z)
    with pytest.raises(ValueError, match="threshold must be a share"):
        probae.dead_features(torch.ones(2, 2), "a")


@pytest.mark.parametrize(("x", "x_hat"), [(1.0, 1e38), (1e38, 1.0), (1e38, 1e38), (1e-30, 1.0)])
def test_what_overflows_is_named(x: float, x_hat: float) -> None:
    data = torch.eye(4) * x
    with pytest.raises(ValueError, match="x and x_hat must be numbers whose squares fit"):
        fraction_of_variance_unexplained(data, torch.full((4, 4), x_hat))
