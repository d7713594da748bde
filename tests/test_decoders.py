"""Decoders against the distributions they are named after, and their data-dependent start."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.functional import softplus

import probae
from probae import (
    LIKELIHOODS,
    MLP,
    BernoulliDecoder,
    CategoricalDecoder,
    ContinuousBernoulliDecoder,
    Decoder,
    DeconvNet,
    DiscretizedLogistic,
    DiscretizedLogisticDecoder,
    GaussianDecoder,
    HeteroscedasticGaussianDecoder,
    PoissonDecoder,
)

from .conftest import CLASSES, DATA, LEVELS

Z = 3


def make(likelihood: str, x_shape: tuple[int, ...], hidden: tuple[int, ...] = ()) -> Decoder:
    decoder = LIKELIHOODS[likelihood]
    classes = (CLASSES,) if likelihood == "categorical" else ()
    network = MLP(Z, decoder.output_shape(x_shape, *classes), hidden)
    options = {"levels": LEVELS} if likelihood == "discretized-logistic" else {}
    return decoder(network, **options).double()


def reference(decoder: Decoder, z: Tensor) -> td.Distribution:
    """The elementwise distribution, from torch where torch has it."""
    output = decoder.network(z)
    match decoder:
        case BernoulliDecoder():
            return td.Bernoulli(logits=output)
        case ContinuousBernoulliDecoder():
            exact = (0.5 - 1e-6, 0.5 + 1e-6)  # elsewhere torch has no Taylor series
            return td.ContinuousBernoulli(logits=50 * torch.tanh(output / 50), lims=exact)
        case HeteroscedasticGaussianDecoder():
            return td.Normal(output[:, 0], softplus(output[:, 1]) + 1e-3)
        case GaussianDecoder():
            return td.Normal(output, 1.0)
        case CategoricalDecoder():
            return td.Categorical(logits=output.movedim(1, -1))
        case DiscretizedLogisticDecoder():
            return DiscretizedLogistic(output[:, 0], softplus(output[:, 1]) + 1e-4, LEVELS)
        case PoissonDecoder():
            return td.Poisson(softplus(output) + 1e-6)
    raise AssertionError(decoder)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("x_shape", [(5,), (2, 3), (2, 4, 3)])
def test_log_prob_is_that_of_the_reference(likelihood: str, x_shape: tuple[int, ...]) -> None:
    decoder, z = make(likelihood, x_shape, (6,)), torch.randn(7, Z, dtype=torch.float64)
    x = DATA[likelihood](7, *x_shape).double()
    actual, expected = decoder(z), reference(decoder, z)
    assert actual.event_shape == x_shape
    torch.testing.assert_close(
        actual.log_prob(x), expected.log_prob(x).flatten(1).sum(1), rtol=0, atol=1e-11
    )
    if likelihood != "categorical":  # which has no mean
        torch.testing.assert_close(actual.mean, expected.mean)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_gaussian_log_prob_is_scipys(scale: float) -> None:
    decoder = GaussianDecoder(MLP(Z, 5), scale=scale).double()
    z, x = torch.randn(7, Z).double(), torch.randn(7, 5).double()
    mean = decoder.network(z).detach().numpy()
    expected = torch.from_numpy(stats.norm.logpdf(x.numpy(), mean, scale).sum(1))
    torch.testing.assert_close(decoder(z).log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_squared_error_is_a_gaussian_decoder_of_variance_one_half() -> None:
    decoder = GaussianDecoder(MLP(Z, 5), scale=math.sqrt(0.5)).double()
    z, x = torch.randn(7, Z).double(), torch.randn(7, 5).double()
    expected = ((x - decoder.network(z)) ** 2).sum(1) + 5 / 2 * math.log(math.pi)
    torch.testing.assert_close(-decoder(z).log_prob(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale_min", [1e-3, 0.2])
def test_learned_scale_stays_above_its_floor(scale_min: float) -> None:
    decoder = GaussianDecoder(MLP(Z, 5), learn_scale=True, scale_min=scale_min)
    assert decoder.scale.item() == pytest.approx(1.0)
    optim = torch.optim.SGD(decoder.parameters(), lr=10.0)
    x, z = torch.zeros(7, 5), torch.zeros(7, Z)  # fitted perfectly: without a floor σ goes to 0
    for _ in range(200):
        optim.zero_grad()
        (-decoder(z).log_prob(x).mean()).backward()
        optim.step()
    assert scale_min <= decoder.scale.item() < scale_min * 1.05
    with torch.no_grad():
        decoder.raw_scale.fill_(-1e9)
    assert decoder.scale.item() == pytest.approx(scale_min)
    assert decoder(z).log_prob(x).isfinite().all()


@pytest.mark.parametrize("likelihood", ["heteroscedastic-gaussian", "discretized-logistic"])
def test_predicted_scale_stays_above_its_floor(likelihood: str) -> None:
    network = MLP(Z, (2, 5))
    network.set_bias(torch.stack([torch.full((5,), 0.5), torch.full((5,), -1e6)]))
    decoder = LIKELIHOODS[likelihood](network, scale_min=0.07)
    assert decoder(torch.zeros(1, Z)).base_dist.scale.tolist()[0] == pytest.approx([0.07] * 5)


@pytest.mark.parametrize("logit_max", [1.0, 50.0])
def test_continuous_bernoulli_logit_stays_within_its_bound(logit_max: float) -> None:
    decoder = ContinuousBernoulliDecoder(MLP(Z, 5), logit_max=logit_max)
    for bias in (-1e6, 1e6):
        decoder.network.set_bias(torch.full((5,), bias))
        logits = decoder(torch.zeros(1, Z)).base_dist.logits
        torch.testing.assert_close(logits, torch.full((1, 5), math.copysign(logit_max, bias)))
    x = torch.ones(1, 5)  # without the bound, white pixels have an unbounded density
    assert decoder(torch.zeros(1, Z)).log_prob(x).item() < 5 * math.log(logit_max + 1)


@pytest.mark.parametrize("value", [2e-3, 0.3, 40.0])
def test_scale_can_be_set(value: float) -> None:
    decoder = GaussianDecoder(MLP(Z, 5), learn_scale=True).double()
    decoder.set_scale(value)
    assert decoder.scale.item() == pytest.approx(value, rel=1e-9)


def test_scale_cannot_be_set_below_its_floor_nor_where_it_is_fixed() -> None:
    learned = GaussianDecoder(MLP(Z, 5), learn_scale=True)
    for value in (1e-3, 0.0, -1.0, math.nan, math.inf, "a", None):
        with pytest.raises(ValueError, match="value must"):
            learned.set_scale(value)
    assert learned.scale.item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"fixed.*learn_scale=True"):
        GaussianDecoder(MLP(Z, 5)).set_scale(0.5)


def test_fixed_scale_keeps_double_precision_and_follows_the_network() -> None:
    decoder = GaussianDecoder(MLP(Z, 5), scale=0.1).double()
    assert decoder.scale.dtype == torch.float64
    assert decoder.scale.item() == 0.1
    assert decoder.float().scale.dtype == torch.float32


def test_affine_decoder_says_so() -> None:
    decoder = GaussianDecoder(MLP(Z, (2, 3)), scale=0.3).double()
    weight, bias, scale = decoder.affine()
    z = torch.randn(7, Z).double()
    mean = (z @ weight.T + bias).reshape(7, 2, 3)
    torch.testing.assert_close(decoder(z).mean, mean, rtol=0, atol=1e-12)
    assert scale.item() == 0.3
    assert GaussianDecoder(MLP(Z, 5, hidden=(4,))).affine() is None
    assert GaussianDecoder(nn.Linear(Z, 5)).affine() is None


def start(decoder: Decoder, x: Tensor) -> td.Distribution:
    """The elementwise distribution after initialisation, the code having no say."""
    last = decoder.network.output if isinstance(decoder.network, MLP) else None
    last = decoder.network.convolutions[-1] if last is None else last
    nn.init.zeros_(last.weight)
    decoder.initialize(x)
    distribution = decoder(torch.randn(4, Z, dtype=x.dtype))
    return distribution.base_dist


# the mean of a logistic that was rounded and clipped is not its location
TOLERANCE = {"discretized-logistic": 0.03, "poisson": 2e-6}


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name != "categorical"])
@pytest.mark.parametrize("x_shape", [(5,), (2, 3)])
def test_decoder_starts_at_the_mean_of_the_data(likelihood: str, x_shape: tuple[int, ...]) -> None:
    x = DATA[likelihood](200, *x_shape).double()
    mean = start(make(likelihood, x_shape, (6,)), x).mean
    tolerance = TOLERANCE.get(likelihood, 1e-9)
    expected = x.mean(0).expand(4, *x_shape)
    torch.testing.assert_close(mean, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("likelihood", [name for name in LIKELIHOODS if name != "categorical"])
def test_convolutional_decoder_starts_at_the_mean_of_each_channel(likelihood: str) -> None:
    # a channel has one bias: the mean over its pixels is what it can say
    x = DATA[likelihood](50, 2, 5, 6).double()
    x[:, 0] *= 0.0 if likelihood in ("poisson", "discretized-logistic") else 0.5
    x = x.round() if likelihood == "bernoulli" else x
    shape = LIKELIHOODS[likelihood].output_shape((2, 5, 6))
    options = {"levels": LEVELS} if likelihood == "discretized-logistic" else {}
    decoder = LIKELIHOODS[likelihood](DeconvNet(Z, shape, (4,)), **options).double()
    expected = x.mean((0, 2, 3)).clamp(min=0.01 if likelihood == "poisson" else -math.inf)
    mean = start(decoder, x).mean
    tolerance = TOLERANCE.get(likelihood, 1e-3)
    expected = expected[:, None, None].expand(4, 2, 5, 6)
    torch.testing.assert_close(mean, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("likelihood", ["heteroscedastic-gaussian", "discretized-logistic"])
def test_decoder_starts_at_the_scale_of_the_data(likelihood: str) -> None:
    x = 0.5 + 0.1 * torch.randn(500, 5, dtype=torch.float64)
    decoder = LIKELIHOODS[likelihood](MLP(Z, (2, 5))).double()
    scale = start(decoder, x).scale
    unit = math.sqrt(3) / math.pi if likelihood == "discretized-logistic" else 1.0
    expected = unit * x.std(0, correction=0).expand(4, 5)
    torch.testing.assert_close(scale, expected, rtol=0, atol=2e-4)


def test_categorical_decoder_starts_at_the_frequencies() -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 3.0], [2.0, 3.0]], dtype=torch.float64)
    probs = start(make("categorical", (2,), (6,)), x).probs[0]
    counts = torch.tensor([[2, 0, 1, 0], [0, 1, 0, 2]], dtype=torch.float64)
    torch.testing.assert_close(probs, (counts + 0.5) / 5, rtol=0, atol=1e-12)


def test_convolutional_categorical_decoder_starts_at_the_frequencies_of_each_channel() -> None:
    x = torch.randint(0, CLASSES, (50, 2, 5, 6)).double()
    x[:, 1] = 3.0
    network = DeconvNet(Z, (CLASSES, 2, 5, 6), (4,))
    probs = start(CategoricalDecoder(network).double(), x).probs[0]  # (2, 5, 6, C)
    for channel in (0, 1):
        hits = torch.stack([(x[:, channel] == c).double().mean() for c in range(CLASSES)])
        torch.testing.assert_close(probs[channel], hits.expand(5, 6, CLASSES), rtol=0, atol=2e-3)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_data_give_finite_starting_values(likelihood: str, dtype: torch.dtype) -> None:
    for x in (torch.zeros(1, 5), torch.ones(3, 5), 1e6 * DATA[likelihood](20, 5)):
        decoder = make(likelihood, (5,)).to(dtype)
        decoder.initialize(x.to(dtype))
        assert decoder.network.output.bias.isfinite().all()


def test_decoder_on_a_network_without_a_bias_to_set_is_left_alone() -> None:
    for decoder in (BernoulliDecoder(nn.Linear(Z, 5)), CategoricalDecoder(nn.Linear(Z, 5))):
        before = {name: p.clone() for name, p in decoder.named_parameters()}
        decoder.initialize(torch.rand(7, 5).round())
        assert all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())


def test_abstract_decoder_says_so() -> None:
    with pytest.raises(TypeError, match="Decoder has no data-dependent starting values"):
        probae.Decoder(nn.Linear(Z, 5)).bias_for(torch.zeros(1, 5))


def test_output_shapes() -> None:
    for name, decoder in LIKELIHOODS.items():
        expected = {"heteroscedastic-gaussian": (2, 1, 8), "discretized-logistic": (2, 1, 8)}
        if name != "categorical":
            assert decoder.output_shape((1, 8)) == expected.get(name, (1, 8))
    assert CategoricalDecoder.output_shape((1, 8), 5) == (5, 1, 8)
    for bad in (1, 0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=r"num_classes must be an int >= 2, got"):
            CategoricalDecoder.output_shape((1, 8), bad)


@pytest.mark.parametrize("decoder", [HeteroscedasticGaussianDecoder, DiscretizedLogisticDecoder])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_two_parameter_decoders_say_which_output_they_need(
    decoder: type[Decoder], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"network must have output of shape \(\.\.\., 2, \*x_sha"):
        decoder(MLP(Z, shape))(torch.zeros(7, Z))


def test_poisson_never_forbids_a_count() -> None:
    network = MLP(Z, 5)
    network.set_bias(torch.full((5,), -1e6))
    log_prob = PoissonDecoder(network)(torch.zeros(1, Z)).log_prob(torch.full((1, 5), 3.0))
    assert log_prob.isfinite().all()


class Repeat(nn.Module):
    """A network without parameters."""

    def forward(self, z: Tensor) -> Tensor:
        return z.repeat_interleave(2, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_without_parameters_will_do(dtype: torch.dtype) -> None:
    decoder = GaussianDecoder(Repeat(), scale=0.1)
    z = torch.randn(7, Z, dtype=dtype)
    normal = decoder(z).base_dist
    assert normal.scale.dtype == dtype
    assert torch.equal(normal.scale, torch.full((7, 2 * Z), 0.1, dtype=dtype))
    assert decoder.affine() is None
    assert decoder.scale.item() == pytest.approx(0.1)
