"""PPCA and the linear autoencoder against closed forms and scikit-learn."""

import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import probae
from probae.autoencoder import local_parameters
from probae.terms import log_weights


def low_rank_data(n: int, scales: list[float], x_dim: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(x_dim, len(scales)))[0] * torch.tensor(scales).double()
    return normal(n, len(scales)) @ basis.T + noise * normal(n, x_dim) + normal(x_dim)


def random_ppca(x_dim: int = 6, z_dim: int = 2, posterior: str = "exact") -> probae.PPCA:
    torch.manual_seed(1)
    pair = probae.PPCA(x_dim, z_dim, posterior=posterior, scale=0.8).double()
    pair.set_parameters(torch.randn(x_dim, z_dim), torch.randn(x_dim), 0.6)
    return pair


def covariance(pair: probae.PPCA) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, mean, s² and M = W'W + s² I."""
    weight, mean, scale = (t.detach() for t in pair.decoder.affine())
    m = weight.T @ weight + scale**2 * torch.eye(weight.shape[1], dtype=torch.float64)
    return weight, mean, scale**2, m


def test_marginal_and_posterior_are_bayes_rule() -> None:
    pair = random_ppca()
    weight, mean, variance, m = covariance(pair)
    x = torch.randn(9, 6, dtype=torch.float64)
    marginal = MultivariateNormal(mean, weight @ weight.T + variance * torch.eye(6).double())
    ll = probae.log_likelihood(pair, x)
    assert ll.method == "exact"
    assert not ll.is_bound
    assert torch.allclose(ll.values, marginal.log_prob(x), atol=1e-8)
    posterior = pair.encoder(x)
    expected_mean = torch.linalg.solve(m, weight.T @ (x - mean).T).T
    assert torch.allclose(posterior.mean, expected_mean, atol=1e-8)
    expected = variance * torch.linalg.inv(m)
    assert torch.allclose(posterior.covariance_matrix, expected.expand(9, 2, 2), atol=1e-8)


def test_maximum_likelihood_formula() -> None:
    x = low_rank_data(400, [3.0, 2.0, 1.0], 8, 0.5)
    pair = probae.PPCA.maximum_likelihood(x, 3)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    variance = eigenvalues[3:].mean()
    expected = -0.5 * (
        8 * math.log(2 * math.pi) + eigenvalues[:3].log().sum() + 5 * variance.log() + 8
    )
    assert probae.log_likelihood(pair, x).mean == pytest.approx(float(expected), abs=1e-8)
    best = probae.log_likelihood(pair, x).mean
    with torch.no_grad():  # a maximum: every direction goes down
        for parameter in pair.parameters():
            for sign in (-1, 1):
                step = sign * 0.01 * torch.randn_like(parameter)
                parameter.add_(step)
                assert probae.log_likelihood(pair, x).mean < best
                parameter.sub_(step)


def test_elbo_plus_kl_to_the_posterior_is_the_evidence() -> None:
    diagonal = random_ppca(posterior="diagonal")
    with torch.no_grad():  # break the diagonal guide's match
        diagonal.encoder.network.output.weight.normal_(0, 0.3)
    x = torch.randn(9, 6, dtype=torch.float64)
    evidence = probae.log_likelihood(diagonal, x, "exact").values
    weight, _, variance, _ = covariance(diagonal)
    with torch.no_grad():
        q, posterior = diagonal.encoder(x), probae.LinearGaussianPosterior(diagonal.decoder)(x)
        q_full = MultivariateNormal(q.mean, torch.diag_embed(q.variance))
        gap = kl_divergence(q_full, posterior)
        spread = torch.einsum("di,ni,di->n", weight, q.variance, weight) / (2 * variance)
        expected_log_likelihood = diagonal.decoder(q.mean).log_prob(x) - spread
        prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        elbo = expected_log_likelihood - kl_divergence(q_full, prior)
        assert torch.allclose(elbo + gap, evidence, atol=1e-10)
        ll = probae.log_likelihood(diagonal, x, "elbo", num_samples=4000)
        assert ((ll.values - elbo).abs() < 5 * ll.std_error).all()
        exact = random_ppca()
        evidence = probae.log_likelihood(exact, x).values
        with local_parameters():  # under the exact guide every single weight is the evidence
            every = log_weights(exact.model, exact.guide, x, num_particles=5)
    assert torch.allclose(every, evidence.expand(5, -1), atol=1e-10)


@pytest.mark.parametrize("angle", [0.0, 0.6])
def test_linear_vae_gap(angle: float) -> None:
    pair = random_ppca(posterior="diagonal")
    weight, mean, _, _ = covariance(pair)
    u, s, _ = torch.linalg.svd(weight, full_matrices=False)
    c, si = math.cos(angle), math.sin(angle)
    rotated = (u * s) @ torch.tensor([[c, -si], [si, c]]).double()
    pair.set_parameters(rotated, mean, 0.6)
    weight, mean, variance, m = covariance(pair)
    v, d = torch.linalg.solve(m, weight.T), variance / m.diagonal()
    with torch.no_grad():
        output = pair.encoder.network.output
        raw = d.sqrt() - pair.encoder.scale_min
        output.weight.copy_(torch.cat([v, torch.zeros_like(v)]))
        output.bias.copy_(torch.cat([-v @ mean, raw + torch.log(-torch.expm1(-raw))]))
        x = torch.randn(9, 6, dtype=torch.float64)
        q = pair.encoder(x)
        q_full = MultivariateNormal(q.mean, torch.diag_embed(q.variance))
        gap = kl_divergence(q_full, probae.LinearGaussianPosterior(pair.decoder)(x))
    expected = 0.5 * (m.diagonal().log().sum() - torch.logdet(m))
    assert torch.allclose(gap, expected.expand(9), atol=1e-10)
    if angle == 0:
        assert float(expected) == pytest.approx(0, abs=1e-10)
    else:
        assert float(expected) > 0.01


def test_map_joint_exceeds_the_evidence_by_a_constant() -> None:
    pair = random_ppca()
    _, _, variance, m = covariance(pair)
    x = torch.randn(9, 6, dtype=torch.float64)
    with torch.no_grad():
        z = pair.encoder(x).mean
        joint = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)
    gap = joint - probae.log_likelihood(pair, x).values
    expected = 0.5 * torch.logdet(m / variance) - math.log(2 * math.pi)
    assert torch.allclose(gap, expected.expand(9), atol=1e-10)
    assert not probae.Kind.MAP_JOINT.is_lower_bound


def test_exact_evidence_equals_scikit_learn() -> None:
    x = low_rank_data(300, [3.0, 2.0], 7, 0.5)
    pca = PCA(2).fit(x.numpy())
    components = torch.from_numpy(pca.components_.T)
    spread = torch.from_numpy(pca.explained_variance_) - pca.noise_variance_
    pair = probae.PPCA(7, 2).double()
    mean = torch.from_numpy(pca.mean_)
    pair.set_parameters(components * spread.sqrt(), mean, math.sqrt(pca.noise_variance_))
    theirs = torch.from_numpy(pca.score_samples(x.numpy()))
    assert torch.allclose(probae.log_likelihood(pair, x).values, theirs, rtol=1e-6, atol=0)


def test_importance_estimate_with_a_trained_guide_meets_the_exact_evidence() -> None:
    x, held_out = low_rank_data(800, [2.0, 1.0], 6, 0.7).split([600, 200])
    pair = probae.PPCA(6, 2, posterior="diagonal").double()
    probae.fit(pair, x, epochs=30, batch_size=50, lr=2e-2, schedule="cosine", progress=False)
    exact = probae.log_likelihood(pair, held_out, "exact")
    ll = probae.log_likelihood(pair, held_out, "iwae", num_samples=5000)
    error = ll.values - exact.values
    mean_error = float(error.mean())
    std_error = float((ll.std_error**2).sum().sqrt() / len(error))
    assert abs(mean_error) < 3 * std_error
    assert ((error / ll.std_error).abs() < 3).double().mean() > 0.97
    assert ll.is_bound
    assert (ll.khat < 0.7).all()


def test_linear_vae_reaches_the_maximum_of_the_likelihood() -> None:
    x = low_rank_data(1000, [3.0, 2.0, 1.5], 10, 0.5)
    best = probae.log_likelihood(probae.PPCA.maximum_likelihood(x, 3), x).mean
    for posterior in ("diagonal", "exact"):
        pair = probae.PPCA(10, 3, posterior=posterior).double()
        pair.initialize(x)
        probae.fit(pair, x, epochs=150, batch_size=100, lr=2e-2, schedule="cosine", progress=False)
        assert best - 0.05 < probae.log_likelihood(pair, x, "exact").mean <= best + 1e-9
        elbo = probae.log_likelihood(pair, x, "elbo")
        assert elbo.mean > best - 0.05


def test_linear_autoencoder_finds_the_principal_subspace() -> None:
    x = low_rank_data(500, [3.0, 2.0], 6, 0.5)
    pair = probae.UndercompleteAutoencoder(6, 2, hidden=()).double()
    pair.initialize(x)
    probae.fit(pair, x, epochs=1500, batch_size=500, lr=3e-2, schedule="cosine", progress=False)
    with torch.no_grad():
        error = ((x - probae.reconstruct(pair, x).mean) ** 2).sum(1).mean()
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    assert float(error) == pytest.approx(float(eigenvalues[:4].sum()), rel=1e-4)
    basis = torch.linalg.qr(pair.decoder.affine()[0].detach())[0]
    sines = torch.linalg.svdvals(basis.T @ vectors[:, :4])
    assert (sines < 1e-4).all()


@pytest.mark.parametrize("posterior", ["exact", "diagonal"])
def test_directions_below_the_noise_collapse(posterior: str) -> None:
    x = low_rank_data(2000, [3.0, 2.0, 0.2], 6, 0.4)
    pair = probae.PPCA(6, 3, posterior=posterior, scale=0.8, learn_scale=False).double()
    pair.initialize(x)
    probae.fit(pair, x, epochs=150, batch_size=100, lr=3e-2, schedule="cosine", progress=False)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    assert (eigenvalues[:2] > 0.64).all()
    assert (eigenvalues[2:] < 0.64).all()
    singular = torch.linalg.svdvals(pair.decoder.affine()[0].detach())
    assert torch.allclose(singular[:2], (eigenvalues[:2] - 0.64).sqrt(), rtol=0.05)
    assert singular[2] < 0.1
