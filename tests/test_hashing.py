"""Binary codes against their closed forms, and what the losses of their pairs certify."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate, special, stats
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.functional import binary_cross_entropy_with_logits

import probae
from probae import (
    MLP,
    Autoencoder,
    BernoulliDecoder,
    BernoulliEncoder,
    BernoulliPrior,
    FlatPrior,
    Kind,
    NoisySigmoidEncoder,
    ProbitEncoder,
    StandardNormalPrior,
    ThresholdEncoder,
)
from probae.hashing import LogitNormal
from probae.terms import elbo_terms

X, K, N = 9, 6, 7
NOISE = 1.5

OBJECTIVES = {
    "Trace_ELBO": Trace_ELBO(),
    "Trace_ELBO of 3": Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "probae.ELBO": probae.ELBO(),
    "probae.ELBO of 3": probae.ELBO(num_particles=3),
}
IMPORTANCE = {
    "RenyiELBO of 1": RenyiELBO(alpha=0, num_particles=1),
    "RenyiELBO of 3": RenyiELBO(alpha=0, num_particles=3, vectorize_particles=True),
    "probae.IWAE of 3": probae.IWAE(3),
}


def bits(n: int = N) -> Tensor:
    return torch.rand(n, X, dtype=torch.float64).round()


def decoder() -> BernoulliDecoder:
    torch.manual_seed(3)
    return BernoulliDecoder(MLP(K, X, (5,), "tanh"))


def noisy(noise: float = NOISE, prior: nn.Module | None = None) -> Autoencoder:
    encoder = NoisySigmoidEncoder(MLP(X, K, (5,), "tanh"), noise)
    return Autoencoder(prior or FlatPrior(K), encoder, decoder()).double()


def binary(encoder: Callable[[MLP], nn.Module]) -> Autoencoder:
    torch.manual_seed(4)
    return Autoencoder(BernoulliPrior(K), encoder(MLP(X, K, (5,), "tanh")), decoder()).double()


def all_codes() -> Tensor:
    codes = list(itertools.product([0.0, 1.0], repeat=K))
    return torch.tensor(codes, dtype=torch.float64)  # (64, K)


# the noisy code


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 4.0, 30.0])
def test_mean_of_the_logit_normal_is_its_integral(scale: float) -> None:
    loc = torch.tensor([-200.0, -9.0, -2.0, -0.1, 0.0, 1.0, 5.0, 40.0], dtype=torch.float64)

    def integral(a: float) -> float:
        def integrand(n: float) -> float:
            return special.expit(a + scale * n) * stats.norm.pdf(n)

        # the integrand bends where a + s n = 0
        points = [p for p in (-a / scale, 0.0) if abs(p) < 12]
        return integrate.quad(integrand, -12, 12, points=points, limit=500, epsabs=1e-12)[0]

    expected = torch.tensor([integral(a) for a in loc.tolist()], dtype=torch.float64)
    mean = LogitNormal(loc, scale).mean
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(mean + LogitNormal(-loc, scale).mean, torch.ones_like(loc))


@pytest.mark.parametrize("scale", [0.3, 4.0, 30.0])
def test_mean_is_on_the_side_of_the_pre_activation(scale: float, dtype: torch.dtype) -> None:
    size = torch.logspace(-12, 30, 400, dtype=dtype)
    for loc, side in ((size, 1), (-size, -1)):
        mean = LogitNormal(loc, scale).mean
        assert (side * (mean - 0.5) >= 0).all()
        assert (side * (mean - 0.5) > 0)[size > 1e-4].all()
        assert ((mean >= 0) & (mean <= 1)).all()


def test_logit_normal_is_the_transformed_normal() -> None:
    loc = torch.randn(4, K, dtype=torch.float64)
    base = td.Normal(loc, NOISE)
    reference = td.TransformedDistribution(base, [td.transforms.SigmoidTransform()])
    q = LogitNormal(loc, NOISE)
    z = q.sample()
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z), rtol=0, atol=1e-12)
    wide = q.expand((3, 4, K))
    assert wide.rsample().shape == (3, 4, K)
    torch.testing.assert_close(wide.mean, q.mean.expand(3, 4, K), rtol=0, atol=1e-15)


def test_noisy_code_is_the_sigmoid_of_noisy_pre_activations() -> None:
    pair, x = noisy(noise=4.0), bits()
    a = pair.encoder.network(x)
    torch.manual_seed(5)
    z = pair.encoder(x).rsample()
    torch.manual_seed(5)
    expected = torch.sigmoid(a + 4.0 * torch.normal(torch.zeros_like(a), torch.ones_like(a)))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    assert torch.equal(pair.encoder(x).log_prob(z), torch.zeros(N))
    draws = pair.encoder(x).sample((20_000,))
    # the standard deviation of z is at most 1/2; 42 means, six standard errors: fails in 1e-7
    torch.testing.assert_close(
        pair.encoder(x).mean, draws.mean(0), rtol=0, atol=6 * 0.5 / 20_000**0.5
    )


@pytest.mark.parametrize("ratio", [-2.5, -1.0, -0.1, 0.0, 0.7, 2.0])
def test_bits_of_the_noisy_code_are_probit(ratio: float) -> None:
    # T31
    noise, draws = 4.0, 200_000
    a = torch.full((draws, 1), ratio * noise, dtype=torch.float64)
    probability = stats.norm.cdf(ratio)
    ones = (NoisySigmoidEncoder(nn.Identity(), noise)(a).sample() > 0.5).sum()
    sigma = math.sqrt(draws * probability * (1 - probability))
    assert abs(ones - draws * probability) < 5 * sigma  # fails once in 2 million
    gate = ProbitEncoder(nn.Identity(), noise)(a[:1]).mean
    assert gate.item() == pytest.approx(probability, rel=1e-13)


class Recorder(nn.Module):
    """A decoder that keeps the codes it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> td.Distribution:
        self.z = z
        return self.inner(z)


@pytest.mark.parametrize("name", [*OBJECTIVES, *IMPORTANCE])
def test_loss_is_the_expected_reconstruction_at_that_noise(name: str) -> None:
    # T1: no entropy, no prior; under importance weights log-mean-exp in place of the mean
    objective = {**OBJECTIVES, **IMPORTANCE}[name]
    pair, x = noisy(), bits()
    pair.decoder = Recorder(pair.decoder)
    parameters = list(pair.parameters())
    pair.zero_grad(set_to_none=True)
    loss = objective.loss_and_grads(pair.model, pair.guide, x)
    ours = [p.grad for p in parameters]
    z, a = pair.decoder.z.detach(), pair.encoder.network(x)
    n = ((torch.logit(z) - a) / NOISE).detach()  # the noise that was drawn, ([particles,] N, K)
    logits = pair.decoder.inner.network(torch.sigmoid(a + NOISE * n))
    target = x.expand(logits.shape)
    log_p = -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
    if name in IMPORTANCE:
        log_p = log_p.reshape(-1, N).logsumexp(0) - math.log(log_p.numel() / N)
    expected = -log_p.sum() / (log_p.numel() / N)
    gradients = torch.autograd.grad(expected, parameters)
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    for gradient, by_hand in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [*OBJECTIVES, *IMPORTANCE])
def test_saturated_codes_keep_losses_and_gradients_finite(name: str) -> None:
    objective = {**OBJECTIVES, **IMPORTANCE}[name]
    pair, x = noisy().float(), bits().float()
    with torch.no_grad():
        pair.encoder.network.output.weight.mul_(1e4)
    loss = objective.loss_and_grads(pair.model, pair.guide, x)
    assert math.isfinite(loss)
    assert all(p.grad.isfinite().all() for p in pair.parameters())


def test_noisy_pair_certifies_nothing_about_the_evidence() -> None:
    pair = noisy()
    assert pair.kind is Kind.CONDITIONAL
    run = probae.fit(pair, bits(20), epochs=2, progress=False)
    assert run.kind is Kind.CONDITIONAL
    assert run.history["kl"] == [0.0, 0.0]
    with pytest.raises(ValueError, match="prior is flat, so there is no p"):
        probae.log_likelihood(pair, bits())
    with_prior = noisy(prior=StandardNormalPrior(K))
    assert with_prior.kind is Kind.ENERGY  # log q is missing from its loss
    with pytest.raises(ValueError, match="needs an encoder with a density"):
        probae.log_likelihood(with_prior, bits(), "elbo")


def test_reconstruction_is_that_of_the_mean_code() -> None:
    pair, x = noisy(), bits()
    expected = pair.decoder(pair.encoder(x).mean).mean
    assert torch.equal(probae.reconstruct(pair, x).mean, expected)


def test_training_makes_the_codes_binary() -> None:
    data = probae.load_dataset("digits").train[:600].round()
    torch.manual_seed(0)
    network = MLP((1, 8, 8), 16, (64,))
    pair = Autoencoder(
        FlatPrior(16), NoisySigmoidEncoder(network), BernoulliDecoder(MLP(16, (1, 8, 8), (64,)))
    )
    pair.initialize(data)
    far = [share_beyond_noise(network, data)]
    run = probae.fit(pair, data, epochs=30, lr=3e-3, progress=False)
    far.append(share_beyond_noise(network, data))
    loss = run.history["loss"]
    assert loss[-1] < 0.8 * loss[0]
    assert far[0] < 0.01
    assert far[1] > 0.5
    # the bits that are stored say as much as the noisy codes they were trained on
    hard = Autoencoder(BernoulliPrior(16), ThresholdEncoder(network), pair.decoder)
    with torch.no_grad():
        reconstruction = hard.decoder(hard.encoder(data).mean).log_prob(data).mean().item()
    assert reconstruction > -loss[-1]


def share_beyond_noise(network: MLP, x: Tensor) -> float:
    with torch.no_grad():
        return float((network(x).abs() > 4.0).float().mean())


# the probit gate


def testprobit_logit_is_exact_and_its_gradient_finite(dtype: torch.dtype) -> None:
    t = torch.tensor([-37.0, -20.0, -5.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 9.0, 30.0], dtype=dtype)
    t.requires_grad_()
    logits = ProbitEncoder(nn.Identity(), noise=1.0)(t[None]).base_dist.logits[0]
    exact = t.detach().double().numpy()
    expected = special.log_ndtr(exact) - special.log_ndtr(-exact)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(logits.double(), torch.as_tensor(expected), rtol=rtol, atol=rtol)
    (gradient,) = torch.autograd.grad(logits.sum(), t)
    hazard = [math.exp(stats.norm.logpdf(u) - special.log_ndtr(u)) for u in (*exact, *-exact)]
    slope = torch.tensor(hazard, dtype=torch.float64).reshape(2, -1).sum(0)
    torch.testing.assert_close(gradient.double(), slope, rtol=100 * rtol, atol=0)
    far = torch.tensor([-1e15, -1e6, 1e6, 1e15], dtype=dtype, requires_grad=True)
    logits = ProbitEncoder(nn.Identity(), noise=1.0)(far[None]).base_dist.logits[0]
    (gradient,) = torch.autograd.grad(logits.sum(), far)
    torch.testing.assert_close(gradient, far.detach().abs(), rtol=1e-5, atol=0)


def test_probit_pair_is_an_elbo() -> None:
    pair, x = binary(lambda network: ProbitEncoder(network, NOISE)), bits()
    assert pair.kind is Kind.ELBO
    codes = all_codes()[:, None]  # (64, 1, K)
    log_q = pair.encoder(x).log_prob(codes.expand(-1, N, -1))  # (64, N)
    log_joint = pair.prior().log_prob(codes) + pair.decoder(codes).log_prob(x)
    elbo = (log_q.exp() * (log_joint - log_q)).sum(0)
    exact = probae.log_likelihood(pair, x, "exact").values
    torch.testing.assert_close(log_q.logsumexp(0).exp(), torch.ones(N).double())
    assert (elbo <= exact).all()
    # the KL of an ELBO is that of the closed form, its reconstruction an average over draws
    estimate = probae.log_likelihood(pair, x, "elbo", num_samples=2000)
    assert ((estimate.values - elbo).abs() < 6 * estimate.std_error).all()  # fails in 1e-8


def test_probit_without_noise_is_the_threshold() -> None:
    x = bits()
    hard = binary(ThresholdEncoder).encoder(x).mean
    soft = binary(lambda network: ProbitEncoder(network, 1e-9)).encoder(x).mean
    assert torch.equal(hard, soft)


# T33 and T32: binary codes in a proper model


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("encoder", [BernoulliEncoder, ProbitEncoder])
def test_kl_of_bits_is_the_missing_entropy(encoder: type[nn.Module], size: float) -> None:
    pair, x = binary(encoder), bits()
    with torch.no_grad():
        pair.encoder.network.output.weight.mul_(size)
    p = pair.encoder(x).mean
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    kl = elbo_terms(pair.model, pair.guide, x).kl[0]  # (N,)
    torch.testing.assert_close(kl, (math.log(2) - entropy).sum(-1), rtol=1e-10, atol=1e-10)
    assert ((kl >= 0) & (kl <= K * math.log(2) + 1e-12)).all()


def test_every_code_is_a_lower_bound() -> None:
    pair, x = binary(ThresholdEncoder), bits()
    exact = probae.log_likelihood(pair, x).values
    codes = all_codes()[:, None]
    log_joint = pair.decoder(codes).log_prob(x) - K * math.log(2)  # (64, N)
    assert (log_joint < exact).all()
    torch.testing.assert_close(log_joint.logsumexp(0), exact, rtol=0, atol=1e-10)


def test_hard_code_is_an_honest_bound() -> None:
    pair, x = binary(ThresholdEncoder), bits()
    assert pair.kind is Kind.DISCRETE_POINT
    hard = (pair.encoder.network(x) > 0).double()
    joint = pair.decoder(hard).log_prob(x) - K * math.log(2)
    bound = probae.log_likelihood(pair, x, "elbo")
    torch.testing.assert_close(bound.values, joint, rtol=0, atol=1e-10)
    assert bound.is_bound
    assert (bound.std_error < 1e-12).all()
    assert (bound.values < probae.log_likelihood(pair, x, "exact").values).all()
    for objective in OBJECTIVES.values():
        loss = objective.loss(pair.model, pair.guide, x)
        assert loss == pytest.approx(-joint.sum().item(), abs=1e-9)


def test_no_gradient_passes_a_threshold() -> None:
    pair, x = binary(ThresholdEncoder), bits()
    Trace_ELBO().differentiable_loss(pair.model, pair.guide, x).backward()
    assert all(p.grad is None for p in pair.encoder.parameters())
    assert all(p.grad is not None for p in pair.decoder.parameters())
    before = [p.clone() for p in pair.encoder.parameters()]
    probae.fit(pair, x, epochs=2, progress=False)
    assert all(map(torch.equal, pair.encoder.parameters(), before))


# bad input


@pytest.mark.parametrize("encoder", [NoisySigmoidEncoder, ProbitEncoder])
@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf, "4", None, True])
def test_bad_noise(encoder: type[nn.Module], noise: object) -> None:
    with pytest.raises(ValueError, match=r"noise must be a finite number > 0, got"):
        encoder(nn.Identity(), noise)


def test_noisy_codes_and_a_prior_over_bits_do_not_fit() -> None:
    with pytest.raises(ValueError, match="encoder is continuous but prior is discrete"):
        noisy(prior=BernoulliPrior(K))


def test_a_threshold_needs_no_prior_over_bits_but_then_bounds_nothing() -> None:
    pair = Autoencoder(FlatPrior(K), ThresholdEncoder(MLP(X, K)), decoder())
    assert pair.kind is Kind.RECONSTRUCTION
