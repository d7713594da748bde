"""GreyBernoulli and DiscretizedLogistic against enumeration, scipy and their own samples."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy import stats
from torch import Tensor

import probae
from probae import DiscretizedLogistic, GreyBernoulli
from probae.distributions import (
    Flow,
    base_distribution,
    draw_bits,
    is_discrete,
    is_flat,
    is_point,
    mean_of,
)
from probae.part import RECORDING

FALSE_ALARM = 1e-6  # probability with which a test of a sampler may fail for a right sampler


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square test of counts, rare cells pooled so that the asymptotics hold."""
    expected = probabilities * counts.sum()
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    common = expected >= 5
    assert common.sum() >= 2
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    keep = wanted > 1e-9 * counts.sum()
    assert observed[~keep].sum() == 0
    statistic = ((observed[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > FALSE_ALARM


def test_grey_log_prob_is_the_expected_log_prob_of_binarisations() -> None:
    logits = 3 * torch.randn(6, dtype=torch.float64)
    grey = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.999, 1e-9], dtype=torch.float64)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    weight = (states * grey + (1 - states) * (1 - grey)).prod(-1)
    expected = weight @ dist.Bernoulli(logits=logits).log_prob(states).sum(-1)
    assert weight.sum().item() == pytest.approx(1, abs=1e-14)
    actual = GreyBernoulli(logits=logits).log_prob(grey).sum()
    assert actual.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("parameter", ["logits", "probs"])
def test_grey_bernoulli_is_bernoulli_on_bits(parameter: str) -> None:
    value = torch.rand(50, dtype=torch.float64)
    parameters = {parameter: torch.logit(value) if parameter == "logits" else value}
    bits = torch.rand(4, 50, dtype=torch.float64).round()
    ours, theirs = GreyBernoulli(**parameters), dist.Bernoulli(**parameters)
    torch.testing.assert_close(ours.log_prob(bits), theirs.log_prob(bits), rtol=0, atol=1e-12)
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(ours.variance, theirs.variance)
    assert set(ours.sample((20,)).unique().tolist()) <= {0.0, 1.0}


def test_grey_bernoulli_is_stable_at_large_logits() -> None:
    logits = torch.tensor([-200.0, 200.0, -1e4, 1e4], requires_grad=True)
    for bit in (0.0, 1.0):
        x = torch.full((4,), bit)
        log_prob = GreyBernoulli(logits=logits).log_prob(x)
        expected = -torch.nn.functional.binary_cross_entropy_with_logits(
            logits, x, reduction="none"
        )
        torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-4)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        torch.testing.assert_close(gradient, x - torch.sigmoid(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_machine_code_computes_is_grey_bernoulli_too(dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -0.0, 1e-30, -88.0, 88.0, -104.0, 104.0, -1e4, 1e4])
    logits = torch.cat([torch.linspace(-40, 40, 1001), extremes]).to(dtype).requires_grad_()
    x = torch.rand_like(logits)
    # not of softplus(), which is the identity beyond 20
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    token = RECORDING.set(True)
    try:
        recorded = GreyBernoulli(logits=logits).log_prob(x)
    finally:
        RECORDING.reset(token)
    (gradient,) = torch.autograd.grad(recorded.sum(), logits)
    rounding = torch.finfo(dtype).eps
    assert ((recorded - expected).abs() <= 4 * rounding * (1 + logits.abs())).all()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=4 * rounding)


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, math.inf])
def test_grey_bernoulli_refuses_values_outside_its_support(bad: float) -> None:
    grey = GreyBernoulli(logits=torch.zeros(2), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        grey.log_prob(torch.tensor([0.5, bad]))


def test_grey_bernoulli_expands_and_keeps_its_class() -> None:
    grey = GreyBernoulli(logits=torch.zeros(2)).expand((3, 2))
    assert type(grey) is GreyBernoulli
    assert grey.log_prob(torch.full((3, 2), 0.5)).shape == (3, 2)
    assert not grey.has_enumerate_support  # its support is an interval: no states to sum over


def grid(levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(levels, dtype=dtype) / (levels - 1)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["f64", "f32"]
)
def test_discretized_logistic_sums_to_one(
    levels: int, dtype: torch.dtype, tolerance: float
) -> None:
    loc = torch.tensor([-50.0, -1.0, 0.0, 0.2, 0.5, 1.0, 1.5, 40.0], dtype=dtype)
    scale = torch.tensor([1e-4, 1e-3, 0.03, 0.3, 3.0, 1e3], dtype=dtype)
    logistic = DiscretizedLogistic(loc[:, None], scale, levels)
    log_prob = logistic.log_prob(grid(levels, dtype)[:, None, None])
    assert log_prob.shape == (levels, 8, 6)
    assert log_prob.isfinite().all()
    assert (log_prob <= tolerance).all()
    total = log_prob.exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_discretized_logistic_is_a_difference_of_distribution_functions(levels: int) -> None:
    loc, scale = np.array([0.1, 0.5, 1.1]), np.array([0.02, 0.2, 1.0])
    x, half = grid(levels).numpy()[:, None], 0.5 / (levels - 1)
    upper = stats.logistic.cdf(x + half, loc, scale)
    lower = stats.logistic.cdf(x - half, loc, scale)
    upper[-1], lower[0] = 1.0, 0.0
    logistic = DiscretizedLogistic(torch.tensor(loc), torch.tensor(scale), levels)
    actual = logistic.log_prob(grid(levels)[:, None]).exp()
    torch.testing.assert_close(actual, torch.from_numpy(upper - lower), rtol=0, atol=1e-14)


def test_discretized_logistic_keeps_its_tails_in_single_precision() -> None:
    # far from the mean a difference of two sigmoids is 0 in float32, and its gradient lost
    loc = torch.tensor([0.4, 0.9, -3.0, 5.0])
    x = grid(256, torch.float32)[:, None]
    for scale in (1e-4, 1e-2, 1.0):
        single = loc.clone().requires_grad_()
        log_prob = DiscretizedLogistic(single, torch.tensor(scale), 256).log_prob(x)
        exact = DiscretizedLogistic(loc.double(), torch.tensor(scale).double(), 256)
        expected = exact.log_prob(grid(256)[:, None])
        torch.testing.assert_close(log_prob.double(), expected, rtol=2e-4, atol=2e-3)
        (gradient,) = torch.autograd.grad(log_prob.sum(), single)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


@pytest.mark.parametrize(("loc", "scale"), [(0.4, 0.1), (-0.2, 0.3), (1.3, 0.05), (0.52, 1e-4)])
def test_discretized_logistic_mean_is_the_sum_over_levels(loc: float, scale: float) -> None:
    parameters = torch.tensor(loc).double(), torch.tensor(scale).double()
    logistic = DiscretizedLogistic(*parameters, levels=17)
    expected = (grid(17) * logistic.log_prob(grid(17)).exp()).sum()
    assert logistic.mean.item() == pytest.approx(expected.item(), abs=1e-12)
    assert logistic.expand((2, 3)).mean.shape == (2, 3)


@pytest.mark.parametrize(("loc", "scale"), [(0.4, 0.1), (-0.2, 0.3), (1.1, 0.05), (0.5, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_discretized_logistic_samples_have_its_frequencies(
    loc: float, scale: float, dtype: torch.dtype
) -> None:
    logistic = DiscretizedLogistic(
        torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype), levels=9
    )
    sample = logistic.sample((20_000,))
    assert sample.dtype == dtype
    assert logistic.support.check(sample).all()
    counts = torch.bincount((sample * 8).round().long(), minlength=9)
    probabilities = logistic.log_prob(grid(9, dtype)).exp().double()
    assert_frequencies(counts.numpy(), probabilities.numpy())


def test_discretized_logistic_shapes_and_validation() -> None:
    logistic = DiscretizedLogistic(torch.zeros(3, 1), torch.ones(4), levels=5)
    assert logistic.batch_shape == (3, 4)
    assert logistic.sample((2,)).shape == (2, 3, 4)
    assert logistic.expand((2, 3, 4)).log_prob(torch.tensor(0.25)).shape == (2, 3, 4)
    assert logistic.expand((2, 3, 4)).levels == 5
    assert logistic.to_event(1).event_shape == (4,)
    with pyro.validation_enabled():
        for bad in (0.1, -0.25, 1.25, math.nan):
            with pytest.raises(ValueError, match="support"):
                logistic.log_prob(torch.tensor(bad))
        with pytest.raises(ValueError, match="scale"):
            DiscretizedLogistic(torch.zeros(2), torch.zeros(2))
    for levels in (1, 0, 2.5, True, None):
        with pytest.raises(ValueError, match=r"levels must be an int >= 2, got"):
            DiscretizedLogistic(torch.zeros(2), torch.ones(2), levels)


def test_support_of_levels_allows_for_rounding() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    for x in (pixels.float() / 255, pixels.double() / 255, (pixels.double() / 255).float()):
        assert DiscretizedLogistic(torch.zeros(256), torch.ones(256)).support.check(x).all()
    support = DiscretizedLogistic(torch.zeros(1), torch.ones(1), 256).support
    assert not support.check((pixels[1:].float() + 0.1) / 255).any()
    assert not support.check(torch.tensor([-1 / 255, 256 / 255, math.nan])).any()


def test_wrappers_are_seen_through() -> None:
    normal = dist.Normal(torch.zeros(3), 1.0)
    assert base_distribution(normal.to_event(1).mask(True).expand((2,))) is not None
    assert type(base_distribution(normal.to_event(1).mask(True))) is dist.Normal
    assert is_point(dist.Delta(torch.zeros(2, 3)).to_event(1).mask(True))
    assert not is_point(normal.to_event(1))
    flat = normal.to_event(1).mask(False)
    assert is_flat(flat)
    assert is_flat(flat.expand((5,)))
    assert not is_flat(normal.to_event(1).mask(True))
    assert not is_flat(normal)
    assert is_discrete(dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
    assert is_discrete(dist.OneHotCategorical(torch.full((3,), 0.5)))
    assert not is_discrete(normal.to_event(1))


def test_mean_of_a_distribution_without_one_is_that_of_draws() -> None:
    squashed = dist.TransformedDistribution(
        dist.Normal(torch.zeros(4000), 1.0), [dist.transforms.AffineTransform(2.0, 0.1)]
    )
    with pytest.raises(NotImplementedError):
        _ = squashed.mean
    assert mean_of(squashed).shape == (4000,)
    assert mean_of(squashed).mean().item() == pytest.approx(2, abs=0.01)  # 60 standard errors
    assert torch.equal(mean_of(dist.Normal(torch.ones(2), 1.0)), torch.ones(2))


def test_flow_bridge_samples_expands_and_differentiates() -> None:
    zuko = pytest.importorskip("zuko")
    flow = Flow(zuko.flows.NSF(2, transforms=1, hidden_features=(4,))())
    assert (flow.batch_shape, flow.event_shape) == ((), (2,))
    assert flow.sample((5,)).shape == (5, 2)
    assert not flow.sample((5,)).requires_grad
    assert flow.rsample((5,)).requires_grad
    expanded = flow.expand((3,))
    assert expanded.sample().shape == (3, 2)
    z = torch.randn(3, 2)
    torch.testing.assert_close(expanded.log_prob(z), flow.log_prob(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [0.0, 1e-3, 0.019, 0.021, 5.0, -5.0, 20.0, -50.0, 200.0])
def test_continuous_bernoulli_integrates_to_one(logit: float, dtype: torch.dtype) -> None:
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000  # midpoint rule
    density = probae.ContinuousBernoulli(torch.tensor(logit, dtype=dtype))
    p = density.log_prob(x.to(dtype)).double().exp()
    tolerance = 1e-7 if dtype == torch.float64 else 2e-4
    assert float(p.mean()) == pytest.approx(1, abs=tolerance)
    assert float((x * p).mean()) == pytest.approx(float(density.mean), abs=tolerance)


def test_continuous_bernoulli_is_torchs_where_torchs_is_right() -> None:
    logits = torch.linspace(-8, 8, 41, dtype=torch.float64)[:, None]
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    reference = torch.distributions.ContinuousBernoulli(logits=logits).log_prob(x)
    assert torch.allclose(probae.ContinuousBernoulli(logits).log_prob(x), reference, atol=1e-5)


def test_continuous_bernoulli_samples_follow_its_distribution_function() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-30.0, -2.0, 0.0, 1e-4, 3.0, 100.0], dtype=torch.float64)
    x = probae.ContinuousBernoulli(logits).rsample(torch.Size((5000,)))
    for i, logit in enumerate(logits.tolist()):
        size = logit if abs(logit) > 1e-3 else 0.0

        def cdf(value: np.ndarray, size: float = size) -> np.ndarray:
            return np.expm1(size * value) / np.expm1(size) if size else value

        assert stats.kstest(x[:, i].numpy(), cdf).pvalue > 1e-6  # false alarm: 1e-6 each


def test_continuous_bernoulli_gradient_is_finite_and_right() -> None:
    logits = torch.tensor([0.0, 0.01, 0.02, 1.0, -40.0], dtype=torch.float64, requires_grad=True)
    x = torch.full((5,), 0.3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(probae.ContinuousBernoulli(logits).log_prob(x).sum(), logits)
    expected = x - probae.ContinuousBernoulli(logits.detach()).mean  # exponential family
    assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_come_as_often_as_they_should(dtype: torch.dtype) -> None:
    probs = torch.tensor([0.0, 1e-9, 0.1, 0.5, 0.9, 1.0], dtype=dtype)
    counts = draw_bits(probs.expand(200_000, 6)).double().sum(0)
    expected = 200_000 * probs.double()
    assert counts[0] == 0
    assert counts[1] <= 2  # more with a rate of 4e-9 at most
    assert counts[5] == 200_000
    # failure rate 1e-6 each
    assert (
        (counts - expected).abs()[2:5] < 4.9 * (expected * (1 - probs.double())).sqrt()[2:5]
    ).all()


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 7), (2, 3, 4), (0, 5)])
def test_bits_have_the_shape_of_their_probabilities(shape: tuple[int, ...]) -> None:
    assert draw_bits(torch.full(shape, 0.5)).shape == shape


def test_neighbouring_bits_are_independent() -> None:
    bits = draw_bits(torch.full((50_000, 9), 0.3)).double()
    correlations = torch.corrcoef(bits.T) - torch.eye(9)
    assert correlations.abs().max() * 50_000**0.5 < 5.5  # failure rate 1e-6 over 36 pairs
