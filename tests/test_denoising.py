"""Denoising as probability: Tweedie's identity, the three readings, and what each loss bounds."""

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import probae
from probae import BitFlip, GaussianNoise

DOUBLE = torch.float64
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.1, -1.1]], dtype=DOUBLE)
WIDTHS = torch.tensor([[0.25, 0.2], [0.2, 0.3], [0.3, 0.2]], dtype=DOUBLE)  # one for each axis
LOG_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE).log()


def log_density(x: Tensor, sigma: float) -> Tensor:
    """Log-density of the mixture smoothed by N(0, σ² I), written out."""
    variance = WIDTHS**2 + sigma**2
    square = (x[:, None] - MEANS) ** 2 / variance
    log_normal = -0.5 * (square + torch.log(2 * math.pi * variance)).sum(-1)
    return torch.logsumexp(LOG_WEIGHTS + log_normal, 1)


def true_score(x: Tensor, sigma: float) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(x, sigma).sum(), x)
    return gradient


def posterior_mean(x_tilde: Tensor, sigma: float) -> Tensor:
    """E[x|x_tilde] under the mixture, from the closed forms of the corruption."""
    noise, likelihood = GaussianNoise(sigma), dist.Normal(MEANS, WIDTHS).to_event(1)
    log_joint = LOG_WEIGHTS + noise.marginal(likelihood).log_prob(x_tilde[:, None])
    means = noise.posterior(likelihood, x_tilde[:, None]).mean  # (N, 3, 2)
    return torch.einsum("nc,ncd->nd", torch.softmax(log_joint, 1), means)


class Best(nn.Module):
    """A decoder whose mean is the best reconstruction of its code, E[x|x_tilde=z]."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(posterior_mean(z, self.sigma), 1.0).to_event(1)


def identity() -> probae.MLP:
    network = probae.MLP(2, 2)
    with torch.no_grad():
        network.output.weight.copy_(torch.eye(2))
    return network


# ---- the score ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.2, 0.4, 2.0])
def test_best_reconstruction_is_the_smoothed_score(sigma: float) -> None:
    x = 1.5 * torch.randn(200, 2, dtype=DOUBLE)
    tweedie = x + sigma**2 * true_score(x, sigma)
    torch.testing.assert_close(posterior_mean(x, sigma), tweedie, rtol=0, atol=1e-10)
    pair = probae.Autoencoder(
        probae.FlatPrior(2), probae.PointEncoder(identity()), Best(sigma), GaussianNoise(sigma)
    ).double()
    score = probae.score(pair, x)
    torch.testing.assert_close(score, true_score(x, sigma), rtol=0, atol=1e-10 / sigma**2)


def test_the_score_of_the_clean_density_is_a_limit_only() -> None:
    x = 1.5 * torch.randn(200, 2, dtype=DOUBLE)
    clean = true_score(x, 0.0)
    error = [(true_score(x, 0.4 / 2**k) - clean).abs().max().item() for k in range(9)]
    ratios = [a / b for a, b in itertools.pairwise(error)]
    assert all(3.8 < ratio < 4.2 for ratio in ratios[-3:])  # σ from 1/80, against widths .2 to .3
    assert ratios[0] < 2  # σ of .4 and .2: no such rate
    assert error[1] > 1  # and no score of p


# ---- reading (a): conditional, and (c): an amortised inverse of the corruption ------------------


def denoiser(sigma: float = 0.3) -> probae.Autoencoder:
    return probae.Autoencoder(
        probae.FlatPrior(4),
        probae.PointEncoder(probae.MLP(2, 4, (5,), "tanh")),
        probae.GaussianDecoder(probae.MLP(4, 2, (5,), "tanh"), scale=0.5, learn_scale=True),
        GaussianNoise(sigma),
    ).double()


@pytest.mark.parametrize("elbo", [Trace_ELBO, pyro.infer.TraceMeanField_ELBO, probae.ELBO])
def test_the_loss_is_the_conditional_likelihood_of_clean_given_corrupted(elbo: type) -> None:
    pair, x = denoiser(), torch.randn(7, 2, dtype=DOUBLE)
    pyro.set_rng_seed(3)
    x_tilde = pair.corruption(x).sample()
    pyro.set_rng_seed(3)  # so that the guide draws this very x_tilde
    loss = elbo().loss(pair.model, pair.guide, x)
    reconstruction = pair.decoder(pair.encoder(x_tilde).mean)
    expected = -reconstruction.log_prob(x).sum()
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    residual = ((x - reconstruction.mean) ** 2).sum() / (2 * 0.25)
    assert loss == pytest.approx((residual + 7 * math.log(2 * math.pi * 0.25)).item(), abs=1e-6)
    assert pair.kind is probae.Kind.CONDITIONAL


def test_the_loss_is_that_of_an_amortised_inverse() -> None:
    # E_{p(x) C(x_tilde|x)}[-log q(x|x_tilde)], q the decoder at the code: same value, same gradient
    pair, x = denoiser(), torch.randn(7, 2, dtype=DOUBLE)
    pyro.set_rng_seed(3)
    x_tilde = pair.corruption(x).sample()
    inverse = -pair.decoder(pair.encoder(x_tilde).mean).log_prob(x).sum()
    expected = torch.autograd.grad(inverse, list(pair.parameters()))
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, x)
    actual = torch.autograd.grad(loss, list(pair.parameters()))
    assert loss.item() == pytest.approx(inverse.item(), abs=1e-12)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    law = probae.denoise(pair, x_tilde)
    assert law.log_prob(x).sum().item() == pytest.approx(-inverse.item(), abs=1e-12)


def test_the_loss_is_at_least_the_conditional_entropy() -> None:
    # over eight equally likely vectors of bits: E loss >= H(X|X_tilde), equal at the posterior
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * 3)
    channel = BitFlip(0.2)(states[:, None].expand(8, 8, 3).reshape(64, 3))
    joint = channel.log_prob(states.repeat(8, 1)).exp().reshape(8, 8) / 8  # (x, x_tilde)
    entropy = -(joint * (joint / joint.sum(0)).log()).sum()
    pair = probae.Autoencoder(
        probae.FlatPrior(3),
        probae.PointEncoder(probae.MLP(3, 3)),
        probae.BernoulliDecoder(probae.MLP(3, 3)),
        BitFlip(0.2),
    ).double()

    def expected_loss() -> float:
        law = pair.decoder(pair.encoder(states).mean)  # at every x_tilde
        return -(joint * law.log_prob(states[:, None])).sum().item()

    assert expected_loss() > entropy.item()
    with torch.no_grad():  # the posterior of bits under a uniform law: logit ± log 4
        pair.encoder.network.output.weight.copy_(torch.eye(3))
        pair.encoder.network.output.bias.fill_(-0.5)
        pair.decoder.network.output.weight.copy_(2 * math.log(4) * torch.eye(3))
    assert expected_loss() == pytest.approx(entropy.item(), abs=1e-10)


# ---- the denoising VAE: x_tilde in both programs ------------------------------------------------


def bits_pair(probability: float) -> probae.Autoencoder:
    torch.manual_seed(4)
    pair = probae.Autoencoder(
        probae.CategoricalPrior(3),
        probae.CategoricalEncoder(probae.MLP(3, 3, (4,), "tanh")),
        probae.BernoulliDecoder(probae.MLP(3, 3)),
        BitFlip(probability),
    ).double()
    with torch.no_grad():  # away from the symmetric start
        for parameter in pair.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pair


@pytest.mark.parametrize("probability", [0.02, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("bits", [(0.0, 0.0, 0.0), (1.0, 0.0, 1.0)])
def test_the_corrupted_bound_is_looser_by_the_mutual_information(
    probability: float, bits: tuple[float, ...]
) -> None:
    pair, x = bits_pair(probability), torch.tensor([bits], dtype=DOUBLE)
    corrupted = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * 3)
    x_tilde = corrupted.repeat_interleave(3, 0)  # (8 · 3, 3): every x_tilde with every z
    z = torch.eye(3, dtype=DOUBLE).repeat(8, 1)
    sites = {}
    for name, program in (("model", pair.model), ("guide", pair.guide)):
        conditioned = poutine.condition(program, {"x_tilde": x_tilde, "z": z})
        trace = poutine.trace(conditioned).get_trace(x.expand(24, 3))
        trace.compute_log_prob()
        sites[name] = {
            site: trace.nodes[site]["log_prob"].detach().reshape(8, 3)
            for site in ("x_tilde", "z", "x")
            if site in trace.nodes
        }
    log_joint = (sites["model"]["z"] + sites["model"]["x"])[0]  # log p(x, z), (3,)
    channel = sites["guide"]["x_tilde"][:, 0].exp()  # C(x_tilde|x), (8,)
    log_q = sites["guide"]["z"]  # log q(z|x_tilde), (8, 3)
    assert channel.sum().item() == pytest.approx(1, abs=1e-12)
    law = channel[:, None] * log_q.exp()  # of the guide, (8, 3)
    log_model = sum(sites["model"].values())
    dvae = (law * (log_model - sum(sites["guide"].values()))).sum()
    mixed = law.sum(0)  # q~(z|x)
    cvae = (mixed * (log_joint - mixed.log())).sum()
    information = (law * (log_q - mixed.log())).sum()  # I(z; x_tilde | x)
    log_p = probae.log_likelihood(pair, x, "exact").values[0].item()
    assert (cvae - dvae).item() == pytest.approx(information.item(), abs=1e-10)
    assert information > 1e-6
    assert dvae < cvae < log_p
    # the gap to log p is E KL(q(z|x_tilde) || p(z|x))
    log_posterior = log_joint - log_joint.logsumexp(0)
    divergence = (law * (log_q - log_posterior)).sum()
    assert log_p - dvae.item() == pytest.approx(divergence.item(), abs=1e-10)


def test_svi_on_a_linear_gaussian_denoising_vae_is_the_closed_form() -> None:
    sigma, scale, spread = 0.4, 0.6, 0.5
    x = torch.randn(3, 5, dtype=DOUBLE)
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(2),
        probae.GaussianEncoder(probae.MLP(5, (2, 2))),
        probae.GaussianDecoder(probae.MLP(2, 5), scale=scale),
        GaussianNoise(sigma),
    ).double()
    output = pair.encoder.network.output
    with torch.no_grad():
        output.weight[2:] = 0.0
        output.bias[2:] = math.log(math.expm1(spread - 1e-6))
    v, c = output.weight[:2].detach(), output.bias[:2].detach()
    w, b, _ = (t.detach() for t in pair.decoder.affine())
    mean = x @ v.T + c  # of z given x, over noise and guide
    covariance = sigma**2 * v @ v.T + spread**2 * torch.eye(2, dtype=DOUBLE)
    residual = ((x - b - mean @ w.T) ** 2).sum(1) + (w @ covariance @ w.T).trace()
    closed = (
        -residual / (2 * scale**2)
        - 2.5 * math.log(2 * math.pi * scale**2)
        - 0.5 * ((mean**2).sum(1) + covariance.trace())
        - math.log(2 * math.pi)
        + math.log(2 * math.pi * math.e * spread**2)  # entropy of q, k = 2
    ).sum()
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({}), elbo)
    losses = torch.tensor([svi.evaluate_loss(x) for _ in range(40)], dtype=DOUBLE)
    std_error = losses.std() / math.sqrt(len(losses))
    # Student's t with 39 degrees of freedom beyond 6.5: one seed in ten million
    assert abs(losses.mean() + closed) < 6.5 * std_error
    assert std_error < 0.01 * abs(closed)
    exact = probae.log_likelihood(pair, x, "exact").values.sum()
    assert closed < exact


# ---- generative stochastic networks -------------------------------------------------------------


def chain(reverse: Tensor, channel: Tensor) -> Tensor:
    """Transition matrix x -> x_tilde -> x'."""
    return channel @ reverse


@pytest.mark.parametrize("corruption", [BitFlip(0.2), BitFlip(0.1, 0.3), probae.SaltAndPepper(0.4)])
def test_a_chain_of_corruption_and_denoising_samples_the_data(corruption: Any) -> None:
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * 3)
    x = bits[:6]  # the data live on six of the eight vectors
    p = torch.tensor([0.3, 0.05, 0.2, 0.15, 0.1, 0.2], dtype=DOUBLE)
    law = corruption(x[:, None].expand(6, 8, 3).reshape(48, 3))
    channel = law.log_prob(bits.repeat(6, 1)).exp().reshape(6, 8)
    joint = p[:, None] * channel
    posterior = (joint / joint.sum(0)).T  # (8, 6)
    transition = chain(posterior, channel)
    flow = p[:, None] * transition
    assert (transition.sum(1) - 1).abs().max() < 1e-14
    assert (p @ transition - p).abs().max() < 1e-14
    assert (flow - flow.T).abs().max() < 1e-14  # detailed balance
    values = torch.linalg.eigvals(transition).abs().sort().values
    assert values[-2] < 1 - 1e-3  # no other stationary law: the corruption reaches everything
    wrong = 0.9 * posterior + 0.1 / 6
    power = torch.linalg.matrix_power(chain(wrong, channel), 200)
    assert 1e-3 < 0.5 * (power[0] - p).abs().sum() < 0.3  # an imperfect denoiser moves the law
