"""Sampling from the model, reconstruction, denoising, and the score of the data."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import probae


def test_samples_follow_the_model() -> None:
    torch.manual_seed(0)
    pair = probae.PPCA(3, 1).double()
    pair.set_parameters(torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([1.0, 0.0, -1.0]), 0.5)
    x, z = probae.sample(pair, 100_000, seed=0)
    assert x.shape == (100_000, 3)
    assert z.shape == (100_000, 1)
    expected = torch.tensor([[1.25, 2.0, 0.0], [2.0, 4.25, 0.0], [0.0, 0.0, 0.25]]).double()
    std_error = 4.25 * (2 / 100_000) ** 0.5
    assert torch.allclose(torch.cov(x.T), expected, atol=5 * std_error)
    assert torch.allclose(x.mean(0), torch.tensor([1.0, 0.0, -1.0]).double(), atol=0.05)


def test_seed_fixes_the_draw_and_none_advances_the_global_stream() -> None:
    pair = probae.VAE(8, 2)
    assert torch.equal(probae.sample(pair, 4, seed=1).x, probae.sample(pair, 4, seed=1).x)
    torch.manual_seed(0)
    first, second = probae.sample(pair, 4), probae.sample(pair, 4)
    assert not torch.equal(first.z, second.z)
    torch.manual_seed(0)
    assert torch.equal(probae.sample(pair, 4).z, first.z)


@pytest.mark.parametrize("prior", ["normal", "laplace", "mixture", "vamp", "flow"])
def test_every_proper_prior_can_be_sampled(prior: str) -> None:
    x, z = probae.sample(probae.VAE((1, 4, 4), 3, prior=prior), 5)
    assert x.shape == (5, 1, 4, 4)
    assert z.shape == (5, 3)
    assert not x.requires_grad


def test_reconstruction_is_the_decoder_at_the_mean_code() -> None:
    pair, x = probae.VAE(8, 2), torch.rand(5, 8)
    reconstruction = probae.reconstruct(pair, x)
    expected = pair.decoder(pair.encoder(x).mean).mean
    assert torch.equal(reconstruction.mean, expected)
    assert reconstruction.log_prob(x.round()).shape == (5,)


def test_nothing_is_drawn_from_a_flat_prior() -> None:
    with pytest.raises(ValueError, match="flat prior"):
        probae.sample(probae.UndercompleteAutoencoder(8, 2), 4)


# ---- denoising ----------------------------------------------------------------------------------

DOUBLE = torch.float64


def ppca() -> probae.PPCA:
    pair = probae.PPCA(3, 2).double()
    weight = torch.tensor([[1.0, 0.3], [0.5, -1.0], [0.2, 0.4]], dtype=DOUBLE)
    pair.set_parameters(weight, torch.tensor([1.0, 0.0, -1.0], dtype=DOUBLE), 0.5)
    return pair


def noisy_posterior(pair: probae.PPCA, sigma: float) -> probae.LinearGaussianPosterior:
    """Encoder p(z|x_tilde) of the pair under Gaussian noise, exact."""
    affine = pair.decoder.affine()
    assert affine is not None
    decoder = probae.GaussianDecoder(probae.MLP(2, 3), scale=math.hypot(0.5, sigma)).double()
    with torch.no_grad():
        decoder.network.output.weight.copy_(affine[0])
        decoder.network.output.bias.copy_(affine[1])
    return probae.LinearGaussianPosterior(decoder)


def test_denoising_a_linear_gaussian_is_exact() -> None:
    pair, sigma, samples = ppca(), 0.7, 20_000
    x_tilde = torch.randn(4, 3, dtype=DOUBLE)
    weight, mean, scale = (t.detach() for t in pair.decoder.affine())
    clean = weight @ weight.T + scale**2 * torch.eye(3, dtype=DOUBLE)
    gain = clean @ torch.linalg.inv(clean + sigma**2 * torch.eye(3, dtype=DOUBLE))
    exact = dist.MultivariateNormal(mean + (x_tilde - mean) @ gain.T, clean - gain @ clean)
    law = probae.denoise(
        pair,
        x_tilde,
        probae.GaussianNoise(sigma),
        num_samples=samples,
        proposal=noisy_posterior(pair, sigma),
    )
    assert (law.batch_shape, law.event_shape) == ((4,), (3,))
    weights = law.mixture_distribution.probs
    assert torch.allclose(weights, torch.full_like(weights, 1 / samples), rtol=1e-8)
    # 5 standard errors of each of 12 means: fails for one seed in 100 000
    std_error = law.component_distribution.mean.std(1) / math.sqrt(samples)
    assert ((law.mean - exact.mean).abs() < 5 * std_error).all()
    x = exact.sample()
    ratio = (law.component_distribution.log_prob(x[:, None]) - exact.log_prob(x)[:, None]).exp()
    assert ((ratio.mean(1) - 1).abs() < 5 * ratio.std(1) / math.sqrt(samples)).all()
    assert (law.log_prob(x) - exact.log_prob(x)).abs().max() < 0.1
    draws = law.sample((100,))
    spread = exact.variance.sqrt() / math.sqrt(100)
    assert ((draws.mean(0) - exact.mean).abs() < 6 * spread).all()


def one_code(likelihood: str, **options: float) -> probae.VAE:
    torch.manual_seed(5)
    pair = probae.VAE(
        3, 1, hidden=(6,), activation="tanh", likelihood=likelihood, likelihood_options=options
    ).double()
    with torch.no_grad():
        for parameter in pair.decoder.parameters():
            parameter.mul_(2)
    return pair


DENOISED = {
    "bit-flip": ("bernoulli", probae.BitFlip(0.1, 0.2), [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    "salt": ("bernoulli", probae.SaltAndPepper(0.3), [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
    "mask": ("bernoulli", probae.Masking(0.3), [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    "noise": ("gaussian", probae.GaussianNoise(0.8), [[0.5, -1.0, 0.2], [2.0, 0.0, 1.0]]),
    "thinned": ("poisson", probae.PoissonThinning(0.4), [[0.0, 2.0, 1.0], [1.0, 0.0, 4.0]]),
    "missing": (
        "gaussian",
        probae.Masking(0.3, known=True),
        [[[0.5, -1.0, 0.0], [1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]],
    ),
}


@pytest.mark.parametrize("name", DENOISED)
def test_denoising_is_bayes_rule(name: str) -> None:
    # the integral over a one-dimensional code, on a grid
    likelihood, corruption, values = DENOISED[name]
    pair, x_tilde = one_code(likelihood), torch.tensor(values, dtype=DOUBLE)
    grid = torch.linspace(-8, 8, 2001, dtype=DOUBLE)[:, None]
    with torch.no_grad():
        clean = pair.decoder(grid)
        log_joint = pair.prior().log_prob(grid) + corruption.marginal(clean).log_prob(
            x_tilde[:, None]
        )
        exact = torch.softmax(log_joint, 1)
        means = corruption.posterior(clean, x_tilde[:, None]).mean
        expected = torch.einsum("nk,nkd->nd", exact, means)
    law = probae.denoise(pair, x_tilde, corruption, num_samples=20_000)
    weights = law.mixture_distribution.probs  # (N, K)
    error = law.component_distribution.mean - law.mean[:, None]
    std_error = ((weights[..., None] * error) ** 2).sum(1).sqrt()
    # six self-normalised estimates, 5 standard errors each: fails for one seed in 100 000
    assert ((law.mean - expected).abs() <= 5 * std_error + 1e-9).all()
    assert std_error.max() < 0.05
    assert law.log_prob(law.sample()).isfinite().all()
    if name == "missing":
        seen = x_tilde[:, 1] == 1
        assert torch.equal(law.sample()[seen], x_tilde[:, 0][seen])
        torch.testing.assert_close(law.mean[seen], x_tilde[:, 0][seen], rtol=0, atol=1e-12)


def test_denoising_where_the_pair_has_the_corruption() -> None:
    corruption, code = probae.Masking(0.3, known=True), probae.StandardNormalPrior(2)
    decoder = probae.BernoulliDecoder(probae.MLP(2, 5))
    encoder = probae.GaussianEncoder(probae.MLP((2, 5), (2, 2)))
    x = torch.rand(7, 5).round()
    x_tilde = corruption(x).sample()
    through = probae.Autoencoder(code, encoder, probae.CorruptedDecoder(decoder, corruption))
    within = probae.Autoencoder(code, encoder, decoder, corruption)
    laws = [probae.denoise(pair, x_tilde) for pair in (through, within)]
    assert torch.equal(laws[0].mean, laws[1].mean)  # one generative model, one proposal
    assert laws[0].event_shape == (5,)
    seen = x_tilde[:, 1] == 1
    assert torch.equal(laws[0].sample()[seen], x[seen])
    torch.testing.assert_close(laws[0].mean[seen], x[seen])
    twin = probae.denoise(within, x_tilde, probae.Masking(0.3, known=True))
    assert torch.equal(twin.mean, laws[1].mean)
    assert probae.reconstruct(within, x).mean.shape == (7, 5)  # the encoder sees a mask of ones


def test_a_trained_denoiser_is_its_decoder_at_the_code() -> None:
    pair = probae.Autoencoder(
        probae.FlatPrior(2),
        probae.PointEncoder(probae.MLP(5, 2)),
        probae.BernoulliDecoder(probae.MLP(2, 5)),
        probae.SaltAndPepper(0.3),
    )
    x_tilde = torch.rand(7, 5)
    for corruption in (None, pair.corruption, probae.SaltAndPepper(0.3)):
        law = probae.denoise(pair, x_tilde, corruption)
        expected = pair.decoder(pair.encoder(x_tilde).mean)
        assert torch.equal(law.mean, expected.mean)
        assert not law.mean.requires_grad


class MaskedGaussian(probae.GaussianEncoder):
    """A stochastic encoder whose density does not enter the loss."""

    def forward(self, x: Tensor) -> dist.Distribution:
        return super().forward(x).mask(False)


def test_a_trained_denoiser_with_a_noisy_code_is_a_mixture() -> None:
    pair = probae.Autoencoder(
        probae.FlatPrior(2),
        MaskedGaussian(probae.MLP(5, (2, 2))),
        probae.GaussianDecoder(probae.MLP(2, 5)),
        probae.GaussianNoise(0.3),
    )
    assert pair.kind is probae.Kind.CONDITIONAL
    law = probae.denoise(pair, torch.randn(7, 5), num_samples=20)
    assert law.component_distribution.batch_shape == (7, 20)
    assert torch.allclose(law.mean, law.component_distribution.mean.mean(1), atol=1e-6)


def test_a_denoiser_of_known_masks_takes_what_stack_missing_makes() -> None:
    x = torch.randn(3, 8)
    x[0, :3] = math.nan
    assert probae.denoise(masked_dae(), probae.stack_missing(x)).mean.shape == (3, 8)


@pytest.mark.parametrize("likelihood", ["gaussian", "heteroscedastic-gaussian"])
def test_gaussian_likelihoods_have_a_score(likelihood: str) -> None:
    assert probae.score(dae_of(likelihood), torch.zeros(3, 8)).isfinite().all()


@pytest.mark.parametrize("name", DENOISED)
def test_denoising_has_a_variance(name: str) -> None:
    # 10 000 draws; the variance of a variance by its fourth moment: 6 entries, 5.5 standard errors
    likelihood, corruption, values = DENOISED[name]
    torch.manual_seed(7)
    law = probae.denoise(one_code(likelihood), torch.tensor(values, dtype=DOUBLE), corruption)
    draws = law.sample((10_000,))
    square = (draws - law.mean) ** 2
    std_error = square.std(0) / math.sqrt(len(draws))
    assert law.variance.shape == (2, 3)
    assert ((square.mean(0) - law.variance).abs() <= 5.5 * std_error + 1e-9).all()


def test_denoising_is_deterministic_under_a_seed_and_leaves_the_pair_alone() -> None:
    pair, x_tilde, noise = probae.VAE(8, 2, hidden=(4,)), torch.rand(3, 8).round(), probae.BitFlip
    pair.train()
    stream = torch.get_rng_state()
    laws = [probae.denoise(pair, x_tilde, noise(0.1), seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), stream)
    assert pair.training
    assert torch.equal(laws[0].mean, laws[1].mean)
    assert not torch.equal(laws[0].mean, laws[2].mean)
    drawn = [probae.denoise(pair, x_tilde, noise(0.1), seed=None) for _ in range(2)]
    assert not torch.equal(drawn[0].mean, drawn[1].mean)
    assert all(parameter.grad is None for parameter in pair.parameters())


def test_each_datum_is_denoised_by_itself() -> None:
    pair = one_code("gaussian")
    x_tilde = torch.randn(5, 3, dtype=DOUBLE)
    exact = [
        probae.denoise(pair, rows, probae.GaussianNoise(0.5), num_samples=20_000).mean
        for rows in (x_tilde, x_tilde[3:4])
    ]
    assert (exact[0][3] - exact[1][0]).abs().max() < 0.05


def point(prior: str) -> probae.Autoencoder:
    return probae.UndercompleteAutoencoder(8, 2, hidden=(4,), likelihood="bernoulli", prior=prior)


def dae() -> probae.Autoencoder:
    return probae.Autoencoder(
        probae.FlatPrior(2),
        probae.PointEncoder(probae.MLP(8, 2)),
        probae.GaussianDecoder(probae.MLP(2, 8)),
        probae.GaussianNoise(0.3),
    )


def dae_of(
    likelihood: str, corruption: probae.Corruption | None = None
) -> probae.DenoisingAutoencoder:
    return probae.DenoisingAutoencoder(
        8, 2, hidden=(), likelihood=likelihood, corruption=corruption
    )


def masked_dae() -> probae.DenoisingAutoencoder:
    return dae_of("gaussian", probae.Masking(0.3, known=True))


def dvae() -> probae.DenoisingVAE:
    return probae.DenoisingVAE(8, 2, hidden=(4,), likelihood="gaussian")


def with_factor() -> probae.Autoencoder:
    pair = dae()
    penalty = probae.ContractivePenalty(pair.encoder, 0.1)
    return probae.Autoencoder(pair.prior, pair.encoder, pair.decoder, pair.corruption, penalty)


def vae(likelihood: str = "bernoulli") -> probae.VAE:
    return probae.VAE(8, 2, hidden=(4,), likelihood=likelihood)


ZEROS = torch.zeros(3, 8)
MISUSES: dict[str, tuple[Callable[[], object], str]] = {
    "no pair": (lambda: probae.denoise(None, ZEROS), "pair must be a probae.Autoencoder"),
    "no corruption": (lambda: probae.denoise(vae(), ZEROS), "corruption must say how x_tilde"),
    "no such corruption": (
        lambda: probae.denoise(vae(), ZEROS, 0.3),
        r"corruption must be a probae.Corruption.*got 0.3",
    ),
    "no closed form": (
        lambda: probae.denoise(vae(), ZEROS, probae.GaussianNoise(0.3)),
        r"distribution must be a Normal .*GaussianNoise\(scale=0.3\).*got GreyBernoulli",
    ),
    "other corruption": (
        lambda: probae.denoise(dae(), ZEROS, probae.GaussianNoise(0.5)),
        r"corruption must be the GaussianNoise\(scale=0.3\) .*got GaussianNoise\(scale=0.5\)",
    ),
    "nothing learned": (
        lambda: probae.denoise(point("flat"), ZEROS, probae.BitFlip(0.1)),
        r"kind RECONSTRUCTION: .*has no p\(x\|x_tilde\)",
    ),
    "point code": (
        lambda: probae.denoise(point("normal"), ZEROS, probae.BitFlip(0.1)),
        r"encoder of the pair.* must return a .*density.*got Delta.*probae.fit_proposal",
    ),
    "point proposal": (
        lambda: probae.denoise(
            vae(), ZEROS, probae.BitFlip(0.1), proposal=probae.PointEncoder(probae.MLP(8, 2))
        ),
        r"proposal.* must return a .*density.*got Delta",
    ),
    "wide proposal": (
        lambda: probae.denoise(
            vae(),
            ZEROS,
            probae.BitFlip(0.1),
            proposal=probae.GaussianEncoder(probae.MLP(8, (2, 3))),
        ),
        r"proposal.* must return a .*density.* with event shape \(2,\).* event shape \(3,\)",
    ),
    "no proposal": (
        lambda: probae.denoise(vae(), ZEROS, probae.BitFlip(0.1), proposal=3),
        r"proposal must be an encoder, a torch.nn.Module, got int",
    ),
    "shape": (
        lambda: probae.denoise(vae(), ZEROS[:, :5], probae.BitFlip(0.1)),
        r"x_tilde must have shape \(N, 8\), got \(3, 5\)",
    ),
    "shape of a denoiser": (
        lambda: probae.denoise(dae(), ZEROS[:, :5]),
        r"x_tilde must have shape \(N, 8\), got \(3, 5\)",
    ),
    "no mask": (
        lambda: probae.denoise(vae(), ZEROS, probae.Masking(0.1, known=True)),
        r"x_tilde must have shape \(N, 2, 8\), got \(3, 8\); .*probae.stack_missing",
    ),
    "grey": (
        lambda: probae.denoise(vae(), ZEROS + 0.5, probae.BitFlip(0.1)),
        r"x_tilde must lie in the support .*24 values outside, the first 0.5.*binarize",
    ),
    "counts": (
        lambda: probae.denoise(vae("poisson"), ZEROS - 1, probae.PoissonThinning(0.1)),
        r"x_tilde must lie in the support .*24 values outside, the first -1",
    ),
    "missing": (
        lambda: probae.denoise(vae(), ZEROS / 0, probae.BitFlip(0.1)),
        r"x_tilde must be finite",
    ),
    "samples": (
        lambda: probae.denoise(vae(), ZEROS, probae.BitFlip(0.1), num_samples=0),
        r"num_samples must be an int >= 1, got 0",
    ),
    "seed": (
        lambda: probae.denoise(vae(), ZEROS, probae.BitFlip(0.1), seed="a"),
        r"seed must be a 64-bit int",
    ),
    "score without noise": (
        lambda: probae.score(vae(), ZEROS),
        r"pair must have the corruption GaussianNoise, got None",
    ),
    "score of a VAE": (
        lambda: probae.score(dvae(), ZEROS),
        r"pair must be of kind CONDITIONAL, got ELBO: under a proper prior.*DenoisingAutoencoder",
    ),
    "score under a factor": (
        lambda: probae.score(with_factor(), ZEROS),
        r"pair must be of kind CONDITIONAL, got ENERGY",
    ),
    "score of a Bernoulli": (
        lambda: probae.score(dae_of("bernoulli"), ZEROS),
        r"decoder must return a Gaussian, got GreyBernoulli: .*likelihood='gaussian'",
    ),
    "score of a Poisson": (
        lambda: probae.score(dae_of("poisson"), ZEROS),
        r"decoder must return a Gaussian, got Poisson",
    ),
    "half a mask": (
        lambda: probae.denoise(masked_dae(), torch.full((3, 2, 8), 0.5)),
        r"x_tilde must be pairs of values and mask, .* 24 entries .*first 0.5.*stack_missing",
    ),
    "value without mask": (
        lambda: probae.denoise(masked_dae(), torch.stack([ZEROS + 3, ZEROS], 1)),
        r"x_tilde must be pairs of values and mask, .* 24 entries .*first 3;",
    ),
    "too large for the pair": (
        lambda: probae.denoise(masked_dae(), torch.full((3, 2, 8), 1e300, dtype=DOUBLE)),
        r"x_tilde must fit into the dtype of the pair.*first in row 0; scale the data",
    ),
    "grey to a denoiser of bits": (
        lambda: probae.denoise(dae_of("bernoulli", probae.BitFlip(0.1)), ZEROS + 0.5),
        r"x_tilde must be 0 or 1 under BitFlip.*24 values that are not, the first 0.5.*binarize",
    ),
    "score of no pair": (lambda: probae.score(3, ZEROS), r"pair must be a probae.Autoencoder"),
    "shape of the score": (
        lambda: probae.score(dae(), ZEROS[:, :5]),
        r"x must have shape \(N, 8\), got \(3, 5\)",
    ),
}


@pytest.mark.parametrize("case", MISUSES)
def test_denoising_refuses(case: str) -> None:
    call, message = MISUSES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_encoder_of_another_shape_is_named() -> None:
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(2),
        probae.GaussianEncoder(probae.MLP((2, 8), (2, 2))),
        probae.GaussianDecoder(probae.MLP(2, 8)),
        probae.Masking(0.3, known=True),
    )
    with pytest.raises(ValueError, match=r"encoder takes \(N, 2, 8\); denoise with"):
        probae.denoise(pair, torch.zeros(3, 8), probae.GaussianNoise(0.3))


def test_score_of_the_best_linear_denoiser_of_a_gaussian() -> None:
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=DOUBLE)
    noisy = covariance + 0.3**2 * torch.eye(2, dtype=DOUBLE)
    pair = probae.Autoencoder(
        probae.FlatPrior(2),
        probae.PointEncoder(probae.MLP(2, 2)),
        probae.GaussianDecoder(probae.MLP(2, 2)),
        probae.GaussianNoise(0.3),
    ).double()
    with torch.no_grad():
        pair.encoder.network.output.weight.copy_(torch.linalg.inv(noisy))
        pair.decoder.network.output.weight.copy_(covariance)
    x = torch.randn(7, 2, dtype=DOUBLE)
    expected = -x @ torch.linalg.inv(noisy)
    torch.testing.assert_close(probae.score(pair, x), expected, rtol=0, atol=1e-10)
