"""Importance weights, bounds and annealing, of the library's own code, against exact sums.

Expectations over codes are taken by enumeration or quadrature: the encoder's draws are replaced by
every outcome in turn, and what the library makes of each is summed with its probability.
"""

import itertools
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn

import probae
from probae import Annealing, Autoencoder
from probae.autoencoder import local_parameters
from probae.terms import elbo_terms, log_weights

from .conftest import CASES, Case

X_DIM = 4


def binary(n: int) -> Tensor:
    return torch.rand(n, X_DIM, dtype=torch.float64).round()


def one_hot_pair(states: int) -> Autoencoder:
    torch.manual_seed(4)
    pair = Autoencoder(
        probae.CategoricalPrior(states),
        probae.CategoricalEncoder(probae.MLP(X_DIM, states, (5,))),
        probae.BernoulliDecoder(probae.MLP(states, X_DIM)),
    ).double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.normal_(std=0.6)
    return pair


def bits_pair(corruption: nn.Module | None = None) -> Autoencoder:
    torch.manual_seed(4)
    return Autoencoder(
        probae.BernoulliPrior(3, 0.3),
        probae.BernoulliEncoder(probae.MLP(X_DIM, 3)),
        probae.BernoulliDecoder(probae.MLP(3, X_DIM)),
        corruption,
    ).double()


def outcomes(bits: int) -> Tensor:
    """Every vector of that many bits, (2**bits, bits)."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)), dtype=torch.float64)


class Law(dist.TorchDistribution):
    """A law whose draws are dictated, where they have the shape that is asked for."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, law: Any, draws: Tensor) -> None:
        self.law, self.draws = law, draws
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.law.support

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        asked = self._extended_shape(sample_shape)
        return self.draws if asked == self.draws.shape else self.law.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Law":
        return Law(self.law.expand(Size(batch_shape)), self.draws)


class Dictated(nn.Module):
    """A part whose draws are dictated."""

    def __init__(self, part: nn.Module, draws: Tensor) -> None:
        super().__init__()
        self.part, self.draws = part, draws

    def forward(self, x: Tensor) -> Law:
        return Law(self.part(x), self.draws)


def dictated(pair: Autoencoder, z: Tensor, x_tilde: Tensor | None = None) -> Autoencoder:
    """The same pair, its encoder drawing these z, and its corruption these x_tilde."""
    noise = None if x_tilde is None else Dictated(pair.corruption, x_tilde)
    return Autoencoder(pair.prior, Dictated(pair.encoder, z), pair.decoder, noise)


# ---- T26: importance weights have the mean p(x) -------------------------------------------------


@pytest.mark.parametrize("code", ["bits", "one-hot"])
def test_weights_of_discrete_codes_have_the_mean_of_the_evidence(code: str) -> None:
    pair = bits_pair() if code == "bits" else one_hot_pair(5)
    z = outcomes(3) if code == "bits" else torch.eye(5, dtype=torch.float64)
    forced = dictated(pair, z)
    for x in binary(6).split(1):
        copies = x.expand(len(z), -1)  # one datum for each outcome
        with local_parameters(), torch.no_grad():
            log_w = log_weights(forced.model, forced.guide, copies)[0]
            log_q = pair.encoder(x).log_prob(z)
        exact = float(probae.log_likelihood(pair, x, "exact").values.exp())
        assert float((log_q + log_w).exp().sum()) == pytest.approx(exact, rel=1e-12)
        values = probae.log_likelihood(forced, copies, "iwae", 1).values
        assert float((log_q + values).exp().sum()) == pytest.approx(exact, rel=1e-12)


def test_weights_of_a_corrupted_pair_have_the_mean_of_the_evidence() -> None:
    pair = bits_pair(probae.BitFlip(0.2, 0.3))
    z, noisy = outcomes(3), outcomes(X_DIM)
    z, noisy = z.repeat(len(noisy), 1), noisy.repeat_interleave(len(z), 0)
    forced = dictated(pair, z, noisy)
    for x in binary(3).split(1):
        copies = x.expand(len(z), -1)
        with local_parameters(), torch.no_grad():
            log_w = log_weights(forced.model, forced.guide, copies)[0]
            log_q = pair.corruption(x).log_prob(noisy) + pair.encoder(noisy).log_prob(z)
        exact = float(probae.log_likelihood(pair, x, "exact").values.exp())
        assert float((log_q + log_w).exp().sum()) == pytest.approx(exact, rel=1e-12)
        values = probae.log_likelihood(forced, copies, "iwae", 1).values
        assert float((log_q + values).exp().sum()) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("prior", ["normal", "laplace", "mixture"])
def test_weights_of_a_continuous_code_have_the_mean_of_the_evidence(prior: str) -> None:
    torch.manual_seed(4)
    pair = probae.VAE(X_DIM, 1, hidden=(5,), activation="tanh", prior=prior).double()
    x = binary(1)
    z, step = grid(-25.0, 25.0)
    forced = dictated(pair, z)
    with local_parameters(), torch.no_grad():
        log_w = log_weights(forced.model, forced.guide, x.expand(len(z), -1))[0]
        mean = (pair.encoder(x).log_prob(z) + log_w).exp().sum() * step
        joint = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)
    assert float(mean) == pytest.approx(float(joint.exp().sum() * step), rel=1e-12)


@pytest.mark.parametrize("code", ["bits", "one-hot", "real"])
def test_weights_that_are_drawn_have_the_mean_of_the_evidence(code: str) -> None:
    # the same without a hand on the draws: single weights of many copies, whose mean is within five
    # standard errors; fails in 1 of 2 million seeds
    torch.manual_seed(4)
    pair = {"bits": bits_pair, "one-hot": lambda: one_hot_pair(5)}.get(
        code, lambda: probae.VAE(X_DIM, 1, hidden=(5,), activation="tanh").double()
    )()
    x = binary(1)
    if code == "real":
        z, step = grid(-25.0, 25.0)
        with torch.no_grad():
            exact = (pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)).exp().sum() * step
    else:
        exact = probae.log_likelihood(pair, x, "exact").values.exp()
    ratio = probae.log_likelihood(pair, x.expand(40_000, -1), "iwae", 1).values.exp() / exact
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert abs(float(ratio.mean()) - 1) < 5 * error
    assert 1e-4 < error < 0.05


def grid(low: float, high: float, points: int = 50_001) -> tuple[Tensor, float]:
    """Points of a one-dimensional code, (points, 1), and their distance."""
    return torch.linspace(low, high, points, dtype=torch.float64)[:, None], (high - low) / (
        points - 1
    )


# ---- T25: the importance-weighted bound ---------------------------------------------------------


def draws_of(count: int, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Every outcome of ``count`` draws of a one-hot code, up to order, and its probability.

    Returns:
        tuple: codes (count, outcomes, states), or (1 * outcomes, states); probabilities (outcomes,)
    """
    states = len(log_q)
    bars = itertools.combinations(range(count + states - 1), states - 1)
    edges = torch.tensor([(-1, *bar, count + states - 1) for bar in bars])
    counts = edges.diff(dim=1) - 1  # (outcomes, states)
    orders = math.lgamma(count + 1) - torch.lgamma(counts.double() + 1).sum(1)
    states_drawn = [torch.repeat_interleave(torch.arange(states), row) for row in counts]
    z = torch.eye(states, dtype=torch.float64)[torch.stack(states_drawn, 1)]
    return z if count > 1 else z[0], (orders + counts.double() @ log_q).exp()


COUNTS = (1, 2, 3, 5, 10, 40, 160)


def test_importance_bound_rises_to_the_evidence_at_its_rate() -> None:
    pair, x = one_hot_pair(3), binary(1)
    log_p = float(probae.log_likelihood(pair, x, "exact").values)
    states = torch.eye(3, dtype=torch.float64)
    forced = dictated(pair, states)
    with local_parameters(), torch.no_grad():
        log_q = pair.encoder(x).log_prob(states)
        log_w = log_weights(forced.model, forced.guide, x.expand(3, -1))[0]
    variance = (log_q.exp() * (log_w.exp() - math.exp(log_p)) ** 2).sum()
    rate = float(variance) / (2 * math.exp(2 * log_p))
    bounds = {}
    for count in COUNTS:
        z, probability = draws_of(count, log_q)
        assert float(probability.sum()) == pytest.approx(1, abs=1e-12)
        forced = dictated(pair, z)
        with local_parameters(), torch.no_grad():
            loss, shared = probae.IWAE(count).per_datum_loss(
                forced.model, forced.guide, x.expand(len(probability), -1)
            )
        assert float(shared) == 0
        bounds[count] = -float((probability * loss).sum())
    values = list(bounds.values())
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[-1] < log_p
    assert bounds[1] == pytest.approx(float((log_q.exp() * log_w).sum()), abs=1e-12)  # the ELBO
    gaps = {count: count * (log_p - bounds[count]) / rate for count in COUNTS}
    assert gaps[160] == pytest.approx(1, abs=0.01)
    # the next term of the expansion is of order 1/K: four times the samples, a quarter of it
    assert (4 * gaps[160] - gaps[40]) / 3 == pytest.approx(1, abs=1e-3)
    assert abs(gaps[5] - 1) > 0.02  # so that it is a limit


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_estimates_of_the_likelihood_are_those_of_the_bound(count: int) -> None:
    pair, x = one_hot_pair(3), binary(1)
    with torch.no_grad():
        log_q = pair.encoder(x).log_prob(torch.eye(3, dtype=torch.float64))
    z, probability = draws_of(count, log_q)
    forced, copies = dictated(pair, z), x.expand(len(probability), -1)
    losses = {}
    for method, objective in (("iwae", probae.IWAE), ("elbo", probae.ELBO)):
        with local_parameters(), torch.no_grad():
            losses[method], _ = objective(num_particles=count).per_datum_loss(
                forced.model, forced.guide, copies
            )
        for proposal in (None, forced.encoder):
            ll = probae.log_likelihood(forced, copies, method, count, proposal=proposal)
            assert torch.allclose(ll.values, -losses[method], atol=1e-12)
            assert ll.is_bound
    exact = float(probae.log_likelihood(pair, x, "exact").values)
    assert -float((probability * losses["iwae"]).sum()) < exact
    elbo = -float((probability * losses["elbo"]).sum())
    one = dictated(pair, torch.eye(3, dtype=torch.float64))
    once = probae.log_likelihood(one, x.expand(3, -1), "elbo", 1).values
    assert elbo == pytest.approx(float((log_q.exp() * once).sum()), abs=1e-12)  # whatever K is


# ---- T27: annealing from both sides -------------------------------------------------------------


def skewed(name: str) -> tuple[Autoencoder, str]:
    """A pair whose posteriors are not Gaussian, and where to start annealing."""
    torch.manual_seed(6)
    prior, encoder, start = {
        "laplace": (probae.LaplacePrior(1, rate=0.7), probae.LaplaceEncoder, "prior"),
        "laplace-from-encoder": (
            probae.LaplacePrior(1, rate=0.7),
            probae.LaplaceEncoder,
            "encoder",
        ),
        "exponential": (probae.ExponentialPrior(1, rate=0.7), probae.LogNormalEncoder, "prior"),
    }[name]
    decoder = probae.BernoulliDecoder(probae.MLP(1, X_DIM, (4,), "tanh"))
    pair = Autoencoder(prior, encoder(probae.MLP(X_DIM, (2, 1))), decoder).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3).add_(0.3)
    return pair, start


def evidence(pair: Autoencoder, x: Tensor) -> Tensor:
    """Log-evidence of binary data by quadrature over a one-dimensional code, (N,)."""
    positive = isinstance(pair.prior, probae.ExponentialPrior)
    z, step = grid(1e-9 if positive else -40.0, 40.0, 100_001)
    every = outcomes(X_DIM)
    with torch.no_grad():
        law = pair.decoder(z[:, None])
        joint = pair.prior().log_prob(z)[:, None] + law.log_prob(every)  # (points, outcomes)
        ends = torch.zeros(len(z), 1).double()
        ends[[0, -1]] = math.log(0.5)  # trapezoidal, for the density that starts at 0
        log_p = (joint + ends).logsumexp(0) + math.log(step)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)
    return log_p[(x @ 2.0 ** torch.arange(X_DIM - 1, -1, -1).double()).long()]


@pytest.mark.parametrize("name", ["laplace", "laplace-from-encoder", "exponential"])
def test_annealed_weights_are_unbiased_in_both_directions(name: str) -> None:
    # E w / p(x) = 1 forwards and E p(x) / w' = 1 backwards, at any schedule; z-tests at four
    # standard errors over 4000 data, two a case: one fails by chance in about 8000 seeds
    pair, start = skewed(name)
    # long steps, of which few are accepted, so that a wrong rule of acceptance would show
    options = Annealing(6, 1, start, "linear", target_acceptance=0.3, num_pilot=5)
    sandwich = probae.bdmc(pair, 4000, 2, annealing=options, seed=1)
    exact = evidence(pair, sandwich.x)
    for ratio in ((sandwich.lower - exact).exp(), (exact - sandwich.upper).exp()):
        error = float(ratio.std()) / math.sqrt(len(ratio))
        assert abs(float(ratio.mean()) - 1) < 4 * error, (name, float(ratio.mean()), error)
        assert float(ratio.std()) > 0.01  # so the test can fail
        assert error < 0.02


@pytest.mark.parametrize("name", ["laplace", "laplace-from-encoder", "exponential"])
def test_annealing_brackets_evidence_that_is_not_gaussian_and_closes(name: str) -> None:
    # lower <= exact <= upper in expectation: the means may cross by three standard errors, which
    # happens by chance in at most 1 of 700 seeds a bound; seven bounds a case
    pair, start = skewed(name)
    gaps = []
    for steps in (1, 8, 64):
        options = Annealing(steps, num_leapfrogs=2, num_pilot=4, start=start)
        sandwich = probae.bdmc(pair, 200, 2, annealing=options, seed=2)
        exact = evidence(pair, sandwich.x)
        for slack in (exact - sandwich.lower, sandwich.upper - exact):
            assert float(slack.mean()) > -3 * float(slack.std()) / math.sqrt(len(slack))
        gaps.append(sandwich.gap)
        if steps == 1:  # far enough apart that the bounds are not met by luck
            assert sandwich.gap > 3 * sandwich.gap_std_error
    assert gaps[0] > gaps[1] > gaps[2], gaps
    assert abs(gaps[2]) < 0.15 * gaps[0], gaps
    ll = probae.log_likelihood(pair, sandwich.x, "ais", 2, annealing=options, seed=5)
    slack = exact - ll.values
    assert float(slack.mean()) > -3 * float(slack.std()) / math.sqrt(len(slack))
    assert abs(float(slack.mean())) < 0.05 * gaps[0] + 3 * float(slack.std()) / math.sqrt(200)


# ---- T28: one sample, and the two ways to the KL ------------------------------------------------

BOUNDS = [case for case in CASES if case.kind is probae.Kind.ELBO]


@pytest.mark.parametrize("case", BOUNDS, ids=repr)
def test_bound_of_one_sample_is_the_elbo(case: Case) -> None:
    pair, x = case.pair(torch.float64), case.x(torch.float64)
    estimates = {}
    for objective in (probae.IWAE(1), probae.ELBO(analytic_kl=False)):
        torch.manual_seed(3)
        with torch.no_grad():
            estimates[objective], _ = objective.per_datum_loss(pair.model, pair.guide, x)
    one, other = estimates.values()
    assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    lls = [probae.log_likelihood(pair, x, method, 1, seed=3) for method in ("iwae", "elbo")]
    assert torch.allclose(lls[0].values, lls[1].values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in BOUNDS if case.kl == "analytic"], ids=repr)
def test_elbo_in_closed_form_is_the_mean_of_the_sampled_one(case: Case) -> None:
    # z-test at five standard errors, with one datum under many codes: fails in 1 of 2 million seeds
    pair, x = case.pair(torch.float64), case.x(torch.float64, 1)
    torch.manual_seed(5)
    with local_parameters(), torch.no_grad():
        closed = elbo_terms(pair.model, pair.guide, x, num_particles=10_000)
        sampled = elbo_terms(pair.model, pair.guide, x, num_particles=10_000, analytic=False)
    assert (closed.kl_method["z"], sampled.kl_method["z"]) == ("analytic", "monte carlo")
    for term in ("kl", "elbo"):
        one, other = (
            t.kl[:, 0] if term == "kl" else (t.log_likelihood - t.kl)[:, 0]
            for t in (closed, sampled)
        )
        error = math.hypot(float(one.std()), float(other.std())) / math.sqrt(10_000)
        assert abs(float(one.mean() - other.mean())) < 5 * error
        assert error < 0.2
