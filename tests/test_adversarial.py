"""Adversarial pairs: the value of the game, what it leaves of the ELBO, training, refusals."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import probae
from probae import Kind
from probae.adversarial import _Draws, _generate, _Player, discriminator_loss

X, Z, N = 5, 2, 7
SMALL: dict[str, Any] = {"hidden": (6,), "discriminator": (8,)}
PRESETS: dict[str, Callable[..., probae.Autoencoder]] = {
    "gan": lambda shape=X: probae.GAN(shape, Z, **SMALL),
    "aae": lambda shape=X: probae.AdversarialAutoencoder(shape, Z, **SMALL),
    "aae-gaussian": lambda shape=X: probae.AdversarialAutoencoder(
        shape, Z, posterior="gaussian", **SMALL
    ),
    "aae-implicit": lambda shape=X: probae.AdversarialAutoencoder(
        shape, Z, posterior="implicit", noise_dim=3, **SMALL
    ),
    "avb": lambda shape=X: probae.AdversarialVariationalBayes(shape, Z, noise_dim=3, **SMALL),
}


@pytest.fixture(params=PRESETS)
def pair(request: pytest.FixtureRequest) -> probae.Autoencoder:
    torch.manual_seed(1)
    return PRESETS[request.param]()


def data(n: int = N, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (X,)), generator=torch.Generator().manual_seed(2))


class Formula(nn.Module):
    """A discriminator's network that is a given function; the parameter is there to be trained."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, seen: Tensor) -> Tensor:
        return self.function(seen)[..., None] + self.shift


# the game


def test_the_value_of_the_game_at_the_best_discriminator() -> None:
    # laws on 6 points with weights of twelfths: the lists below have them exactly
    counts = torch.tensor([[1, 4, 2, 3, 1, 1], [3, 1, 2, 1, 4, 1]])
    p, q = counts.double() / 12
    best = (p / q).log()
    discriminator = probae.Discriminator(Formula(lambda x: best[x[..., 0].long()]), "data")
    ones, zeros = (torch.arange(6.0).repeat_interleave(c)[:, None] for c in counts)
    loss = discriminator_loss(discriminator(ones, None).logits, discriminator(zeros, None).logits)
    middle = (p + q) / 2
    divergence = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert abs(loss.item() - (math.log(4) - 2 * float(divergence))) < 1e-10
    # σ(T*) = p / (p + q), and every other logit does worse
    law = discriminator(torch.arange(6.0)[:, None], None)
    torch.testing.assert_close(law.mean.detach(), p / (p + q), rtol=0, atol=1e-12)
    for k in range(6):
        for shift in (-0.1, 0.1):
            other = best.clone()
            other[k] += shift
            worse = discriminator_loss(other[ones[:, 0].long()], other[zeros[:, 0].long()])
            assert worse > loss + 1e-5


def test_a_discriminator_that_cannot_tell_loses_log_4() -> None:
    same = torch.zeros(9, dtype=torch.float64)
    assert abs(float(discriminator_loss(same, same)) - math.log(4)) < 1e-15


# ELBO surgery


def test_a_discriminator_of_codes_leaves_the_mutual_information_out() -> None:
    torch.manual_seed(3)
    x = data(6).double()
    encoder = probae.GaussianEncoder(probae.MLP(X, (2, 1))).double()
    prior = dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    with torch.no_grad():
        codes = encoder(x)

    def log_aggregated(z: Tensor) -> Tensor:  # log q(z), (...)
        return codes.log_prob(z[..., None, :]).logsumexp(-1) - math.log(len(x))

    best = Formula(lambda z: log_aggregated(z) - prior.log_prob(z)).double()
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(1).double(),
        encoder,
        probae.GaussianDecoder(probae.MLP(1, X)).double(),
        discriminator=probae.Discriminator(best, "code"),
    )
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)[:, None]  # smooth: sums are exact
    step = float(grid[1, 0] - grid[0, 0])
    density = codes.log_prob(grid[:, None]).exp()  # (G, N)
    with torch.no_grad():
        logits = pair.discriminator(None, grid).logits
    aggregated_kl = float((density.mean(1) * logits).sum() * step)
    ratio = codes.log_prob(grid[:, None]) - log_aggregated(grid)[:, None]
    information = float((density * ratio).mean(1).sum() * step)
    kl = float(torch.distributions.kl_divergence(codes.base_dist, prior.base_dist).mean())
    assert information > 0.01
    assert abs(kl - (aggregated_kl + information)) < 1e-10
    # and the estimate is too high by just that; 5 standard errors: fails once in 1.7 million
    estimate = probae.adversarial_elbo(pair, x, 4000)
    plain = probae.Autoencoder(pair.prior, pair.encoder, pair.decoder)
    elbo = probae.log_likelihood(plain, x, "elbo", 4000)
    excess = estimate.values - elbo.values
    error = (estimate.std_error**2 + elbo.std_error**2).sum().sqrt() / len(x)
    assert abs(float(excess.mean()) - information) < 5 * float(error)


# adversarial variational Bayes


def quadratic(encoder: nn.Module, z_dim: int) -> Callable[[Tensor], Tensor]:
    """log q(z|x) - log p(z), of a Gaussian encoder as it is now."""
    encoder = copy.deepcopy(encoder).requires_grad_(False)

    def ratio(seen: Tensor) -> Tensor:
        x, z = seen[..., :-z_dim], seen[..., -z_dim:]
        prior = dist.Normal(torch.zeros_like(z), 1.0).to_event(1)
        return encoder(x).log_prob(z) - prior.log_prob(z)

    return ratio


def linear_gaussian(posterior: Callable[[nn.Module], nn.Module]) -> probae.Autoencoder:
    torch.manual_seed(4)
    network = probae.MLP(Z, X)
    nn.init.normal_(network.output.bias)
    decoder = probae.GaussianDecoder(network, scale=0.7, learn_scale=True).double()
    encoder = posterior(decoder).double()
    judge = probae.Discriminator(Formula(quadratic(encoder, Z)).double(), "joint")
    return probae.Autoencoder(
        probae.StandardNormalPrior(Z).double(), encoder, decoder, discriminator=judge
    )


def test_the_best_discriminator_restores_the_elbo_exactly() -> None:
    x = data().double()
    # under the exact posterior every single draw is log p(x)
    pair = linear_gaussian(probae.LinearGaussianPosterior)
    exact = probae.log_likelihood(pair, x)
    assert exact.method == "exact"
    estimate = probae.adversarial_elbo(pair, x, 3)
    torch.testing.assert_close(estimate.values, exact.values, rtol=0, atol=1e-10)
    assert estimate.std_error.max() < 1e-10
    # under another encoder it is the ELBO of that one, draw for draw
    pair = linear_gaussian(lambda decoder: probae.GaussianEncoder(probae.MLP(X, (2, Z))))
    plain = probae.Autoencoder(pair.prior, pair.encoder, pair.decoder)
    for seed in (0, 1):
        estimate = probae.adversarial_elbo(pair, x, 4, seed=seed)
        elbo = probae.log_likelihood(plain, x, "elbo", 4, seed=seed)
        torch.testing.assert_close(estimate.values, elbo.values, rtol=0, atol=1e-10)
        torch.testing.assert_close(estimate.std_error, elbo.std_error, rtol=0, atol=1e-10)


def test_a_step_at_the_best_discriminator_is_a_step_up_the_elbo() -> None:
    # as E_q of the gradient of T* in the encoder's parameters is zero, leaving it out is exact
    pair = linear_gaussian(lambda decoder: probae.GaussianEncoder(probae.MLP(X, (2, Z))))
    plain = copy.deepcopy(pair)
    x = data().double()
    prior = dist.Normal(torch.zeros(Z).double(), 1.0)
    # μ ± σ in each dimension: means of quadratics under the Gaussian are exact on these points
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double()

    def codes(pair: probae.Autoencoder) -> tuple[Any, Tensor]:
        normal = pair.encoder(x).base_dist
        return normal, normal.loc + normal.scale * signs[:, None]  # (4, N, Z)

    normal, z = codes(plain)
    kl = torch.distributions.kl_divergence(normal, prior).sum(-1)
    (kl - plain.decoder(z).log_prob(x).mean(0)).mean().backward()
    parts = [*pair.encoder.parameters(), *pair.decoder.parameters()]
    repeated, z = x.repeat(4, 1), codes(pair)[1].flatten(0, 1)
    draws = _Draws(repeated, z, repeated, z)
    _generate(pair, pair.discriminator, repeated, draws, 1.0, _Player(parts, 1.0, torch.optim.SGD))
    for part in ("encoder", "decoder"):
        own, other = getattr(pair, part), getattr(plain, part)
        for after, before in zip(own.parameters(), other.parameters(), strict=True):
            assert before.grad.abs().max() > 1e-3
            torch.testing.assert_close(before - after, before.grad, rtol=0, atol=1e-10)


class Quadratic(nn.Module):
    """Logits that are quadratic in (x, z): logistic regression on all monomials."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows, self.columns = torch.triu_indices(size, size)
        self.linear = nn.Linear(size + len(self.rows), 1)
        nn.init.zeros_(self.linear.weight)

    def forward(self, seen: Tensor) -> Tensor:
        return self.linear(torch.cat([seen, seen[..., self.rows] * seen[..., self.columns]], -1))


def test_a_trained_discriminator_recovers_the_known_quadratic() -> None:
    # z ~ N(a x + b, s²) in one dimension: T* = -log s - (z - a x - b)² / 2s² + z² / 2
    a, b, s = 0.8, 0.3, 0.6
    encoder = probae.GaussianEncoder(probae.MLP(1, (2, 1)))
    with torch.no_grad():
        encoder.network.output.weight.copy_(torch.tensor([[a], [0.0]]))
        encoder.network.output.bias.copy_(torch.tensor([b, math.log(math.expm1(s))]))
    encoder.requires_grad_(False)
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(1),
        encoder,
        probae.GaussianDecoder(probae.MLP(1, 1)),
        discriminator=probae.Discriminator(Quadratic(2), "joint"),
    )
    x = torch.randn(8192, 1, generator=torch.Generator().manual_seed(0))
    for lr in (0.03, 0.003):
        run = probae.fit_adversarial(
            pair, x, epochs=40, batch_size=1024, lr=1e-9, discriminator_lr=lr, progress=False
        )
    # coefficients of x, z, x², xz, z² and 1
    wanted = torch.tensor([-a * b / s**2, b / s**2, -(a**2) / (2 * s**2), a / s**2])
    wanted = torch.cat([wanted, torch.tensor([0.5 - 0.5 / s**2, -math.log(s) - b**2 / (2 * s**2)])])
    linear = pair.discriminator.network.linear
    found = torch.cat([linear.weight[0], linear.bias]).detach()
    # over seeds 0 to 9 the largest error of a coefficient was 0.020, of the KL 0.013 nats
    assert (found - wanted).abs().max() < 0.05
    # and so the KL and the ELBO are nearly those of the encoder
    estimate = probae.adversarial_elbo(pair, x[:1000], 100)
    kl = 0.5 * (s**2 + (a * x[:1000, 0] + b) ** 2 - 1 - 2 * math.log(s))
    assert abs(float((estimate.divergence - kl).mean())) < 0.04
    assert run.history["divergence"][-1] == pytest.approx(float(kl.mean()), abs=0.05)


def test_an_implicit_encoder_learns_a_linear_gaussian_model() -> None:
    truth = probae.PPCA(4, 1)
    truth.set_parameters(torch.tensor([[1.0], [-1.0], [0.5], [0.0]]), torch.zeros(4), 0.5)
    x = probae.sample(truth, 2048, seed=0).x
    torch.manual_seed(0)
    pair = probae.AdversarialVariationalBayes(
        4, 1, hidden=(16,), activation="tanh", discriminator=(32,)
    )
    pair.decoder = probae.GaussianDecoder(probae.MLP(1, 4), learn_scale=True)
    best = probae.log_likelihood(truth, x).mean
    assert probae.log_likelihood(pair, x).mean < best - 1
    run = probae.fit_adversarial(pair, x, epochs=20, lr=3e-3, progress=False)
    ll = probae.log_likelihood(pair, x)  # the decoder is linear: no estimate
    assert ll.method == "exact"
    assert ll.mean > best - 0.2  # over seeds 0 to 7 the worst was 0.11 below
    assert run.kind is Kind.ADVERSARIAL
    # what the discriminator says may lie above log p(x), and here does: it is no bound
    assert probae.adversarial_elbo(pair, x).mean > ll.mean


# two-dimensional data


def ring(n: int) -> Tensor:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius 2."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.randint(8, (n,), generator=generator) / 8
    noise = 0.1 * torch.randn(n, 2, generator=generator)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + noise


def shares(x: Tensor) -> Tensor:
    """Share of draws within four standard deviations of each of the eight modes, (8,)."""
    angle = 2 * math.pi * torch.arange(8) / 8
    modes = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return (torch.cdist(x, modes) < 0.4).double().mean(0)


def test_a_gan_covers_the_modes_of_a_mixture() -> None:
    x = ring(4096)
    torch.manual_seed(0)
    pair = probae.GAN(2, 2, hidden=(64, 64), discriminator=(64, 64))
    z = probae.sample(pair, 2000, seed=0).z
    assert shares(pair.decoder(z).mean.detach()).min() < 0.01
    run = probae.fit_adversarial(
        pair, x, epochs=30, batch_size=256, lr=2e-3, gradient_penalty=0.1, progress=False
    )
    found = shares(pair.decoder(z).mean.detach())
    # over seeds 0 to 3 the least share of a mode, of 0.125, was 0.045, and their sum 0.47: the
    # rest lies between the modes, as a continuous map of a Gaussian has to
    assert found.min() > 0.03
    assert found.sum() > 0.4
    assert run.history["accuracy"][-1] < 0.8


def test_the_codes_of_an_adversarial_autoencoder_have_the_law_of_the_prior() -> None:
    torch.manual_seed(0)
    x = torch.rand(2048, 2) @ torch.randn(2, 5)  # codes are to be bent from a square to a Gaussian
    x = (x - x.mean(0)) / x.std(0)
    pair = probae.AdversarialAutoencoder(
        5, 2, hidden=(64,), discriminator=(64,), likelihood_options={"scale": 0.5}
    )

    def distance() -> float:
        with torch.no_grad():
            return distance_to_normal(pair.encoder(x).mean)

    assert distance() > 0.3
    probae.fit_adversarial(pair, x, epochs=25, lr=2e-3, progress=False)
    # over seeds 0 to 9 it was 0.065 at most; draws from the prior have 0.04
    assert distance() < 0.1
    assert distance_to_normal(torch.randn(2048, 2)) < 0.05
    error = (probae.reconstruct(pair, x).mean - x).square().mean()
    assert error < 0.01  # of a variance of 1


def distance_to_normal(z: Tensor) -> float:
    """Largest Kolmogorov-Smirnov distance to N(0, 1), over 16 directions of the plane."""
    angle = math.pi * torch.arange(16) / 16
    projected = (z @ torch.stack([angle.cos(), angle.sin()])).sort(0).values.double()
    law = torch.special.ndtr(projected)
    steps = torch.arange(len(z) + 1).double()[:, None] / len(z)
    return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())


# what is true of every adversarial pair


def test_kind_is_adversarial_by_its_discriminator(pair: probae.Autoencoder) -> None:
    assert pair.kind is Kind.ADVERSARIAL
    assert not pair.kind.is_lower_bound
    if isinstance(pair, probae.GAN):
        pair.discriminator = None
        with pytest.raises(ValueError, match="NoEncoder only beside a discriminator"):
            _ = pair.kind
        return
    pair.discriminator = None
    kinds = {
        probae.PointEncoder: Kind.MAP_JOINT,
        probae.GaussianEncoder: Kind.ELBO,
        probae.ImplicitEncoder: Kind.ENERGY,
    }
    assert pair.kind is kinds[type(pair.encoder)]


@pytest.mark.parametrize("shape", [(X,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
def test_parts_keep_leading_dimensions(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    pair = PRESETS[name](shape).to(dtype)
    x = torch.randn(4, 3, *shape, dtype=dtype)
    z = torch.randn(4, 3, Z, dtype=dtype)
    logits = pair.discriminator(x, z).logits
    assert (logits.shape, logits.dtype) == ((4, 3), dtype)
    torch.testing.assert_close(pair.discriminator(x[2], z[2]).logits, logits[2])
    if isinstance(pair, probae.GAN):
        return
    law = pair.encoder(x)
    assert (law.batch_shape, law.event_shape) == ((4, 3), (Z,))
    assert law.rsample((2,)).shape == (2, 4, 3, Z)
    assert law.expand((6, 4, 3)).sample().shape == (6, 4, 3, Z)
    draw = law.rsample()
    assert draw.dtype == dtype
    assert draw.requires_grad
    assert name == "aae" or not law.sample().requires_grad


def test_draws_of_an_implicit_encoder_are_of_their_own_datum() -> None:
    torch.manual_seed(0)
    encoder = probae.ImplicitEncoder(probae.MLP(X + 3, Z, (6,)), X, Z, noise_dim=3)
    x = data(2)
    law = encoder(torch.stack([x[0], x[1]]))
    alone = encoder(x[1:])
    together, single = law.sample((4000,))[:, 1], alone.sample((4000,))[:, 0]
    # 5 standard errors of a difference of means in 2 dimensions: fails once in a million seeds
    error = ((together.var(0) + single.var(0)) / 4000).sqrt()
    assert ((together.mean(0) - single.mean(0)).abs() < 5 * error).all()
    assert (law.sample().std(0) > 0).all()
    with pytest.raises(NotImplementedError, match="draws and no density"):
        law.log_prob(torch.zeros(2, Z))


def test_training_moves_every_parameter(pair: probae.Autoencoder) -> None:
    before = copy.deepcopy(pair.state_dict())
    pyro.param("mine", torch.ones(2))
    modes = {name: module.training for name, module in pair.named_modules()}
    stream = torch.get_rng_state()
    x = data(20)
    kept = x.clone()
    penalty = {"gradient_penalty": 0.5} if isinstance(pair, probae.GAN) else {"weight": 2.0}
    run = probae.fit_adversarial(pair, x, epochs=3, batch_size=8, progress=False, **penalty)
    for name, parameter in pair.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved != (isinstance(pair, probae.GAN) and name == "decoder.raw_scale"), name
        assert parameter.grad is None, name
        assert parameter.requires_grad, name
    assert list(pyro.get_param_store()) == ["mine"]
    assert torch.equal(torch.get_rng_state(), stream)
    assert {name: module.training for name, module in pair.named_modules()} == modes
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert run.history["epoch"] == [1, 2, 3]
    assert all(len(column) == 3 for column in run.history.values())
    assert all(math.isfinite(value) for column in run.history.values() for value in column)
    assert 0 <= run.history["accuracy"][-1] <= 1
    if not isinstance(pair, probae.GAN):
        last = {name: column[-1] for name, column in run.history.items()}
        loss = 2.0 * last["divergence"] - last["reconstruction"]
        assert last["loss"] == pytest.approx(loss, rel=1e-5)
    assert "says nothing about log p(x)" in repr(run)


def test_training_is_deterministic_under_a_seed(pair: probae.Autoencoder) -> None:
    pairs, runs = [copy.deepcopy(pair) for _ in range(3)], []
    for twin, seed in zip(pairs, (5, 5, 6), strict=True):
        torch.rand(3)  # the global stream does not matter
        runs.append(
            probae.fit_adversarial(
                twin, data(20), epochs=2, batch_size=8, seed=seed, progress=False
            )
        )
    states = [twin.state_dict() for twin in pairs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    histories = [{k: v for k, v in run.history.items() if k != "seconds"} for run in runs]
    assert histories[0] == histories[1]
    # and without one the global stream is drawn from
    for twin in (copy.deepcopy(pair), copy.deepcopy(pair)):
        torch.manual_seed(3)
        stream = torch.get_rng_state()
        probae.fit_adversarial(twin, data(20), epochs=1, seed=None, progress=False)
        assert not torch.equal(torch.get_rng_state(), stream)


def test_a_run_that_diverges_leaves_the_last_good_epoch(pair: probae.Autoencoder) -> None:
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(FloatingPointError, match=r"epoch 1.*parameters of epoch 0 again; lower lr"):
        probae.fit_adversarial(
            pair, data(20), epochs=3, batch_size=5, lr=1e38, discriminator_lr=1e38, progress=False
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items())


def test_an_interrupt_leaves_a_whole_epoch() -> None:
    class Interrupting(torch.utils.data.Dataset):
        """Data that are interrupted in the second epoch."""

        presented = 0

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Tensor:
            self.presented += 1
            if self.presented > 2 + 15:  # the first two are looked at beforehand
                raise KeyboardInterrupt
            return data(10)[index]

    torch.manual_seed(0)
    pair = PRESETS["aae"]()
    twin = copy.deepcopy(pair)
    with pytest.raises(KeyboardInterrupt):
        probae.fit_adversarial(pair, Interrupting(), epochs=3, batch_size=5, progress=False)
    probae.fit_adversarial(twin, data(10), epochs=1, batch_size=5, progress=False)
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in pair.state_dict().items())


def test_evaluation_needs_no_encoder(pair: probae.Autoencoder) -> None:
    x, gan = data(), isinstance(pair, probae.GAN)
    before = copy.deepcopy(pair.state_dict())
    for method in ("auto", "iwae", "elbo"):
        with pytest.raises(ValueError, match=r"kind ADVERSARIAL.*use method='ais'"):
            probae.log_likelihood(pair, x, method)
    with pytest.raises(ValueError, match=r"is of kind ADVERSARIAL.*fit_adversarial"):
        probae.fit(pair, x, epochs=1, progress=False)
    annealing = probae.Annealing(20, num_pilot=10)
    ll = probae.log_likelihood(pair, x, "ais", annealing=annealing)
    assert ll.values.isfinite().all()
    proposal = probae.fit_proposal(pair, x, epochs=1, progress=False)
    assert probae.log_likelihood(pair, x, "iwae", 10, proposal=proposal).is_bound
    assert probae.bdmc(pair, 3, 4, annealing=annealing).lower.isfinite().all()
    assert probae.sample(pair, 4, seed=0).x.shape == (4, X)
    if gan:
        assert probae.posterior_samples(pair, x[:1], 5, warmup=5).z.isfinite().all()
    for call in (
        lambda: probae.reconstruct(pair, x).mean,
        lambda: torch.tensor(probae.active_units(pair, x)),
        lambda: torch.from_numpy(probae.to_arviz(pair, x)["posterior"]["z"].values),
    ):
        if gan:
            with pytest.raises(ValueError, match=r"pair has no encoder.*method='ais'"):
                call()
        else:
            assert call().isfinite().all()
    assert "log_likelihood" not in (() if gan else probae.to_arviz(pair, x).groups())
    if not gan:
        assert probae.adversarial_elbo(pair, x, 5).values.isfinite().all()
    after = pair.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_pictures_and_descriptions_show_every_pair(pair: probae.Autoencoder) -> None:
    assert re.search(r"kind +ADVERSARIAL: the loss holds an estimated density ratio", repr(pair))
    assert "ADVERSARIAL" in pair._repr_html_()
    drawn = probae.render(pair, text=True)
    assert "x ~ Normal (5) given z, observed" in drawn
    assert probae.trace_shapes(pair).startswith("model")


def test_saved_pairs_keep_their_discriminator(pair: probae.Autoencoder, tmp_path: Path) -> None:
    probae.fit_adversarial(pair, data(20), epochs=1, progress=False)
    path = probae.save(pair, tmp_path / "pair")
    twin = probae.load(path, copy.deepcopy(pair))
    assert any(name.startswith("discriminator.") for name in twin.state_dict())
    assert all(torch.equal(t, pair.state_dict()[n]) for n, t in twin.state_dict().items())


def test_annealing_agrees_with_the_exact_evidence_of_a_linear_gan() -> None:
    torch.manual_seed(0)
    pair = probae.GAN(X, Z, hidden=(), discriminator=(8,)).double()
    x = probae.sample(pair, 10, seed=1).x
    exact = probae.log_likelihood(pair, x)
    assert (exact.method, exact.is_bound) == ("exact", False)
    ll = probae.log_likelihood(pair, x, "ais", 32, annealing=probae.Annealing(100, num_pilot=20))
    error = float(ll.std_error.square().sum().sqrt()) / len(x)
    assert error < 0.05
    assert abs(ll.mean - exact.mean) < 5 * error  # fails once in 1.7 million seeds


# refusals


def assembled(**parts: Any) -> probae.Autoencoder:
    """An adversarial pair with some of its parts replaced."""
    chosen: dict[str, Any] = {
        "prior": probae.StandardNormalPrior(Z),
        "encoder": probae.PointEncoder(probae.MLP(X, Z)),
        "decoder": probae.GaussianDecoder(probae.MLP(Z, X)),
        "discriminator": probae.Discriminator(probae.MLP(Z, 1), "code"),
    }
    return probae.Autoencoder(**(chosen | parts))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "vae": (lambda: probae.VAE(X, Z), "discriminator=None.*train this one with probae.fit"),
    "corruption": (
        lambda: assembled(corruption=probae.GaussianNoise(0.1)),
        "pair has a corruption, which adversarial training leaves out",
    ),
    "flat prior": (lambda: assembled(prior=probae.FlatPrior(Z)), "flat prior.*prior='normal'"),
    "learned prior": (
        lambda: probae.AdversarialAutoencoder(X, Z, posterior="gaussian", prior="mixture"),
        r"prior learns its parameters.*pair.prior.requires_grad_\(False\)",
    ),
    "gan with encoder": (
        lambda: assembled(discriminator=probae.Discriminator(probae.MLP(X, 1), "data")),
        "encoder must be NoEncoder.*got PointEncoder and sees='data'",
    ),
    "no encoder": (
        lambda: assembled(encoder=probae.NoEncoder()),
        "encoder must be NoEncoder.*got NoEncoder and sees='code'",
    ),
    "discrete code": (
        lambda: assembled(
            prior=probae.BernoulliPrior(Z), encoder=probae.BernoulliEncoder(probae.MLP(X, Z))
        ),
        "encoder must make draws that pass gradients",
    ),
    "no mean": (
        lambda: probae.GAN(
            X, Z, likelihood="categorical", likelihood_options={"num_classes": 3}, **SMALL
        ),
        "decoder must have a mean that passes gradients",
    ),
    "nothing to train": (
        lambda: PRESETS["aae"]().requires_grad_(False),
        "must have parameters that require gradients",
    ),
    "not a pair": (lambda: nn.Linear(2, 2), "pair must be a probae.Autoencoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pairs_that_would_be_left_untrained_are_refused(name: str) -> None:
    build, message = REFUSED[name]
    pair = build()
    with pytest.raises(ValueError, match=message):
        probae.fit_adversarial(pair, data(), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an int >= 1"),
        ({"discriminator_steps": 0}, "discriminator_steps must be an int >= 1"),
        ({"lr": 0.0}, "lr must be a finite number > 0"),
        ({"discriminator_lr": -1.0}, "discriminator_lr must be a finite number > 0"),
        ({"weight": 0.0}, "weight must be a finite number > 0"),
        ({"gradient_penalty": -1.0}, "gradient_penalty must be a finite number >= 0"),
        ({"gradient_penalty": 1.0}, "gradient_penalty must be left at 0 .* sees='code'"),
        ({"optimizer": "adam"}, "optimizer must be called with parameters and lr"),
        ({"optimizer": lambda parameters, lr: None}, "must make a torch.optim.Optimizer"),
        ({"seed": 1.5}, "seed must be a 64-bit int"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probae.fit_adversarial(PRESETS["aae"](), data(), progress=False, **options)


def test_a_weight_of_a_gan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be left at 1 .* sees='data', got 2.0"):
        probae.fit_adversarial(PRESETS["gan"](), data(), weight=2.0, progress=False)


def test_bad_data_are_refused() -> None:
    pair = PRESETS["aae"]()
    for x, message in (
        (torch.zeros(3, X + 1), r"x must have shape \(N, 5\)"),
        (torch.full((3, X), math.nan), "x"),
        (torch.zeros(0, X), "x"),
    ):
        with pytest.raises(ValueError, match=message):
            probae.fit_adversarial(pair, x, progress=False)
        with pytest.raises(ValueError, match=message):
            probae.adversarial_elbo(pair, x)


def test_no_gradients_are_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="fit_adversarial needs gradients"):
        probae.fit_adversarial(PRESETS["aae"](), torch.zeros(3, X), progress=False)


def test_training_runs_inside_no_grad() -> None:
    with torch.no_grad():
        probae.fit_adversarial(PRESETS["aae"](), data(), epochs=1, progress=False)


def test_the_estimate_of_a_gan_or_a_vae_is_refused() -> None:
    with pytest.raises(ValueError, match="sees='code' or 'joint', got sees='data'"):
        probae.adversarial_elbo(PRESETS["gan"](), data())
    with pytest.raises(ValueError, match=r"pair must have a probae.Discriminator"):
        probae.adversarial_elbo(probae.VAE(X, Z), data())
    with pytest.raises(ValueError, match="pair has a corruption"):
        probae.adversarial_elbo(assembled(corruption=probae.GaussianNoise(0.1)), data())
    with pytest.raises(ValueError, match="num_samples must be an int >= 1"):
        probae.adversarial_elbo(PRESETS["avb"](), data(), 0)
    assert probae.adversarial_elbo(PRESETS["avb"](), data(), 1).std_error.isnan().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: probae.Discriminator(probae.MLP(3, 1), "x"), "sees must be one of data, code"),
        (lambda: probae.Discriminator(3, "code"), "network must be a torch.nn.Module, got int"),
        (
            lambda: assembled(discriminator=probae.Discriminator(probae.MLP(Z, 2), "code")),
            r"network must have output of shape \(\.\.\., 1\), the logit, got \(3, 2\)",
        ),
        (lambda: assembled(discriminator=3), "discriminator must be a torch.nn.Module or None"),
        (lambda: assembled(discriminator=nn.Linear(2, 1)), "discriminator does not fit"),
        (
            lambda: assembled(encoder=probae.NoEncoder(), discriminator=None),
            "encoder may be NoEncoder only beside a discriminator",
        ),
        (
            lambda: assembled(encoder=probae.ImplicitEncoder(probae.MLP(X + 1, 4), X, Z, 1)),
            r"network must have output of shape \(\.\.\., 2\), z, got",
        ),
        (lambda: probae.ImplicitEncoder(3, X, Z, 1), "network must be a torch.nn.Module, got int"),
        (
            lambda: probae.ImplicitEncoder(probae.MLP(X + 1, Z), X, Z, 0),
            "noise_dim must be an int >= 1",
        ),
        (
            lambda: probae.GAN(X, Z, discriminator=probae.Discriminator(probae.MLP(Z, 1), "code")),
            "Discriminator with sees='data', got Discriminator with sees='code'",
        ),
        (lambda: probae.GAN(X, Z, discriminator=nn.Linear(X, 1)), "sees='data', got Linear"),
        (lambda: probae.GAN(X, Z, prior="vamp"), "prior"),
        (lambda: probae.GAN(X, 0), "z_dim must be an int >= 1"),
        (
            lambda: probae.AdversarialAutoencoder(X, Z, posterior="laplace"),
            "posterior must be 'point', 'gaussian' or 'implicit', got 'laplace'",
        ),
        (
            lambda: probae.AdversarialAutoencoder(X, Z, noise_dim=3),
            "noise_dim goes with posterior='implicit', got posterior='point'",
        ),
        (
            lambda: probae.AdversarialAutoencoder(
                (1, 8, 8), Z, posterior="implicit", channels=(4,)
            ),
            "channels must be",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_image_presets_train() -> None:
    x = torch.rand(6, 1, 8, 8)
    pairs = [
        probae.GAN((1, 8, 8), Z, hidden=(), channels=(4,), discriminator=(8,)),
        probae.AdversarialAutoencoder((1, 8, 8), Z, hidden=(), channels=(4,), discriminator=(8,)),
        probae.AdversarialVariationalBayes(
            (1, 8, 8), Z, hidden=(6,), channels=(4,), discriminator=(8,)
        ),
    ]
    for pair in pairs:
        run = probae.fit_adversarial(pair, x, epochs=1, progress=False)
        assert math.isfinite(run.history["loss"][0])
        assert probae.sample(pair, 2).x.shape == (2, 1, 8, 8)


def test_a_discriminator_that_shares_the_encoder_is_refused() -> None:
    network = probae.MLP(5, 2, (4,))
    judge = probae.Discriminator(nn.Sequential(nn.Linear(2, 1)), "code")
    made = probae.Autoencoder(
        probae.StandardNormalPrior(2),
        probae.PointEncoder(network),
        probae.GaussianDecoder(probae.MLP(2, 5)),
        discriminator=judge,
    )
    judge.network.append(nn.Linear(1, 1))
    judge.network.insert(0, nn.Linear(2, 2))
    judge.shared = network
    with pytest.raises(ValueError, match="discriminator must not share parameters"):
        probae.fit_adversarial(made, data(20), epochs=1, progress=False)


def test_grey_pixels_have_no_adversarial_elbo_under_bernoulli() -> None:
    made = probae.AdversarialVariationalBayes(5, 2, likelihood="bernoulli", hidden=(4,))
    with pytest.raises(ValueError, match="grey pixels have no Bernoulli log-likelihood"):
        probae.adversarial_elbo(made, torch.full((3, 5), 0.5))
