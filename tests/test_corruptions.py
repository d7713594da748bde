"""Corruptions against the distributions they are named after."""

import math

import pytest
import torch
from scipy import stats

import probae
from probae import BitFlip, GaussianNoise


def test_gaussian_noise() -> None:
    x, x_tilde = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    expected = stats.norm.logpdf(x_tilde.numpy(), x.numpy(), 0.3).sum((1, 2))
    actual = GaussianNoise(0.3)(x).log_prob(x_tilde)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_bit_flip() -> None:
    x, x_tilde = torch.rand(2, 7, 9, dtype=torch.float64).round()
    flips = (x != x_tilde).sum(-1).double()
    expected = flips * math.log(0.1) + (9 - flips) * math.log(0.9)
    actual = BitFlip(0.1)(x).log_prob(x_tilde)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_bit_flip_of_certain_flips_half_the_bits_at_one_half() -> None:
    x = torch.rand(7, 9).round()
    assert torch.equal(BitFlip(0.5)(x).mean, torch.full((7, 9), 0.5))


@pytest.mark.parametrize("corruption", [GaussianNoise(0.3), BitFlip(0.1)])
@pytest.mark.parametrize("x_shape", [(9,), (2, 3), (1, 2, 3)])
def test_shapes_and_dtype(corruption: probae.Part, x_shape: tuple[int, ...]) -> None:
    x = torch.rand(7, *x_shape, dtype=torch.float64).round()
    noisy = corruption(x)
    assert (noisy.batch_shape, noisy.event_shape) == ((7,), x_shape)
    assert noisy.sample().dtype == torch.float64
    assert not list(corruption.parameters())


def test_noise_has_its_variance() -> None:
    x = torch.zeros(20_000, 1)
    variance = GaussianNoise(0.3)(x).sample().var().item()
    sigma = 0.09 * math.sqrt(2 / 20_000)
    assert variance == pytest.approx(0.09, abs=5 * sigma)  # fails once in 2 million


def test_bits_flip_as_often_as_they_should() -> None:
    x = torch.rand(20_000, 1).round()
    flips = int((BitFlip(0.1)(x).sample() != x).sum())
    assert stats.binomtest(flips, 20_000, 0.1).pvalue > 1e-6
