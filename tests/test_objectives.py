"""Objectives: identities of ELBO and IWAE bound, gradients, and the traps of Pyro's own ELBOs."""

import itertools
import math
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import probae
from probae.autoencoder import local_parameters
from probae.terms import elbo_terms, log_weights


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def vae(likelihood: str = "bernoulli", x_dim: int = 6, z_dim: int = 2) -> probae.VAE:
    return probae.VAE(x_dim, z_dim, hidden=(5,), likelihood=likelihood).double()


def binary(n: int = 7, x_dim: int = 6) -> Tensor:
    return (torch.rand(n, x_dim, dtype=torch.float64) > 0.5).double()


def categorical_pair(states: int = 6, x_dim: int = 4) -> probae.Autoencoder:
    pair = probae.Autoencoder(
        probae.CategoricalPrior(states),
        probae.CategoricalEncoder(probae.MLP(x_dim, states, (5,))),
        probae.BernoulliDecoder(probae.MLP(states, x_dim)),
    ).double()
    with torch.no_grad():
        pair.prior.logits.normal_()
    return pair


def bernoulli_pair(bits: int = 3, x_dim: int = 4) -> probae.Autoencoder:
    return probae.Autoencoder(
        probae.BernoulliPrior(bits, 0.3),
        probae.BernoulliEncoder(probae.MLP(x_dim, bits)),
        probae.BernoulliDecoder(probae.MLP(bits, x_dim)),
    ).double()


def gradients(pair: nn.Module, loss: Tensor) -> Tensor:
    parameters = list(pair.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    return torch.cat([g.flatten() for g in filled])


class Spherical(nn.Module):
    """Gaussian prior of a given scale."""

    def __init__(self, z_dim: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((z_dim,), scale, dtype=torch.float64))

    def forward(self) -> dist.Distribution:
        return dist.Normal(torch.zeros_like(self.scale), self.scale).to_event(1)


class FixedGaussian(nn.Module):
    """Linear encoder with constant scale; ``unit`` is the unit of length of z."""

    def __init__(self, weight: Tensor, scale: float, unit: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.scale, self.unit = scale, unit

    def forward(self, x: Tensor) -> dist.Distribution:
        loc = self.unit * (x @ self.weight.T)
        return dist.Normal(loc, self.unit * self.scale * torch.ones_like(loc)).to_event(1)


# ---- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO, probae.ELBO])
@pytest.mark.parametrize("scale", [math.sqrt(0.5), 1.0, 0.3])
def test_flat_autoencoder_loss_is_squared_error_plus_constant(elbo: type, scale: float) -> None:
    pair = probae.UndercompleteAutoencoder(
        5, 2, hidden=(4,), likelihood_options={"scale": scale}
    ).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    objective = elbo(alpha=0.0, num_particles=2) if elbo is RenyiELBO else elbo()
    reconstruction = pair.decoder(pair.encoder(x).mean).mean
    constant = 2.5 * math.log(2 * math.pi * scale**2)
    expected = ((x - reconstruction) ** 2).sum() / (2 * scale**2) + 9 * constant
    assert objective.loss(pair.model, pair.guide, x) == pytest.approx(expected.item(), abs=1e-10)


def test_map_joint_adds_the_prior_term_to_the_reconstruction() -> None:
    pair = probae.UndercompleteAutoencoder(5, 2, hidden=(4,), prior="normal").double()
    x = torch.randn(9, 5, dtype=torch.float64)
    code = pair.encoder(x).mean
    flat = -pair.decoder(code).log_prob(x).sum()
    expected = flat + (code**2).sum() / 2 + 9 * math.log(2 * math.pi)
    loss = probae.ELBO().loss(pair.model, pair.guide, x)
    assert loss == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("unit", [0.1, 3.0])
def test_rescaling_the_code_moves_the_map_joint_and_not_the_elbo(unit: float) -> None:
    weight, decode = torch.randn(2, 5).double(), torch.randn(5, 2).double()
    x = torch.randn(4, 5, dtype=torch.float64)

    def pair(unit: float, point: bool) -> probae.Autoencoder:
        decoder = probae.GaussianDecoder(probae.MLP(2, 5)).double()
        encoder: nn.Module = FixedGaussian(weight, 0.7, unit)
        if point:
            encoder = probae.PointEncoder(probae.MLP(5, 2)).double()
            encoder.network.output.weight.data.copy_(unit * weight)
        decoder.network.output.weight.data.copy_(decode / unit)
        return probae.Autoencoder(Spherical(2, unit).double(), encoder, decoder)

    def loss(unit: float, point: bool) -> float:
        torch.manual_seed(1)
        made = pair(unit, point)
        return probae.ELBO().loss(made.model, made.guide, x) / len(x)

    assert loss(unit, True) - loss(1.0, True) == pytest.approx(2 * math.log(unit), abs=1e-10)
    assert loss(unit, False) == pytest.approx(loss(1.0, False), abs=1e-10)


def test_grey_elbo_is_the_expected_elbo_of_binarisations() -> None:
    pair = vae(x_dim=3)
    grey = torch.tensor([[0.2, 0.9, 0.5]], dtype=torch.float64)
    z = pair.encoder(grey).sample()

    def loss(x: Tensor) -> float:  # the same code for every binarisation: z is replayed
        def guide(x: Tensor) -> None:
            with pyro.plate("data", 1):
                pyro.sample("z", dist.Delta(z, event_dim=1))

        return probae.ELBO().loss(pair.model, guide, x)

    expected = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=3):
        b = torch.tensor([bits], dtype=torch.float64)
        expected += float(torch.where(b == 1, grey, 1 - grey).prod()) * loss(b)
    assert loss(grey) == pytest.approx(expected, abs=1e-12)


def test_grey_importance_bound_stays_below_the_expected_log_likelihood() -> None:
    pair = categorical_pair(states=2, x_dim=3)
    grey = torch.tensor([[0.2, 0.9, 0.5]], dtype=torch.float64)
    with local_parameters(), torch.no_grad():
        weights = log_weights(pair.model, pair.guide, grey, num_particles=20_000)
    limit = torch.logsumexp(weights[:, 0], 0) - math.log(20_000)
    expected = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=3):
        b = torch.tensor([bits], dtype=torch.float64)
        weight = torch.where(b == 1, grey, 1 - grey).prod()
        expected += float(weight * probae.log_likelihood(pair, b, "exact").values)
    assert float(limit) < expected


def exact_importance_bounds(log_w: Tensor, log_q: Tensor, counts: list[int]) -> dict[int, float]:
    """L_K by summing over all multinomial outcomes of K draws from q."""
    bounds = {}
    states = len(log_w)
    for k in counts:
        total = 0.0
        for bars in itertools.combinations(range(k + states - 1), states - 1):
            edges = (-1, *bars, k + states - 1)
            n = torch.tensor([b - a - 1 for a, b in itertools.pairwise(edges)]).double()
            log_probability = math.lgamma(k + 1) - torch.lgamma(n + 1).sum() + (n * log_q).sum()
            mean_weight = torch.logsumexp(log_w + n.log(), 0) - math.log(k)
            total += float(log_probability.exp() * mean_weight)
        bounds[k] = total
    return bounds


def test_importance_bound_by_enumeration() -> None:
    pair = categorical_pair(states=4)
    x = binary(1, 4)
    z = torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        log_q = pair.encoder(x).log_prob(z)
        log_w = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x) - log_q
    log_p = float(probae.log_likelihood(pair, x, "exact").values)

    assert float(torch.logsumexp(log_w + log_q, 0)) == pytest.approx(log_p, abs=1e-12)  # E w = p

    counts = [1, 2, 3, 5, 10, 40]
    bounds = exact_importance_bounds(log_w, log_q, counts)
    values = [bounds[k] for k in counts]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[-1] < log_p
    variance = float((log_q.exp() * (log_w.exp() - math.exp(log_p)) ** 2).sum())
    predicted = variance / (2 * math.exp(2 * log_p))
    assert 40 * (log_p - bounds[40]) == pytest.approx(predicted, rel=0.05)

    for k in (1, 3, 10):  # our estimate, once for each of many copies of x; 5 s.e.: 6e-7 each
        ll = probae.log_likelihood(pair, x.expand(20_000, -1), "iwae", num_samples=k)
        assert abs(ll.mean - bounds[k]) < 5 * ll.mean_std_error


def test_one_particle_importance_bound_is_the_elbo() -> None:
    pair, x = vae(), binary()
    losses = []
    for objective in (probae.IWAE(1), probae.ELBO(analytic_kl=False), Trace_ELBO()):
        torch.manual_seed(3)
        losses.append(objective.loss(pair.model, pair.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    assert losses[0] == pytest.approx(losses[2], abs=1e-10)


def test_analytic_and_sampled_kl_agree() -> None:
    pair, x = vae(), binary(1).expand(50_000, -1)
    with local_parameters(), torch.no_grad():
        closed = elbo_terms(pair.model, pair.guide, x, analytic=True)
        sampled = elbo_terms(pair.model, pair.guide, x, analytic=False)
    assert closed.kl_method == {"z": "analytic"}
    assert sampled.kl_method == {"z": "monte carlo"}
    assert closed.kl.std() < 1e-12
    std_error = sampled.kl.std() / math.sqrt(50_000)
    assert abs(sampled.kl.mean() - closed.kl.mean()) < 5 * std_error  # 6e-7


@pytest.mark.parametrize("prior", ["normal", "laplace", "mixture", "vamp"])
def test_elbo_equals_pyros_and_says_how_it_got_the_kl(prior: str) -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,), prior=prior).double(), binary()
    objective = probae.ELBO()
    torch.manual_seed(3)
    ours = objective.loss(pair.model, pair.guide, x)
    torch.manual_seed(3)
    theirs = TraceMeanField_ELBO().loss(pair.model, pair.guide, x)
    assert ours == pytest.approx(theirs, abs=1e-10)
    registered = prior in ("normal", "laplace")
    assert objective.kl_method == {"z": "analytic" if registered else "monte carlo"}


def test_beta_weighs_the_kl_alone() -> None:
    pair, x = vae(), binary()
    losses = []
    for beta in (0.0, 1.0, 4.0):
        torch.manual_seed(3)
        losses.append(probae.ELBO(beta=beta).loss(pair.model, pair.guide, x))
    with local_parameters(), torch.no_grad():
        kl = float(elbo_terms(pair.model, pair.guide, x).kl.sum())
    assert losses[1] - losses[0] == pytest.approx(kl, abs=1e-10)
    assert losses[2] - losses[0] == pytest.approx(4 * kl, abs=1e-10)


def test_warmup_rises_linearly_and_is_over_without_a_trainer() -> None:
    objective = probae.ELBO(beta=probae.LinearWarmup(10))
    assert objective.beta == 1.0
    assert objective.warmup_epochs == 10
    objective.epoch = 2.5
    assert objective.beta == 0.25


# ---- gradients ----------------------------------------------------------------------------------


def test_score_function_gradient_is_unbiased() -> None:
    pair, x = bernoulli_pair(), binary(2, 4)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    z = states[:, None]  # (S, 1, bits)
    log_q = pair.encoder(x).log_prob(z)  # (S, N)
    log_p = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)
    exact = gradients(pair, -(log_q.exp() * (log_p - log_q)).sum())

    copies = 4000
    many = x.repeat(copies, 1)
    estimates = []
    for objective in (probae.ELBO(), probae.ELBO(num_particles=2), probae.ELBO(analytic_kl=False)):
        draws = torch.stack(
            [
                gradients(pair, objective.differentiable_loss(pair.model, pair.guide, many))
                / copies
                for _ in range(20)
            ]
        )
        estimates.append((draws.mean(0), draws.std(0) / math.sqrt(20)))
    for mean, std_error in estimates:
        assert ((mean - exact).abs() < 6 * std_error + 1e-9).all()  # t with 19 d.f.: 9e-6 a weight


@pytest.mark.parametrize("num_particles", [1, 4])
def test_doubly_reparameterised_gradient_has_the_mean_of_the_plain_one(num_particles: int) -> None:
    pair, x = vae(x_dim=4), binary(2, 4)
    many = x.repeat(4000, 1)
    means, errors = [], []
    for dreg in (False, True):
        objective = probae.IWAE(num_particles, dreg=dreg)
        draws = torch.stack(
            [
                gradients(pair, objective.differentiable_loss(pair.model, pair.guide, many)) / 4000
                for _ in range(20)
            ]
        )
        means.append(draws.mean(0))
        errors.append(draws.std(0) / math.sqrt(20))
    assert ((means[0] - means[1]).abs() < 6 * torch.hypot(*errors) + 1e-9).all()


def test_doubly_reparameterised_encoder_gradient_is_less_noisy_at_many_particles() -> None:
    pair, x = vae(x_dim=4), binary(2, 4)
    encoder_parameters = sum(p.numel() for p in pair.encoder.parameters())
    variance = {}
    for dreg in (False, True):
        objective = probae.IWAE(64, dreg=dreg)
        draws = torch.stack(
            [
                gradients(pair, objective.differentiable_loss(pair.model, pair.guide, x))
                for _ in range(200)
            ]
        )
        variance[dreg] = float(draws.var(0)[:encoder_parameters].sum())
    assert variance[True] < 0.5 * variance[False]


def test_loss_value_is_the_same_with_and_without_dreg() -> None:
    pair, x = vae(), binary()
    losses = []
    for dreg in (False, True):
        torch.manual_seed(3)
        losses.append(probae.IWAE(5, dreg=dreg).loss(pair.model, pair.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


# ---- the traps of Pyro --------------------------------------------------------------------------


def test_importance_weights_stay_per_datum_with_a_factor_outside_the_plate() -> None:
    pair, x = vae("gaussian"), torch.randn(40, 6, dtype=torch.float64)

    def model(x: Tensor) -> None:
        pair.model(x)
        pyro.factor("penalty", torch.tensor(-0.01, dtype=torch.float64))

    torch.manual_seed(3)
    plain = probae.IWAE(50).loss(pair.model, pair.guide, x)
    torch.manual_seed(3)
    with_factor = probae.IWAE(50).loss(model, pair.guide, x)
    assert with_factor == pytest.approx(plain + 0.01, abs=1e-10)
    torch.manual_seed(3)
    pyros = RenyiELBO(alpha=0.0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    assert pyros.loss(model, pair.guide, x) > with_factor + 1  # one weight per batch: far looser


def test_importance_bound_equals_pyros_where_pyros_is_right() -> None:
    pair, x = vae(), binary()
    torch.manual_seed(3)
    ours = probae.IWAE(50).loss(pair.model, pair.guide, x)
    torch.manual_seed(3)
    pyros = RenyiELBO(alpha=0.0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    assert ours == pytest.approx(pyros.loss(pair.model, pair.guide, x), abs=1e-9)


def test_subsampling_scale_multiplies_the_bound_and_not_the_weights() -> None:
    x = torch.randn(60, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    pair = probae.PPCA(5, 2, posterior="diagonal").double()
    exact = probae.log_likelihood(pair, x, "exact").values.sum()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=20) as index:
            z = pyro.sample("z", pair.prior())
            pyro.sample("x", pair.decoder(z), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=20) as index:
            pyro.sample("z", pair.encoder(x[index]))

    losses = torch.tensor([probae.IWAE(500).loss(model, guide, x) for _ in range(100)])
    bound, std_error = -losses.mean(), losses.std() / 10
    assert bound < exact + 5 * std_error
    one_by_one = probae.log_likelihood(pair, x, "iwae", num_samples=500).values.sum()
    assert abs(bound - one_by_one) < 5 * std_error


def test_unequal_scales_are_no_importance_weights() -> None:
    pair, x = vae(), binary()

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=0.5):
            pair.model(x)

    with pytest.raises(ValueError, match="unequal scales"):
        probae.IWAE(5).loss(model, pair.guide, x)


def test_importance_bound_refuses_guides_it_would_leave_untrained() -> None:
    pair, x = bernoulli_pair(), binary(3, 4)
    with pytest.raises(ValueError, match=r"guide site 'z'.*no reparameterised gradient"):
        probae.IWAE(5).differentiable_loss(pair.model, pair.guide, x)
    loss = probae.ELBO().differentiable_loss(pair.model, pair.guide, x)
    encoder = list(pair.encoder.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, encoder))


def test_importance_bound_refuses_point_codes() -> None:
    pair = probae.UndercompleteAutoencoder(6, 2, prior="normal").double()
    with pytest.raises(ValueError, match="point code"):
        probae.IWAE(5).loss(pair.model, pair.guide, binary())


def test_importance_bound_refuses_latents_that_all_data_share() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.3, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    x = torch.randn(11)
    with pytest.raises(ValueError, match="'mean' is latent and outside the data plate"):
        probae.IWAE(5).loss(model, guide, x)
    for particles in (1, 3):
        torch.manual_seed(3)
        ours = probae.ELBO(num_particles=particles).loss(model, guide, x)
        torch.manual_seed(3)
        theirs = TraceMeanField_ELBO(
            num_particles=particles, vectorize_particles=True, max_plate_nesting=1
        ).loss(model, guide, x)
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_guide_factor_without_rsample_is_refused_and_with_it_is_right() -> None:
    pair, x = vae(), binary()

    def guide(x: Tensor, has_rsample: bool) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pair.encoder(x))
            penalty = pair.encoder.network(x).pow(2).sum((-1, -2))
            pyro.factor("penalty", penalty, has_rsample=has_rsample)

    with pytest.raises(ValueError, match="guide factor 'penalty'"):
        probae.ELBO().differentiable_loss(pair.model, lambda x: guide(x, False), x)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.prior())
            pyro.sample("x", pair.decoder(z), obs=x)
            pyro.factor("penalty", -pair.encoder.network(x).pow(2).sum((-1, -2)))

    grads = []
    for programs in ((pair.model, lambda x: guide(x, True)), (model, pair.guide)):
        torch.manual_seed(3)
        grads.append(gradients(pair, probae.ELBO().differentiable_loss(*programs, x)))
    assert torch.allclose(*grads, atol=1e-10)


class DensePoint(nn.Module):
    """Point code with a density of its own, as a flow would give it."""

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Delta(x[..., :2], log_density=x[..., 2], event_dim=1)


def test_density_of_a_point_code_counts() -> None:
    decoder = probae.GaussianDecoder(probae.MLP(2, 6)).double()
    pair = probae.Autoencoder(probae.StandardNormalPrior(2).double(), DensePoint(), decoder)
    x = torch.randn(7, 6, dtype=torch.float64)
    right = Trace_ELBO().loss(pair.model, pair.guide, x)
    objective = probae.ELBO()
    assert objective.loss(pair.model, pair.guide, x) == pytest.approx(right, abs=1e-10)
    assert objective.kl_method == {"z": "monte carlo"}
    pyros = TraceMeanField_ELBO().loss(pair.model, pair.guide, x)
    assert pyros == pytest.approx(right, abs=1e-10)


def test_corruption_in_both_programs_cancels() -> None:
    encoder = FixedGaussian(torch.randn(2, 5).double(), 0.7)
    decoder = probae.GaussianDecoder(probae.MLP(2, 5)).double()
    prior = probae.StandardNormalPrior(2).double()
    pair = probae.Autoencoder(prior, encoder, decoder, probae.GaussianNoise(0.4))
    x = torch.randn(1, 5, dtype=torch.float64).expand(20_000, -1)
    with local_parameters(), torch.no_grad():
        weights = log_weights(pair.model, pair.guide, x)[0]
        # E over x_tilde of KL(q(z|x_tilde) || p(z|x)), every term Gaussian
        weight, bias, scale = decoder.affine()
        exact = probae.log_likelihood(pair, x[:1], "exact").values
        precision = torch.eye(2).double() + weight.T @ weight / scale**2
        mean = torch.linalg.solve(precision, weight.T @ (x[0] - bias) / scale**2)
        gap_mean = encoder.weight @ x[0] - mean
        spread = encoder.weight @ encoder.weight.T * 0.4**2 + 0.7**2 * torch.eye(2).double()
        second_moment = spread + torch.outer(gap_mean, gap_mean)
        kl = 0.5 * (
            (precision @ second_moment).trace() - 2 - torch.logdet(precision) - 4 * math.log(0.7)
        )
    std_error = weights.std() / math.sqrt(len(weights))
    assert abs(weights.mean() - (exact - kl)) < 5 * std_error


# ---- what would print a number above the evidence is refused ------------------------------------


def noisy_pair() -> tuple[probae.VAE, Tensor]:
    return vae("gaussian"), torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize("objective", [probae.ELBO(), probae.IWAE(5)])
def test_latent_that_the_guide_forgets_is_refused(objective: pyro.infer.ELBO) -> None:
    pair, x = noisy_pair()

    def model(x: Tensor) -> None:
        pair.model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("u", dist.Normal(0.0, 0.01))

    with pytest.raises(ValueError, match="'u' is latent in the model and missing from the guide"):
        objective.loss(model, pair.guide, x)


@pytest.mark.parametrize("objective", [probae.ELBO(), probae.IWAE(5)])
def test_corruption_in_the_guide_alone_is_refused(objective: pyro.infer.ELBO) -> None:
    pair, x = noisy_pair()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            noise = dist.Normal(x, 0.01).to_event(1)
            x_tilde = pyro.sample("x_tilde", noise, infer={"is_auxiliary": True})
            pyro.sample("z", pair.encoder(x_tilde))

    with pytest.raises(ValueError, match="'x_tilde' is random and missing from the model"):
        objective.loss(pair.model, guide, x)


def test_factor_outside_the_plate_keeps_its_own_scale() -> None:
    pair, x = noisy_pair()

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=0.01):
            pair.model(x)
            pyro.factor("penalty", torch.tensor(-100.0, dtype=torch.float64))

    def guide(x: Tensor) -> None:
        with pyro.poutine.scale(scale=0.01):
            pair.guide(x)

    losses = []
    for objective in (probae.IWAE(1), probae.ELBO(analytic_kl=False), Trace_ELBO()):
        torch.manual_seed(3)
        losses.append(objective.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[2], abs=1e-10)
    assert losses[1] == pytest.approx(losses[2], abs=1e-10)


def test_factor_outside_the_plate_that_depends_on_the_code_is_refused() -> None:
    pair, x = noisy_pair()

    def model(x: Tensor) -> None:
        z = pair.model(x)
        pyro.factor("penalty", z.sum((-1, -2))[:, None] if z.dim() == 3 else z.sum())

    with pytest.raises(ValueError, match="'penalty' is outside the data plate but depends"):
        probae.IWAE(5).loss(model, pair.guide, x)
    discrete, bits = bernoulli_pair(), binary(3, 4)

    def penalised(x: Tensor) -> None:
        pyro.factor("penalty", -discrete.model(x).sum())

    with pytest.raises(ValueError, match="not all sites are inside the data plate"):
        probae.ELBO().differentiable_loss(penalised, discrete.guide, bits)


def test_tempered_model_gives_what_pyro_gives() -> None:
    pair, x = noisy_pair()

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=0.5):
            pair.model(x)

    losses = []
    for objective in (probae.ELBO(), Trace_ELBO()):
        torch.manual_seed(3)
        losses.append(objective.loss(model, pair.guide, x))
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


@pytest.mark.parametrize("analytic_kl", [True, False])
def test_masked_data_drop_out_of_every_term(analytic_kl: bool) -> None:
    pair, x = noisy_pair()
    mask = torch.tensor([True, False, True, True, False])

    def masked(program: object) -> object:
        return pyro.poutine.mask(program, mask=mask)

    objective = probae.ELBO(analytic_kl=analytic_kl)
    torch.manual_seed(3)
    whole, _ = objective.per_datum_loss(pair.model, pair.guide, x)
    torch.manual_seed(3)
    kept, _ = objective.per_datum_loss(masked(pair.model), masked(pair.guide), x)
    assert torch.allclose(kept, torch.where(mask, whole, 0.0), atol=1e-12)


def test_beta_weighs_the_kl_of_latents_that_all_data_share() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.3, 0.5))

    losses = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(3)
        losses.append(probae.ELBO(beta=beta).loss(model, guide, torch.randn(11)))
    kl = math.log(2) + (0.25 + 0.09) / 2 - 0.5
    torch.manual_seed(3)
    assert losses[1] - losses[0] == pytest.approx(kl, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(3 * kl, rel=1e-4)


def test_baseline_over_few_data_is_unbiased() -> None:
    pair, x = bernoulli_pair(bits=2), binary(2, 4)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)
    z = states[:, None]
    log_q = pair.encoder(x).log_prob(z)
    log_p = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)
    exact = gradients(pair, -(log_q.exp() * (log_p - log_q)).sum())
    objective = probae.ELBO()
    draws = torch.stack(
        [
            gradients(pair, objective.differentiable_loss(pair.model, pair.guide, x))
            for _ in range(3000)
        ]
    )
    std_error = draws.std(0) / math.sqrt(3000)
    assert ((draws.mean(0) - exact).abs() < 5 * std_error + 1e-9).all()


# ---- walkback -----------------------------------------------------------------------------------


def denoising_pair(
    corruption: probae.Corruption | None = None, likelihood: str = "bernoulli", x_dim: int = 6
) -> probae.Autoencoder:
    corruption = probae.BitFlip(0.2) if corruption is None else corruption
    options = {"corruption": corruption, "hidden": (5,), "likelihood": likelihood}
    return probae.DenoisingAutoencoder(x_dim, 4, **options).double()


@pytest.mark.parametrize(
    "corruption",
    [probae.BitFlip(0.2), probae.SaltAndPepper(0.4), probae.Masking(0.3, known=True)],
    ids=repr,
)
@pytest.mark.parametrize("preset", [probae.DenoisingAutoencoder, probae.DenoisingVAE])
def test_walkback_of_one_step_is_the_plain_denoising_loss(
    corruption: probae.Corruption, preset: type
) -> None:
    pair = preset(6, 4, hidden=(5,), corruption=corruption, likelihood="bernoulli").double()
    x = binary()
    losses = []
    for objective in (probae.Walkback(1), probae.ELBO()):
        torch.manual_seed(3)
        losses.append(objective.differentiable_loss(pair.model, pair.guide, x))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)
    grads = [gradients(pair, loss) for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    assert grads[0].abs().max() > 0.1


def test_walkback_by_enumeration_of_the_chain() -> None:
    # Three pixels and bit flips: E L = 1/k Σ_t Σ_s P(x_{t-1} = s|x) Σ_c C(c|s) [-log p(x|c)] in
    # closed form, and its gradient with P held fixed. 6 standard errors for each of 68 numbers,
    # t with 19 degrees of freedom: fails by chance about once in 2000
    pair, rho, k = denoising_pair(x_dim=3), 0.2, 4
    with torch.no_grad():
        pair.decoder.network.output.weight.mul_(3)  # so that chains differ from one step
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    distance = (states[:, None] - states).abs().sum(-1)
    corrupt = rho**distance * (1 - rho) ** (3 - distance)  # (from, to)
    log_p = pair.decoder(pair.encoder(states).mean[:, None]).log_prob(states)  # (x_tilde, x)
    step = (corrupt @ log_p.exp()).detach()  # (from, to), one step of the model's chain
    x = states[[1, 6]]
    start = torch.eye(8, dtype=torch.float64)[[1, 6]]
    visited = sum(torch.linalg.matrix_power(step, t) for t in range(k)) / k
    exact = -(start @ visited @ corrupt @ log_p)[[0, 1], [1, 6]].sum()
    exact_gradient = gradients(pair, exact)

    copies = 4000
    many = x.repeat(copies, 1)
    objective = probae.Walkback(k)
    losses = [objective.differentiable_loss(pair.model, pair.guide, many) for _ in range(20)]
    values = torch.stack([loss.detach() for loss in losses]) / copies
    draws = torch.stack([gradients(pair, loss) for loss in losses]) / copies
    for mean, std, truth in (
        (values.mean(0), values.std(0), exact.detach()),
        (draws.mean(0), draws.std(0), exact_gradient),
    ):
        assert ((mean - truth).abs() < 6 * std / math.sqrt(20) + 1e-9).all()
    one_step = -(start @ corrupt @ log_p)[[0, 1], [1, 6]].sum()
    seen = 10 * values.std() / math.sqrt(20)
    assert exact > one_step + seen  # so that a loss of one step would fail


@pytest.mark.parametrize(
    ("corruption", "likelihood"),
    [
        (probae.Masking(0.3), "gaussian"),  # C(x_tilde_t|x) is zero for t > 1: it is not evaluated
        (probae.Masking(0.3, known=True), "gaussian"),
        (probae.GaussianNoise(0.3), "heteroscedastic-gaussian"),
        (probae.PoissonThinning(0.5), "poisson"),
    ],
)
def test_walkback_trains_under_corruptions_without_full_support(
    corruption: probae.Corruption, likelihood: str
) -> None:
    pair = denoising_pair(corruption, likelihood)
    x = binary(40)
    before = [p.detach().clone() for p in pair.parameters()]
    optim = pyro.optim.Adam({"lr": 1e-2})
    svi = pyro.infer.SVI(pair.model, pair.guide, optim, probae.Walkback(3))
    losses = [svi.step(x) for _ in range(40)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])
    for old, new in zip(before, pair.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_walkback_of_a_denoising_vae_stays_below_the_evidence_at_every_step() -> None:
    # codes of four classes, so that log p(x) is a sum; a score-function gradient, too
    pair = probae.Autoencoder(
        probae.CategoricalPrior(4),
        probae.CategoricalEncoder(probae.MLP(4, 4, (5,))),
        probae.BernoulliDecoder(probae.MLP(4, 4)),
        probae.BitFlip(0.1),
    ).double()
    x = binary(3, 4)
    log_p = probae.log_likelihood(pair, x, "exact").values
    many = x.repeat(4000, 1)
    objective = probae.Walkback(3)
    loss, shared = objective.per_datum_loss(pair.model, pair.guide, many)
    mean = loss.detach().reshape(4000, 3).mean(0)
    std_error = loss.detach().reshape(4000, 3).std(0) / math.sqrt(4000)
    assert (-mean < log_p + 5 * std_error).all()  # 3e-7 each
    assert float(shared) == 0
    assert objective.kl_method == {"z": "analytic"}
    encoder = list(pair.encoder.parameters())
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss.sum(), encoder))


def test_fit_by_walkback_says_what_its_loss_is() -> None:
    pair, x = denoising_pair(), binary(64)
    run = probae.fit(pair, x, x[:20], epochs=2, objective=probae.Walkback(3), progress=False)
    assert run.objective == "Walkback"
    assert run.kind is probae.Kind.CONDITIONAL
    assert run.bound_on.startswith("nothing: -loss = log p(x | x_tilde)")
    assert len(run.history["val_loss"]) == 2


def test_walkback_refuses_programs_that_it_cannot_walk() -> None:
    with pytest.raises(ValueError, match=r"num_steps must be an int >= 1, got 0"):
        probae.Walkback(0)
    pair, x = vae(), binary()
    with pytest.raises(ValueError, match=r"needs a corruption, a site 'x_tilde'.*ELBO"):
        probae.Walkback(2).loss(pair.model, pair.guide, x)
    pair = denoising_pair()
    with pytest.raises(ValueError, match="the data as the first argument"):
        probae.Walkback(2).loss(pair.model, pair.guide)

    def unobserved(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :4], event_dim=1))

    with pytest.raises(ValueError, match="an observed site 'x' in the model"):
        probae.Walkback(2).loss(unobserved, pair.guide, x)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> dist.Distribution:
            return dist.Bernoulli(logits=self.logits.expand_as(x)).to_event(1)

    learned = probae.Autoencoder(
        probae.FlatPrior(4),
        probae.PointEncoder(probae.MLP(6, 4)),
        probae.BernoulliDecoder(probae.MLP(4, 6)),
        Learned(),
    ).double()
    with pytest.raises(ValueError, match=r"site 'x_tilde' \(Independent\) has parameters"):
        probae.Walkback(2).differentiable_loss(learned.model, learned.guide, x)
    learned.corruption.requires_grad_(False)
    probae.Walkback(2).differentiable_loss(learned.model, learned.guide, x).backward()


def test_walkback_refuses_subsampling_inside_the_programs() -> None:
    pair, x = denoising_pair(), binary(12)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("x_tilde", pair.corruption(x[index]))
            z = pyro.sample("z", pair.prior())
            pyro.sample("x", pair.decoder(z), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("z", pair.encoder(pyro.sample("x_tilde", pair.corruption(x[index]))))

    with pytest.raises(ValueError, match=r"shape of the data, \(12, 6\), got \(4, 6\)"):
        probae.Walkback(2).loss(model, guide, x)
