"""Annealed importance sampling against exact likelihoods."""

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch

import probae
from probae import Annealing, Autoencoder
from probae.annealing import anneal
from probae.autoencoder import frozen

D, Z = 20, 5


def linear_pair(posterior: str = "exact") -> probae.PPCA:
    torch.manual_seed(0)
    pair = probae.PPCA(D, Z, posterior=posterior, scale=0.5)
    pair.set_parameters(torch.randn(D, Z), torch.randn(D), 0.5)
    return pair


@pytest.mark.parametrize("start", ["prior", "proposal"])
def test_annealing_reaches_the_exact_likelihood_from_below(start: str) -> None:
    # the last gap is 0.3 and 0.85 nats, ± 0.2 over ten seeds
    pair = linear_pair()
    x = probae.sample(pair, 48, seed=1).x
    exact = probae.log_likelihood(pair, x, "exact").values
    proposal = None
    if start == "proposal":  # a poor one: N(0.5, 2.1²) whatever x is
        proposal = probae.GaussianEncoder(probae.MLP(D, (2, Z)))
        with torch.no_grad():
            proposal.network.output.weight.zero_()
            proposal.network.set_bias(torch.tensor([[0.5], [2.0]]).expand(2, Z))
    gaps = []
    for steps in (10, 40, 160):
        options = Annealing(steps, num_leapfrogs=6, num_pilot=20)
        ll = probae.log_likelihood(pair, x, "ais", 8, proposal=proposal, annealing=options)
        gaps.append(float((exact - ll.values).mean()))
        assert ll.is_bound
        assert ll.method == "ais"
        assert ll.acceptance is not None
        assert 0.4 < float(ll.acceptance.mean()) < 0.9
        assert "ais, 8 samples, lower bound, median ESS" in repr(ll)
    assert gaps[0] > gaps[1] > gaps[2] > -0.1, gaps
    assert gaps[2] < 1.0, gaps


def test_bidirectional_bounds_bracket_the_exact_likelihood_and_close() -> None:
    pair = linear_pair()
    gaps = []
    for steps in (20, 80, 500):
        options = Annealing(steps, num_leapfrogs=5, num_pilot=20)
        sandwich = probae.bdmc(pair, 32, 4, annealing=options, seed=3)
        exact = probae.log_likelihood(pair, sandwich.x, "exact").values
        assert (sandwich.lower - exact).mean() < 0 < (sandwich.upper - exact).mean()
        gaps.append(sandwich.gap)
        assert 0 < sandwich.gap_std_error < 0.5 * gaps[0]
        assert "bounds on log p(x) in expectation" in repr(sandwich)
        # the forward half is what log_likelihood gives, up to noise
        ll = probae.log_likelihood(pair, sandwich.x, "ais", 4, annealing=options)
        assert ll.mean == pytest.approx(float(sandwich.lower.mean()), abs=0.5 * gaps[0])
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 1


def test_five_hundred_temperatures_are_within_half_a_nat_of_exact() -> None:
    # with 64 chains each datum, below 0.36 in seven trials with other data and seeds; with the
    # default 16 single data may be a nat off, and their mean below 0.2 in eight trials
    pair = linear_pair()
    x = probae.sample(pair, 8, seed=1).x
    exact = probae.log_likelihood(pair, x, "exact")
    ll = probae.log_likelihood(pair, x, "ais", 64)  # 500 temperatures
    assert (ll.values - exact.values).abs().max() < 0.5
    assert abs(ll.mean - exact.mean) < 0.1
    default = probae.log_likelihood(pair, x, "ais")
    assert default.num_samples == 16
    assert abs(default.mean - exact.mean) < 0.5
    assert ((default.std_error < 1) | default.std_error.isinf()).all()


def test_ais_warns_where_one_chain_carries_the_weight() -> None:
    # 784 dimensions that are sharply determined, and few temperatures: tens of nats too low
    torch.manual_seed(0)
    pair = probae.PPCA(300, 5, scale=0.01)
    x = probae.sample(pair, 4, seed=1).x
    options = Annealing(30, num_leapfrogs=3, num_pilot=10)
    with pytest.warns(probae.LikelihoodWarning, match="one of 16 chains .*num_temperatures"):
        ll = probae.log_likelihood(pair, x, "ais", annealing=options)
    exact = probae.log_likelihood(pair, x).values
    assert (exact - ll.values).max() > 5
    assert ll.unreliable == float((ll.ess < 2).double().mean()) > 0
    assert ll.std_error[ll.ess < 2].isinf().all()
    assert ll.std_error[ll.ess >= 2].isfinite().all()


def test_a_mixture_under_independent_is_annealed() -> None:
    class Mixtures(torch.nn.Module):
        def forward(self) -> torch.distributions.Distribution:
            weights = dist.Categorical(torch.full((2, 3), 1 / 3))
            parts = dist.Normal(torch.tensor([[-2.0, 0.0, 2.0]] * 2), 0.5)
            return dist.MixtureSameFamily(weights, parts).to_event(1)

    torch.manual_seed(0)
    pair = Autoencoder(
        Mixtures(),
        probae.GaussianEncoder(probae.MLP(3, (2, 2))),
        probae.GaussianDecoder(probae.MLP(2, 3), scale=0.7),
    )
    x = torch.randn(3, 3)
    axis = torch.linspace(-6, 6, 401)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = pair.prior().log_prob(grid)[:, None] + pair.decoder(grid[:, None]).log_prob(x)
    exact = log_joint.logsumexp(0) + 2 * math.log(12 / 400)
    ll = probae.log_likelihood(pair, x, "ais", 100, annealing=Annealing(60))
    assert (ll.values - exact).abs().max() < 0.2  # four standard errors


def test_simulation_is_reproducible_and_can_start_at_a_proposal() -> None:
    pair = linear_pair("diagonal")
    options = Annealing(10, num_leapfrogs=3, num_pilot=5, start="encoder")
    first, second, other = (
        probae.bdmc(pair, 5, 2, annealing=options, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.lower, second.lower)
    assert not torch.equal(first.x, other.x)
    proposal = probae.GaussianEncoder(probae.MLP(D, (2, Z)))
    assert probae.bdmc(pair, 5, 2, annealing=options, proposal=proposal).lower.shape == (5,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pair: probae.bdmc(pair, 1), "num_data must be an int >= 2"),
        (lambda pair: probae.bdmc(pair, 5, 0), "num_chains must be an int >= 1"),
        (lambda pair: probae.bdmc(pair, 5, annealing=10), "annealing must be a probae.Annealing"),
        (lambda pair: probae.bdmc(pair, 5, proposal=3), "proposal must be an encoder"),
        (lambda pair: probae.bdmc(3, 5), "pair must be a probae.Autoencoder"),
        (
            lambda pair: probae.bdmc(probae.UndercompleteAutoencoder(5, 2)),
            "nothing can be drawn from its flat prior",
        ),
        (
            lambda pair: probae.bdmc(probae.SemanticHashing(5, 2, posterior="bernoulli")),
            "needs a prior with a density",
        ),
    ],
)
def test_bad_arguments_of_the_sandwich(call: Callable[[Autoencoder], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(linear_pair())


def test_weights_are_unbiased() -> None:
    # E w = p(x) at any schedule, though few temperatures make single weights bad; z-test of the
    # mean of 20000 chains on 2 data, fails by chance in about 1 of 8000 seeds
    torch.manual_seed(0)
    pair = probae.PPCA(3, 1, scale=0.9)
    pair.set_parameters(torch.full((3, 1), 0.6), torch.zeros(3), 0.9)
    pair = pair.double()
    x = torch.tensor([[0.4, -0.2, 0.3], [1.0, 1.0, -0.5]], dtype=torch.float64)
    exact = probae.log_likelihood(pair, x, "exact").values
    options = Annealing(num_temperatures=3, num_leapfrogs=3, schedule="linear", num_pilot=5)
    with frozen(pair, 0):
        log_weights = anneal(pair, x, 20_000, options).log_weights
    ratio = (log_weights - exact).exp()
    error = (ratio.mean(0) - 1).abs() / (ratio.std(0) / math.sqrt(len(ratio)))
    assert (error < 4).all()
    assert (ratio.std(0) > 0.05).all()  # so the test can fail


@pytest.mark.parametrize(
    "prior",
    [
        lambda: probae.LaplacePrior(1, rate=1.5),
        lambda: probae.StudentTPrior(1),
        lambda: probae.ExponentialPrior(1, rate=0.7),
        lambda: probae.GaussianMixturePrior(1, components=3),
        lambda: probae.FlowPrior(2, transforms=1, hidden=(4,)),
    ],
    ids=["laplace", "student-t", "exponential", "mixture", "flow"],
)
def test_every_continuous_prior_against_quadrature(prior: object) -> None:
    torch.manual_seed(2)
    prior = prior()
    k = prior().event_shape[0]
    decoder = probae.GaussianDecoder(probae.MLP(k, 3, (4,), "tanh"), scale=0.6)
    encoder = probae.GaussianEncoder(probae.MLP(3, (2, k)))
    if isinstance(prior, probae.ExponentialPrior):
        encoder = probae.LogNormalEncoder(probae.MLP(3, (2, k)))
    pair = Autoencoder(prior, encoder, decoder).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    axis = torch.linspace(-25, 25, 50_001, dtype=torch.float64)
    if k == 2:
        axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    if isinstance(prior, probae.ExponentialPrior):
        axis = torch.linspace(1e-9, 40, 50_001, dtype=torch.float64)
    grid = axis[:, None] if k == 1 else torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = pair.prior().log_prob(grid)[:, None] + pair.decoder(grid[:, None]).log_prob(x)
    exact = log_joint.logsumexp(0) + k * math.log(float(axis[1] - axis[0]))
    for start in ("prior", "encoder"):
        steps = 40 if start == "prior" else 160
        options = Annealing(steps, num_leapfrogs=5, num_pilot=15, start=start)
        ll = probae.log_likelihood(pair, x, "ais", 200, annealing=options)
        # four standard errors of the estimate, and the error of quadrature; an encoder that nobody
        # trained may miss mass, then the estimate is too low
        assert (ll.values - exact < 4 * ll.std_error + 2e-3).all()
        assert (exact - ll.values < (4 * ll.std_error + 2e-3 if start == "prior" else 2)).all()
        assert (ll.std_error < (0.1 if start == "prior" else 0.3)).all()


def test_point_codes_and_penalties_are_measured_without_an_encoder() -> None:
    torch.manual_seed(0)
    pair = probae.UndercompleteAutoencoder(6, 2, hidden=(), prior="normal")
    x = probae.sample(pair, 20, seed=1).x
    exact = probae.log_likelihood(pair, x, "exact")
    ll = probae.log_likelihood(
        pair, x, "ais", 8, annealing=Annealing(60, num_leapfrogs=5, num_pilot=20)
    )
    assert abs(ll.mean - exact.mean) < 0.1
    penalised = Autoencoder(
        pair.prior,
        pair.encoder,
        pair.decoder,
        factor=probae.ContractivePenalty(pair.encoder, 3.0),
    )
    again = probae.log_likelihood(
        penalised, x, "ais", 8, annealing=Annealing(60, num_leapfrogs=5, num_pilot=20)
    )
    assert torch.equal(ll.values, again.values)


def test_annealing_is_deterministic_and_leaves_the_pair_as_it_was() -> None:
    pair, x = probae.VAE(6, 2, hidden=(5,)), torch.rand(5, 6).round()
    stream = torch.get_rng_state()
    runs = [
        probae.log_likelihood(pair, x, "ais", 3, annealing=Annealing(5), seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].values, runs[1].values)
    assert not torch.equal(runs[0].values, runs[2].values)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures must be an int >= 1"),
        ({"num_leapfrogs": 1.5}, "num_leapfrogs must be an int >= 1"),
        ({"start": "posterior"}, "start must be 'prior' or 'encoder'"),
        ({"schedule": "cubic"}, "schedule must be 'sigmoid' or 'linear'"),
        ({"target_acceptance": 1.5}, r"target_acceptance must be in \[0.1, 0.95\]"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annealing(**options)


def test_what_cannot_be_annealed_is_refused() -> None:
    x = torch.rand(4, 6).round()
    bits = probae.SemanticHashing(6, 3, posterior="bernoulli")
    with pytest.raises(ValueError, match="method='ais' needs a prior with a density"):
        probae.log_likelihood(bits, x, "ais")
    spikes = probae.SparseAutoencoder(6, 3, prior="spike-and-slab", posterior="noisy-gate")
    with pytest.raises(ValueError, match="method='ais' needs a prior with a density"):
        probae.log_likelihood(spikes, x, "ais")
    point = probae.SparseAutoencoder(6, 3)
    with pytest.raises(ValueError, match="start='encoder' needs an encoder with a density"):
        probae.log_likelihood(point, x, "ais", annealing=Annealing(start="encoder"))
    with pytest.raises(ValueError, match=r"annealing must be a probae\.Annealing, got int"):
        probae.log_likelihood(point, x, "ais", annealing=100)
    with pytest.raises(ValueError, match="prior is flat"):
        probae.log_likelihood(probae.UndercompleteAutoencoder(6, 3), x, "ais")


def test_an_encoder_that_was_given_masks_can_be_the_start() -> None:
    corruption = probae.Masking(0.3, known=True)
    pair = probae.DenoisingVAE(
        6, 2, corruption=corruption, hidden=(5,), likelihood="gaussian", prior="vamp"
    )
    x = torch.randn(8, 6)
    pair.initialize(x)
    options = Annealing(20, start="encoder")
    assert probae.log_likelihood(pair, x, "ais", 4, annealing=options).values.isfinite().all()


def test_weights_are_unbiased_under_other_priors_and_starts() -> None:
    # z-tests as above, against quadrature; 6 of them, each fails by chance in 1 of 16000 seeds
    torch.manual_seed(0)
    decoder = probae.GaussianDecoder(probae.MLP(1, 3, (4,), "tanh"), scale=0.8)
    x = torch.tensor([[0.4, -0.2, 0.3], [1.0, 1.0, -0.5]], dtype=torch.float64)
    options = {"num_temperatures": 4, "num_leapfrogs": 3, "num_pilot": 5}
    cases = [
        (probae.LaplacePrior(1, rate=1.2), probae.GaussianEncoder, "prior"),
        (probae.LaplacePrior(1, rate=1.2), probae.LaplaceEncoder, "encoder"),
        (probae.ExponentialPrior(1, rate=1.2), probae.LogNormalEncoder, "prior"),
    ]
    for prior, encoder, start in cases:
        pair = Autoencoder(prior, encoder(probae.MLP(3, (2, 1))), decoder).double()
        low = 1e-9 if isinstance(prior, probae.ExponentialPrior) else -30.0
        axis = torch.linspace(low, 30, 200_001, dtype=torch.float64)[:, None]
        with torch.no_grad():
            joint = pair.prior().log_prob(axis)[:, None] + pair.decoder(axis[:, None]).log_prob(x)
        exact = joint.logsumexp(0) + math.log((30 - low) / 200_000)
        with frozen(pair, 0):
            log_weights = anneal(pair, x, 20_000, Annealing(start=start, **options)).log_weights
        ratio = (log_weights - exact).exp()
        error = (ratio.mean(0) - 1).abs() / (ratio.std(0) / math.sqrt(len(ratio)))
        assert (error < 4).all(), (type(prior).__name__, start, error)
        pair.float()
