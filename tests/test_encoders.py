"""Encoders against the distributions they are named after."""

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.functional import softplus

import probae
from probae import (
    MLP,
    BernoulliDecoder,
    BernoulliEncoder,
    CategoricalEncoder,
    ConditionalBernoulliEncoder,
    GaussianDecoder,
    GaussianEncoder,
    JumpReLUEncoder,
    LaplaceEncoder,
    LinearGaussianPosterior,
    LogNormalEncoder,
    NoisyGateEncoder,
    PointEncoder,
    SpikeAndSlabEncoder,
    SpikeAndSlabPrior,
    SubsetPrior,
    TopKEncoder,
)
from probae.distributions import is_point
from probae.sparse import top_k

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


# sparse encoders


@pytest.mark.parametrize(
    ("build", "family"), [(LaplaceEncoder, td.Laplace), (LogNormalEncoder, td.LogNormal)]
)
def test_location_and_scale_encoders(
    build: type[probae.Part], family: Callable[..., td.Distribution], x: Tensor
) -> None:
    encoder = build(MLP(X, (2, Z), (4,)), scale_min=0.1).double()
    loc, scale = encoder.network(x).unbind(-2)
    reference = td.Independent(family(loc, softplus(scale) + 0.1), 1)
    z = encoder(x).sample()
    torch.testing.assert_close(encoder(x).log_prob(z), reference.log_prob(z), rtol=0, atol=1e-12)
    assert encoder(x).has_rsample
    with pytest.raises(ValueError, match=r"network must have output of shape \(\.\.\., 2, z_dim\)"):
        build(MLP(X, Z))(torch.zeros(7, X))
    with pytest.raises(ValueError, match=r"scale_min must be a finite number > 0, got 0"):
        build(MLP(X, (2, Z)), 0)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_gated_encoders(k: int | None, x: Tensor) -> None:
    network = MLP(X, (3, Z), (4,))
    build = SpikeAndSlabEncoder if k is None else lambda n: ConditionalBernoulliEncoder(n, k)
    q = build(network).double()(x)
    logits, loc, scale = network(x).unbind(-2)
    z = q.sample()
    on = (z != 0).double()
    gates = td.Bernoulli(logits=logits).log_prob(on).sum(-1)
    if k is not None:  # every draw has k ones, and their weights sum to that of one draw
        assert (on.sum(-1) == k).all()
        weights = torch.stack([s @ logits.T for s in q.gate.enumerate_support(False)[:, 0]])
        gates = (on * logits).sum(-1) - weights.logsumexp(0)
    slab = on * td.Normal(loc, softplus(scale) + 1e-6).log_prob(z)
    torch.testing.assert_close(q.log_prob(z), gates + slab.sum(-1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"network must have output of shape \(\.\.\., 3, z_dim\)"):
        build(MLP(X, (2, Z)))(torch.zeros(7, X))


def test_conditional_bernoulli_encoder_errors() -> None:
    with pytest.raises(ValueError, match=r"num_active must be an int >= 1, got 0"):
        ConditionalBernoulliEncoder(MLP(X, (3, Z)), 0)
    with pytest.raises(ValueError, match=r"k must be at most the number of units.* k=4"):
        ConditionalBernoulliEncoder(MLP(X, (3, Z)), 4)(torch.zeros(7, X))


KERNELS = {  # density K and distribution function F of the noise of a threshold
    "rectangle": (lambda u: (u.abs() <= 0.5).double(), lambda u: (u + 0.5).clamp(0, 1)),
    "logistic": (lambda u: torch.sigmoid(u) * torch.sigmoid(-u), torch.sigmoid),
    "gaussian": (
        lambda u: (-0.5 * u**2).exp() / math.sqrt(2 * math.pi),
        lambda u: 0.5 * torch.erfc(-u / math.sqrt(2)),
    ),
}


def gradient_of_thresholds(encoder: probae.Part, value: Tensor) -> Tensor:
    """d value / d θ, from that with respect to log θ."""
    (gradient,) = torch.autograd.grad(value, encoder.log_threshold, retain_graph=True)
    return gradient / encoder.log_threshold.exp()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bandwidth", [0.05, 0.7])
def test_expected_l0_of_a_noisy_gate_has_the_jumprelu_derivative(
    kernel: str, bandwidth: float
) -> None:
    a = 0.3 + 0.8 * bandwidth * torch.randn(200, 4, dtype=torch.float64)
    encoder = NoisyGateEncoder(nn.Identity(), 4, 0.3, bandwidth, kernel).double()
    u = (a - encoder.log_threshold.exp()) / bandwidth
    density, distribution = KERNELS[kernel]
    probabilities = encoder(a).gate.mean
    torch.testing.assert_close(probabilities, distribution(u), rtol=0, atol=1e-12)
    actual = gradient_of_thresholds(encoder, probabilities.sum())
    torch.testing.assert_close(actual, -density(u).sum(0) / bandwidth, rtol=1e-8, atol=1e-8)
    for row in range(3):  # one by one, too: a sum may hide a sign
        actual = gradient_of_thresholds(encoder, probabilities[row].sum())
        torch.testing.assert_close(actual, -density(u[row]) / bandwidth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_jumprelu_is_the_paper_s(kernel: str) -> None:
    bandwidth, weight = 0.7, torch.randn(4, dtype=torch.float64)
    a = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    encoder = JumpReLUEncoder(nn.Identity(), 4, 0.3, bandwidth, kernel, rate=2.5).double()
    theta = encoder.log_threshold.exp().detach()
    q = encoder(a)
    z = q.rsample()
    expected = torch.where(a > theta, a, 0.0)
    assert torch.equal(z, expected)
    assert torch.equal(q.log_prob(z), torch.zeros(50, dtype=torch.float64))
    assert is_point(q)
    u, density = (a - theta) / bandwidth, KERNELS[kernel][0]
    steps = -theta / bandwidth * density(u)  # pseudo-derivative of z
    actual = gradient_of_thresholds(encoder, (z * weight).sum())
    torch.testing.assert_close(actual, (steps * weight).sum(0), rtol=1e-8, atol=1e-8)
    (actual,) = torch.autograd.grad((z * weight).sum(), a, retain_graph=True)
    torch.testing.assert_close(actual, (a > theta) * weight, rtol=0, atol=0)
    price = gradient_of_thresholds(encoder, q.log_prob(z).sum())
    torch.testing.assert_close(price, -2.5 * density(u).sum(0) / bandwidth, rtol=1e-8, atol=1e-8)
    plain = JumpReLUEncoder(nn.Identity(), 4, 0.3, bandwidth, kernel).double()(a)
    assert not plain.log_prob(plain.sample()).requires_grad


@pytest.mark.parametrize("slab_scale", [None, 0.2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noisy_gate_is_finite_where_gates_are_certain(
    kernel: str, slab_scale: float | None, dtype: torch.dtype
) -> None:
    a = torch.tensor([[-50.0, -0.2, 0.1, 0.15, 50.0]], dtype=dtype, requires_grad=True)
    encoder = NoisyGateEncoder(nn.Identity(), 5, 0.1, 0.1, kernel, slab_scale).to(dtype)
    q = encoder(a.expand(300, 5))
    z = q.sample()
    assert (z[:, 0] == 0).all()
    assert (z[:, 4] != 0).all()
    inputs = [a, encoder.log_threshold]
    parts = q.score_parts(z)
    for term in (parts.log_prob.sum(), parts.score_function.sum(), q.gate.mean.sum()):
        assert term.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(term, inputs, retain_graph=True))
    prior = SpikeAndSlabPrior(5, 1.0, None).to(dtype)().expand((300,))
    kl = td.kl_divergence(q.gate, prior.gate).sum()
    assert kl.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(kl, inputs))


def test_noisy_gate_values() -> None:
    a = torch.randn(2000, 3, dtype=torch.float64)
    point = NoisyGateEncoder(nn.Identity(), 3, slab_scale=None).double()(a)
    z = point.sample()
    assert torch.equal(z[z != 0], a[z != 0])
    assert is_point(point)
    scale = NoisyGateEncoder(nn.Identity(), 3, slab_scale=0.2).double()(a).slab.scale
    assert torch.equal(scale, torch.full_like(a, 0.2))
    learned = NoisyGateEncoder(nn.Identity(), 3, slab_scale=0.2, learn_scale=True)
    assert learned.log_scale.exp().tolist() == pytest.approx([0.2] * 3)
    assert torch.allclose(learned(a.float()).slab.scale, torch.tensor(0.2))
    torch.nn.init.constant_(learned.log_scale, -1e4)  # whose exponential is 0
    assert learned(a.float()).slab.scale.unique().item() == pytest.approx(1e-6)


def test_gate_encoders_refuse_settings_that_mean_nothing() -> None:
    for build in (NoisyGateEncoder, JumpReLUEncoder):
        for name in ("threshold", "bandwidth"):
            with pytest.raises(ValueError, match=rf"{name} must be a finite number > 0, got 0"):
                build(nn.Identity(), 3, **{name: 0})
        with pytest.raises(ValueError, match=r"kernel must be one of rectangle, .* got 'box'"):
            build(nn.Identity(), 3, kernel="box")
        with pytest.raises(ValueError, match=r"z_dim must be an int >= 1, got 0"):
            build(nn.Identity(), 0)
        with pytest.raises(ValueError, match=r"network must have output of shape \(\.\.\., 3\)"):
            build(nn.Identity(), 3)(torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"slab_scale must be a finite number > 0, got -1"):
        NoisyGateEncoder(nn.Identity(), 3, slab_scale=-1)
    with pytest.raises(ValueError, match=r"learn_scale=True needs a slab_scale"):
        NoisyGateEncoder(nn.Identity(), 3, slab_scale=None, learn_scale=True)
    with pytest.raises(ValueError, match=r"rate must be a finite number > 0, got 0"):
        JumpReLUEncoder(nn.Identity(), 3, rate=0)


@pytest.mark.parametrize("positive", [True, False])
def test_topk_encoder(positive: bool, x: Tensor) -> None:
    encoder = TopKEncoder(MLP(X, Z, (4,)), 2, positive).double()
    z = encoder(x).sample()
    assert torch.equal(z, top_k(encoder.network(x), 2, positive))
    assert ((z != 0).sum(-1) == 2).all()
    assert not positive or (z >= 0).all()
    assert is_point(encoder(x))
    with pytest.raises(ValueError, match=r"num_active must be at most z_dim, 3, got 4"):
        TopKEncoder(MLP(X, Z), 4)(torch.zeros(7, X))
    with pytest.raises(ValueError, match=r"num_active must be an int >= 1, got 0"):
        TopKEncoder(MLP(X, Z), 0)


SPARSE_PAIRS: dict[str, Callable[[], tuple[probae.Part, probae.Part]]] = {
    "laplace": lambda: (probae.LaplacePrior(Z, 0.5), LaplaceEncoder(MLP(X, (2, Z)))),
    "laplace-learned": lambda: (
        probae.LaplacePrior(Z, learn_rate=True),
        LaplaceEncoder(MLP(X, (2, Z))),
    ),
    "gaussian-laplace": lambda: (probae.LaplacePrior(Z), GaussianEncoder(MLP(X, (2, Z)))),
    "student-t": lambda: (probae.StudentTPrior(Z), GaussianEncoder(MLP(X, (2, Z)))),
    "exponential": lambda: (probae.ExponentialPrior(Z), LogNormalEncoder(MLP(X, (2, Z)))),
    "spike-and-slab": lambda: (SpikeAndSlabPrior(Z), SpikeAndSlabEncoder(MLP(X, (3, Z)))),
    "subset": lambda: (SubsetPrior(Z, 2), ConditionalBernoulliEncoder(MLP(X, (3, Z)), 2)),
    "subset-bits": lambda: (
        SpikeAndSlabPrior(Z),
        ConditionalBernoulliEncoder(MLP(X, (3, Z)), 2),
    ),
    **{
        f"noisy-gate-{kernel}": lambda kernel=kernel: (
            SpikeAndSlabPrior(Z),
            NoisyGateEncoder(MLP(X, Z), Z, 0.1, 1.0, kernel, learn_scale=True),
        )
        for kernel in KERNELS
    },
    "noisy-gate-point": lambda: (
        SpikeAndSlabPrior(Z, slab_scale=None),
        NoisyGateEncoder(MLP(X, Z), Z, 0.1, 1.0, slab_scale=None),
    ),
    "jumprelu": lambda: (
        SpikeAndSlabPrior(Z, slab_scale=None),
        JumpReLUEncoder(MLP(X, Z), Z, 0.1, 1.0, rate=1.0),
    ),
    "topk": lambda: (SubsetPrior(Z, 2, slab_scale=None), TopKEncoder(MLP(X, Z), 2)),
    "relu-topk": lambda: (SubsetPrior(Z, 2, slab_scale=None), TopKEncoder(MLP(X, Z), 2, True)),
}


@pytest.mark.parametrize("name", SPARSE_PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_pairs_train_every_parameter(name: str, dtype: torch.dtype) -> None:
    prior, encoder = SPARSE_PAIRS[name]()
    decoder = GaussianDecoder(MLP(Z, X), learn_scale=True)
    pair = probae.Autoencoder(prior, encoder, decoder).to(dtype)
    x = torch.randn(64, X, dtype=dtype)
    before = {key: p.clone() for key, p in pair.named_parameters()}
    optimizer = pyro.optim.Adam({"lr": 1e-2})
    svi = pyro.infer.SVI(pair.model, pair.guide, optimizer, pyro.infer.Trace_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(5))
    pair.zero_grad()
    svi.loss_and_grads(pair.model, pair.guide, x)
    for key, parameter in pair.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert (parameter.grad != 0).any(), key
        assert not torch.equal(parameter, before[key]), key


def test_jumprelu_and_topk_losses_are_the_published_ones() -> None:
    rate, size, x = 1.7, 6, torch.randn(20, X, dtype=torch.float64)
    network, decoder = MLP(X, size), GaussianDecoder(MLP(size, X), scale=math.sqrt(0.5))
    jump = JumpReLUEncoder(network, size, 0.2, 0.5, rate=rate)
    pairs = [
        (SpikeAndSlabPrior(size, rate, slab_scale=None), jump),
        (SubsetPrior(size, 2, slab_scale=None), TopKEncoder(network, 2, positive=True)),
    ]
    constant = X / 2 * math.log(math.pi)
    for prior, encoder in pairs:
        pair = probae.Autoencoder(prior.double(), encoder.double(), decoder.double())
        z = pair.encoder(x).sample()
        error = (x - pair.decoder(z).mean).square().sum(-1)
        price = rate * (z != 0).double().sum(-1) + size * math.log1p(math.exp(-rate))
        if encoder is not jump:
            price = torch.full((20,), math.log(math.comb(size, 2)), dtype=torch.float64)
        loss = pyro.infer.Trace_ELBO().differentiable_loss(pair.model, pair.guide, x)
        assert loss.item() == pytest.approx((error + price + constant).sum().item(), abs=1e-9)
        if encoder is jump:  # the paper's pseudo-gradient of the whole loss
            theta = jump.log_threshold.exp()
            code = z.detach().requires_grad_()
            residual = (x - pair.decoder(code).mean).square().sum()
            (pull,) = torch.autograd.grad(residual, code)
            density = (((network(x) - theta) / 0.5).abs() <= 0.5).double()
            expected = (-(density / 0.5) * (theta * pull + rate)).sum(0)
            actual = gradient_of_thresholds(jump, loss)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slab_scale", [None, 0.3, 1.0, 3.0])
def test_threshold_of_jump_relu_learns_at_the_price_of_its_prior(
    slab_scale: float | None,
) -> None:
    # a uniform on [0, 2]: the mean of -log p(z) falls by the price of one entry at θ, times the
    # density ½ there, and the kernel lies within, so that the pseudo-gradient is exact
    theta, rate = 0.7, 0.9
    a = torch.linspace(0, 2, 400_001, dtype=torch.float64)[:, None]
    encoder = probae.JumpReLUEncoder(
        nn.Identity(), 1, threshold=theta, bandwidth=0.2, rate=rate, slab_scale=slab_scale
    ).double()
    prior = probae.SpikeAndSlabPrior(1, rate, slab_scale=slab_scale).double()
    code = encoder(a)
    loss = (code.log_prob(code.mean.detach()) - prior().log_prob(code.mean)).mean()
    (gradient,) = torch.autograd.grad(loss, encoder.log_threshold)
    price = rate
    if slab_scale is not None:
        price += 0.5 * math.log(2 * math.pi * slab_scale**2) + theta**2 / (2 * slab_scale**2)
    # to z's change within the kernel, of order its width over that of the slab
    tolerance = 1e-4 if slab_scale is None else 0.02 * (0.2 / slab_scale) ** 2 + 1e-4
    assert float(gradient) / theta == pytest.approx(-price / 2, abs=tolerance)


def test_every_objective_trains_thresholds_alike() -> None:
    pair = probae.SparseAutoencoder(6, 4, prior="spike-and-slab", slab_scale=None)
    x = torch.randn(10, 6)
    gradients = []
    for objective in (Trace_ELBO(), TraceMeanField_ELBO(), probae.ELBO()):
        pair.zero_grad()
        objective.differentiable_loss(pair.model, pair.guide, x).backward()
        gradients.append([p.grad.clone() for p in pair.parameters()])
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
