"""Encoders against the distributions they are named after."""

import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.nn.functional import softplus

from probae import (
    MLP,
    BernoulliDecoder,
    BernoulliEncoder,
    CategoricalEncoder,
    GaussianDecoder,
    GaussianEncoder,
    LinearGaussianPosterior,
    PointEncoder,
)
from probae.distributions import is_point

X, Z = 5, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, X, dtype=torch.float64)


def test_gaussian_encoder(x: Tensor) -> None:
    encoder = GaussianEncoder(MLP(X, (2, Z), (4,)), scale_min=0.1).double()
    loc, scale = encoder.network(x).unbind(-2)
    reference = td.Independent(td.Normal(loc, softplus(scale) + 0.1), 1)
    z = encoder(x).sample()
    torch.testing.assert_close(encoder(x).log_prob(z), reference.log_prob(z), rtol=0, atol=1e-12)
    assert encoder(x).has_rsample


@pytest.mark.parametrize("scale_min", [1e-6, 0.5])
def test_gaussian_scale_stays_above_its_floor(scale_min: float) -> None:
    network = MLP(X, (2, Z))
    torch.nn.init.constant_(network.output.bias, -1e4)
    scale = GaussianEncoder(network, scale_min)(torch.zeros(2, X)).base_dist.scale
    assert (scale >= scale_min * (1 - 1e-6)).all()
    assert scale.max().item() == pytest.approx(scale_min)


def test_point_encoder(x: Tensor) -> None:
    encoder = PointEncoder(MLP(X, Z, (4,))).double()
    q = encoder(x)
    assert is_point(q)
    assert torch.equal(q.sample(), encoder.network(x))
    assert torch.equal(q.mean, encoder.network(x))
    assert torch.equal(q.log_prob(encoder.network(x)), torch.zeros(7, dtype=torch.float64))


def test_bernoulli_encoder(x: Tensor) -> None:
    encoder = BernoulliEncoder(MLP(X, Z)).double()
    reference = td.Independent(td.Bernoulli(logits=encoder.network(x)), 1)
    z = encoder(x).sample()
    torch.testing.assert_close(encoder(x).log_prob(z), reference.log_prob(z), rtol=0, atol=1e-12)


def test_categorical_encoder(x: Tensor) -> None:
    encoder = CategoricalEncoder(MLP(X, Z)).double()
    expected = torch.log_softmax(encoder.network(x), -1)  # (7, Z)
    codes = torch.eye(Z, dtype=torch.float64)[:, None].expand(Z, 7, Z)
    torch.testing.assert_close(encoder(x).log_prob(codes), expected.T, rtol=0, atol=1e-12)
    assert encoder(x).sample().sum(-1).eq(1).all()


@pytest.mark.parametrize("x_shape", [(6,), (2, 3)])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_linear_gaussian_posterior_is_bayes_rule(
    x_shape: tuple[int, ...], learn_scale: bool
) -> None:
    decoder = GaussianDecoder(MLP(Z, x_shape), scale=0.3, learn_scale=learn_scale).double()
    with torch.no_grad():
        decoder.network.output.bias.normal_()
    encoder = LinearGaussianPosterior(decoder)
    x, z = torch.randn(7, *x_shape).double(), torch.randn(7, Z).double()
    weight, bias, scale = decoder.affine()
    covariance = weight @ weight.T + scale**2 * torch.eye(6, dtype=torch.float64)
    evidence = td.MultivariateNormal(bias, covariance).log_prob(x.flatten(1))
    prior = td.Independent(td.Normal(torch.zeros(Z).double(), 1.0), 1).log_prob(z)
    expected = prior + decoder(z).log_prob(x) - evidence
    torch.testing.assert_close(encoder(x).log_prob(z), expected, rtol=1e-9, atol=1e-9)


def test_linear_gaussian_posterior_owns_no_parameters() -> None:
    decoder = GaussianDecoder(MLP(Z, X), learn_scale=True)
    encoder = LinearGaussianPosterior(decoder)
    assert {id(p) for p in encoder.parameters()} == {id(p) for p in decoder.parameters()}
    before = encoder(torch.ones(1, X)).mean
    decoder.set_scale(0.01)  # the posterior follows the decoder
    assert not torch.allclose(before, encoder(torch.ones(1, X)).mean)


@pytest.mark.parametrize(
    "decoder",
    [
        GaussianDecoder(MLP(Z, X, hidden=(4,))),
        GaussianDecoder(torch.nn.Linear(Z, X)),
        BernoulliDecoder(MLP(Z, X)),
        torch.nn.Linear(Z, X),
        None,
    ],
    ids=["hidden", "no MLP", "Bernoulli", "no decoder", "None"],
)
def test_linear_gaussian_posterior_refuses_other_decoders(decoder: object) -> None:
    with pytest.raises(ValueError, match=r"decoder must be a GaussianDecoder .* affine"):
        LinearGaussianPosterior(decoder)


@pytest.mark.parametrize("shape", [(Z,), (3, Z), (2, 2, Z)])
def test_gaussian_encoder_says_which_output_it_needs(shape: tuple[int, ...]) -> None:
    network = MLP(X, shape)
    if shape == (2, 2, Z):  # two parameters are there, but the event has a dimension more
        assert GaussianEncoder(network)(torch.zeros(7, X)).batch_shape == (7, 2)
        return
    with pytest.raises(ValueError, match=r"network must have output of shape \(\.\.\., 2, z_dim\)"):
        GaussianEncoder(network)(torch.zeros(7, X))
