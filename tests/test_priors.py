"""Priors against the formulas they are named after."""

import math
import sys

import pytest
import torch
from torch import Tensor

import probae
from probae import (
    MLP,
    BernoulliPrior,
    CategoricalPrior,
    ExponentialPrior,
    FlatPrior,
    FlowPrior,
    GaussianEncoder,
    GaussianMixturePrior,
    LaplacePrior,
    PointEncoder,
    SpikeAndSlabPrior,
    StandardNormalPrior,
    StudentTPrior,
    SubsetPrior,
    VampPrior,
)

Z = 3


@pytest.fixture
def z() -> Tensor:
    return torch.randn(50, Z, dtype=torch.float64)


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    deviation = ((z - loc) / scale) ** 2
    return (-0.5 * deviation - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_standard_normal(z: Tensor) -> None:
    expected = -0.5 * (z**2).sum(-1) - Z / 2 * math.log(2 * math.pi)
    assert_equal(StandardNormalPrior(Z).double()().log_prob(z), expected)


def test_flat_prior_adds_nothing(z: Tensor) -> None:
    assert (FlatPrior(Z).double()().log_prob(z) == 0).all()


@pytest.mark.parametrize("rate", [0.3, 1.0, 1 / 3, 7.1])
def test_laplace_is_the_l1_penalty(rate: float, z: Tensor) -> None:
    # at 1e-12: a rate that went through float32 on its way is off by 1e-8
    expected = Z * math.log(rate / 2) - rate * z.abs().sum(-1)
    assert_equal(LaplacePrior(Z, rate).double()().log_prob(z), expected)


def test_laplace_rate_can_be_learned(z: Tensor) -> None:
    fixed, learned = LaplacePrior(Z, 0.3).double(), LaplacePrior(Z, 0.3, learn_rate=True).double()
    assert list(fixed.parameters()) == []
    assert learned.log_rate.item() == pytest.approx(math.log(0.3), rel=1e-6)
    torch.testing.assert_close(fixed().log_prob(z), learned().log_prob(z), rtol=1e-6, atol=1e-6)
    learned().log_prob(z).sum().backward()
    expected = (1 - learned.log_rate.exp() * z.abs()).sum()  # d/dλ of log λ - λ|z|, times λ
    assert_equal(learned.log_rate.grad, expected.detach())


@pytest.mark.parametrize("rate", [0.3, 1.0, 7.1])
def test_exponential_is_the_l1_penalty_of_nonnegative_codes(rate: float, z: Tensor) -> None:
    prior = ExponentialPrior(Z, rate).double()()
    assert_equal(prior.log_prob(z.abs()), Z * math.log(rate) - rate * z.abs().sum(-1))
    laplace = LaplacePrior(Z, rate).double()().log_prob(z)
    assert_equal(prior.log_prob(z.abs()), laplace + Z * math.log(2))
    assert not prior.support.check(-z.abs()).any()


@pytest.mark.parametrize(("degrees", "scale"), [(3.0, 1.0), (0.5, 0.2), (20.0, 3.0)])
def test_student_t(degrees: float, scale: float, z: Tensor) -> None:
    penalty = (degrees + 1) / 2 * torch.log1p(z**2 / (degrees * scale**2)).sum(-1)
    constant = math.log(scale) + 0.5 * math.log(degrees * math.pi)
    constant += math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    prior = StudentTPrior(Z, degrees, scale).double()()
    assert_equal(prior.log_prob(z), -penalty - Z * constant)


def sparse_codes(z: Tensor) -> Tensor:
    return torch.where(torch.rand(z.shape) < 0.5, z, 0.0)


@pytest.mark.parametrize("rate", [-1.0, 0.0, 0.4, 3.0])
def test_flat_spike_and_slab_is_the_l0_penalty(rate: float, z: Tensor) -> None:
    codes = sparse_codes(z)
    active = (codes != 0).double().sum(-1)
    probability = 1 / (1 + math.exp(rate))
    prior = SpikeAndSlabPrior(Z, rate, slab_scale=None).double()()
    expected = -rate * active - Z * math.log(1 / (1 - probability))
    assert_equal(prior.log_prob(codes), expected)
    assert math.log((1 - probability) / probability) == pytest.approx(rate, abs=1e-12)
    assert prior.gate.mean.tolist() == pytest.approx([probability] * Z, abs=1e-12)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_gaussian_slab_adds_its_density_to_what_is_on(scale: float, z: Tensor) -> None:
    codes = sparse_codes(z)
    on = (codes != 0).double()
    slab = on.sum(-1) * 0.5 * math.log(2 * math.pi * scale**2) + (codes**2).sum(-1) / (2 * scale**2)
    for flat, proper in (
        (SpikeAndSlabPrior(Z, 0.7, None), SpikeAndSlabPrior(Z, 0.7, scale)),
        (SubsetPrior(Z, 2, None), SubsetPrior(Z, 2, scale)),
    ):
        codes = codes if isinstance(flat, SpikeAndSlabPrior) else codes[on.sum(-1) == 2]
        slab = slab if isinstance(flat, SpikeAndSlabPrior) else slab[on.sum(-1) == 2]
        difference = flat.double()().log_prob(codes) - proper.double()().log_prob(codes)
        assert_equal(difference, slab)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_subsets_are_equally_probable(k: int) -> None:
    prior = SubsetPrior(5, k, slab_scale=None).double()()
    codes = prior.sample((40,))
    assert ((codes != 0).sum(-1) == k).all()
    assert_equal(
        prior.log_prob(codes), torch.full((40,), -math.log(math.comb(5, k)), dtype=torch.float64)
    )
    assert_equal(prior.gate.mean, torch.full((5,), k / 5, dtype=torch.float64))
    others = torch.ones(5).double() * (torch.arange(5) < k - 1)
    assert not prior.support.check(others)


def test_mixture_is_the_weighted_sum_of_its_components(z: Tensor) -> None:
    prior = GaussianMixturePrior(Z, components=4).double()
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_()
    weight = torch.softmax(prior.logits, 0)
    components = [
        log_normal(z, loc, scale)
        for loc, scale in zip(prior.loc, prior.log_scale.exp(), strict=True)
    ]
    expected = torch.log(sum(w * c.exp() for w, c in zip(weight, components, strict=True)))
    assert_equal(prior().log_prob(z), expected)


def test_vamp_is_the_mean_of_the_posteriors_at_its_pseudo_inputs(z: Tensor) -> None:
    encoder = GaussianEncoder(MLP((2, 4), (2, Z), (5,))).double()
    prior = VampPrior(encoder, (2, 4), components=6).double()
    posteriors = [encoder(u).log_prob(z).exp() for u in prior.pseudo_inputs]
    assert_equal(prior().log_prob(z), torch.log(sum(posteriors) / 6))
    assert prior.encoder is encoder


@pytest.mark.parametrize("count", [4, 20])
def test_pseudo_inputs_start_at_different_training_data(count: int) -> None:
    x = torch.rand(10, 8)
    prior = VampPrior(GaussianEncoder(MLP(8, (2, Z))), 8, components=count)
    prior.initialize(x)
    rows = [int((x == u).all(1).nonzero()) for u in prior.pseudo_inputs]
    times = [rows.count(row) for row in range(10)]
    assert max(times) - min(times) <= 1
    assert max(times) == math.ceil(count / 10)
    assert rows != sorted(rows)


def test_vamp_of_a_point_code_is_no_density() -> None:
    prior = VampPrior(PointEncoder(MLP(8, Z)), 8, components=4)
    with pytest.raises(
        ValueError, match=r"encoder of a VampPrior .* point code .* GaussianEncoder"
    ):
        prior()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.93])
def test_bits(probability: float) -> None:
    prior = BernoulliPrior(Z, probability).double()()
    bits = torch.rand(20, Z, dtype=torch.float64).round()
    ones = bits.sum(-1)
    expected = ones * math.log(probability) + (Z - ones) * math.log1p(-probability)
    assert_equal(prior.log_prob(bits), expected)


def test_one_hot() -> None:
    prior = CategoricalPrior(Z).double()
    uniform = torch.full((Z,), -math.log(Z), dtype=torch.float64)
    assert_equal(prior().log_prob(torch.eye(Z).double()), uniform)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([1.0, -2.0, 0.5]))
    expected = torch.log_softmax(prior.logits, 0)
    assert_equal(prior().log_prob(torch.eye(Z).double()), expected)


def test_flow_without_zuko_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko", None)  # makes the import fail
    with pytest.raises(ImportError, match=r"FlowPrior needs zuko: pip install 'probae\[flows\]'"):
        FlowPrior(2)


def perturbed_flow() -> FlowPrior:
    """A flow away from its start, which is close to a standard normal."""
    pytest.importorskip("zuko")
    prior = FlowPrior(2, transforms=2, hidden=(16,)).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return prior


def on_a_grid(prior: probae.Part, points: int = 401) -> tuple[Tensor, Tensor]:
    """Points of the square [-9, 9]², and the probability of the cell around each."""
    axis = torch.linspace(-9, 9, points, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        return z, prior().log_prob(z).exp() * (axis[1] - axis[0]) ** 2


def test_flow_integrates_to_one() -> None:
    flow, normal = perturbed_flow(), StandardNormalPrior(2).double()
    _, cells = on_a_grid(flow, 601)
    assert cells.sum().item() == pytest.approx(1, abs=1e-3)
    assert (cells - on_a_grid(normal, 601)[1]).abs().sum() > 0.05  # and it is no normal any more


def test_flow_samples_follow_its_density() -> None:
    flow = perturbed_flow()
    z, cells = on_a_grid(flow)
    sample = flow().sample((20_000,))
    for first, second in ((0.0, 0.0), (0.7, -0.4), (-1.0, 0.5)):
        inside = (z[:, 0] > first) & (z[:, 1] > second)
        hits = ((sample[:, 0] > first) & (sample[:, 1] > second)).sum().item()
        probability = float(cells[inside].sum())
        sigma = math.sqrt(20_000 * probability * (1 - probability))
        grid_error = 20_000 * 0.003  # cells that the line cuts
        assert abs(hits - 20_000 * probability) < 5 * sigma + grid_error  # fails once in 2 million


@pytest.mark.parametrize("prior", [LaplacePrior(Z, 0.1), BernoulliPrior(Z, 0.1)])
def test_settings_keep_double_precision(prior: probae.Part) -> None:
    distribution = prior.double()().base_dist
    value = distribution.scale if isinstance(prior, LaplacePrior) else distribution.probs
    expected = 10.0 if isinstance(prior, LaplacePrior) else 0.1
    assert value.dtype == torch.float64
    assert value.tolist() == pytest.approx([expected] * Z, rel=1e-15)


def test_every_prior_has_one_event_dimension_and_no_batch() -> None:
    encoder = GaussianEncoder(MLP(8, (2, Z)))
    priors = [
        StandardNormalPrior(Z),
        FlatPrior(Z),
        LaplacePrior(Z),
        LaplacePrior(Z, learn_rate=True),
        ExponentialPrior(Z),
        StudentTPrior(Z),
        SpikeAndSlabPrior(Z),
        SpikeAndSlabPrior(Z, slab_scale=None),
        SubsetPrior(Z, num_active=2),
        SubsetPrior(Z, num_active=2, slab_scale=None),
        GaussianMixturePrior(Z),
        VampPrior(encoder, 8),
        BernoulliPrior(Z),
        CategoricalPrior(Z),
    ]
    for prior in priors:
        assert (prior().batch_shape, prior().event_shape) == ((), (Z,))
        assert prior().sample((5,)).shape == (5, Z)


def test_sparse_priors_refuse_settings_that_mean_nothing() -> None:
    for bad in (0.0, -1.0, math.inf, math.nan, "1", None, True):
        for build in (lambda v: ExponentialPrior(2, v), lambda v: LaplacePrior(2, v, True)):
            with pytest.raises(ValueError, match=r"rate must be a finite number > 0, got"):
                build(bad)
        with pytest.raises(ValueError, match=r"degrees must be a finite number > 0, got"):
            StudentTPrior(2, degrees=bad)
        with pytest.raises(ValueError, match=r"scale must be a finite number > 0, got"):
            StudentTPrior(2, scale=bad)
        if bad is not None:
            with pytest.raises(ValueError, match=r"slab_scale must be a finite number > 0, got"):
                SpikeAndSlabPrior(2, slab_scale=bad)
            with pytest.raises(ValueError, match=r"slab_scale must be a finite number > 0, got"):
                SubsetPrior(2, 1, slab_scale=bad)
    for bad in (math.inf, math.nan, "1", None, True):
        with pytest.raises(ValueError, match=r"rate must be a finite number, got"):
            SpikeAndSlabPrior(2, rate=bad)
    with pytest.raises(ValueError, match=r"num_active must be an int >= 1, got 0"):
        SubsetPrior(2, 0)
    with pytest.raises(ValueError, match=r"num_active must be at most z_dim, 2, got 3"):
        SubsetPrior(2, 3)


def test_learned_scales_have_floors() -> None:
    laplace = probae.LaplacePrior(3, learn_rate=True)
    mixture = probae.GaussianMixturePrior(3, components=2)
    with torch.no_grad():
        laplace.log_rate.fill_(1e4)  # where a fit may drive them: their exponentials are 0
        mixture.log_scale.fill_(-1e4)
    for prior in (laplace, mixture):
        assert prior().log_prob(torch.zeros(5, 3)).isfinite().all()
        assert prior().sample().isfinite().all()
    assert laplace().base_dist.scale.unique().item() == pytest.approx(1e-6)
    with pytest.raises(ValueError, match="scale_min must be a finite number > 0, got 0"):
        probae.GaussianMixturePrior(3, scale_min=0)
