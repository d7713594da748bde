"""Corruptions against matrices written by hand, enumeration, quadrature, and their own samples."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

import probae
from probae import BitFlip, GaussianNoise, Masking, PoissonThinning, SaltAndPepper, stack_missing
from probae.corrupted import Bits, Point, Replacement, Seen, ShiftedPoisson, Thinned
from probae.corruptions import Corruption
from probae.terms import trace_pair

from .conftest import bits, counts, reals, unit
from .test_distributions import assert_frequencies

DOUBLE = torch.float64


class Case(NamedTuple):
    """A corruption, a likelihood that it has closed forms for, and data of that likelihood."""

    corruption: Corruption
    decoder: type[probae.Decoder]
    data: Callable[..., Tensor]

    def __repr__(self) -> str:
        return f"{self.corruption!r}-{self.decoder.__name__}"

    def pair(self, x_shape: tuple[int, ...] = (5,), known: bool = False) -> probae.Autoencoder:
        """Return a pair whose encoder sees x_tilde; ``known`` observes x_tilde in place of x."""
        torch.manual_seed(1)
        x_tilde_shape = tuple(self.corruption(self.data(1, *x_shape)).event_shape)
        network = probae.MLP(3, self.decoder.output_shape(x_shape), (4,), "tanh")
        decoder: Any = self.decoder(network)
        return probae.Autoencoder(
            probae.StandardNormalPrior(3),
            probae.GaussianEncoder(probae.MLP(x_tilde_shape, (2, 3), (4,), "tanh")),
            probae.CorruptedDecoder(decoder, self.corruption) if known else decoder,
            None if known else self.corruption,
        )


BERNOULLI, GAUSSIAN = probae.BernoulliDecoder, probae.GaussianDecoder
POISSON, CONTINUOUS = probae.PoissonDecoder, probae.ContinuousBernoulliDecoder
CASES = [
    Case(GaussianNoise(0.3), GAUSSIAN, reals),
    Case(GaussianNoise(0.3), probae.HeteroscedasticGaussianDecoder, reals),
    Case(BitFlip(0.1), BERNOULLI, bits),
    Case(BitFlip(0.1, 0.3), BERNOULLI, bits),
    Case(BitFlip(0.0, 0.3), BERNOULLI, bits),
    Case(SaltAndPepper(0.2), BERNOULLI, bits),
    Case(SaltAndPepper(0.2), CONTINUOUS, unit),
    Case(SaltAndPepper(0.2), POISSON, counts),
    Case(Masking(0.2), BERNOULLI, bits),
    Case(Masking(0.2), GAUSSIAN, reals),
    Case(Masking(0.2), POISSON, counts),
    Case(Masking(0.2, known=True), BERNOULLI, bits),
    Case(Masking(0.2, known=True), GAUSSIAN, reals),
    Case(Masking(0.2, known=True), CONTINUOUS, unit),
    Case(Masking(0.2, known=True), POISSON, counts),
    Case(PoissonThinning(0.6), POISSON, counts),
]


@pytest.fixture(params=CASES, ids=repr)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def close(actual: Tensor, expected: Tensor | np.ndarray, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


# ---- C(x_tilde|x) -------------------------------------------------------------------------------


@pytest.mark.parametrize("x_shape", [(9,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_shapes_dtype_and_own_samples(
    case: Case, x_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = case.data(7, *x_shape).to(dtype)
    noisy = case.corruption(x)
    stacked = (2, *x_shape) if getattr(case.corruption, "known", False) else x_shape
    assert (noisy.batch_shape, noisy.event_shape) == ((7,), stacked)
    for law, batch in ((noisy, (7,)), (noisy.expand((4, 7)), (4, 7))):
        x_tilde = law.sample()
        assert (law.batch_shape, law.event_shape) == (batch, stacked)
        assert (x_tilde.shape, x_tilde.dtype) == ((*batch, *stacked), dtype)
        log_prob = law.log_prob(x_tilde)
        assert (log_prob.shape, log_prob.dtype) == (batch, dtype)
        assert log_prob.isfinite().all()
        assert law.support.check(x_tilde).all()
        assert law.mean.shape == (*batch, *stacked)
        assert case.corruption.as_clean(x_tilde[0] if len(batch) > 1 else x_tilde).shape == x.shape
    assert not list(case.corruption.parameters())


def test_gaussian_noise() -> None:
    x, x_tilde = torch.randn(2, 7, 2, 3, dtype=DOUBLE)
    expected = stats.norm.logpdf(x_tilde.numpy(), x.numpy(), 0.3).sum((1, 2))
    close(GaussianNoise(0.3)(x).log_prob(x_tilde), expected, 1e-12)


CHANNELS = [  # corruption of a bit, P(x_tilde | x) with rows x = 0, 1
    (BitFlip(0.2), [[0.8, 0.2], [0.2, 0.8]]),
    (BitFlip(0.1, 0.3), [[0.9, 0.1], [0.3, 0.7]]),
    (BitFlip(0.7, 0.6), [[0.3, 0.7], [0.6, 0.4]]),
    (BitFlip(0.0, 0.4), [[1.0, 0.0], [0.4, 0.6]]),
    (BitFlip(0.4, 0.0), [[0.6, 0.4], [0.0, 1.0]]),
    (SaltAndPepper(0.3), [[0.85, 0.15], [0.15, 0.85]]),
    (Masking(0.3), [[1.0, 0.0], [0.3, 0.7]]),
]


@pytest.mark.parametrize(("corruption", "matrix"), CHANNELS, ids=lambda value: repr(value))
def test_corruption_of_a_bit(corruption: Corruption, matrix: list[list[float]]) -> None:
    x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
    with pyro.validation_enabled(False):  # impossible values included
        for value in (0.0, 1.0):
            log_prob = corruption(x).log_prob(torch.full((2, 1), value, dtype=DOUBLE))
            close(log_prob, torch.tensor(matrix, dtype=DOUBLE)[:, int(value)].log(), 1e-12)
    close(corruption(x).mean[:, 0], torch.tensor(matrix, dtype=DOUBLE)[:, 1], 1e-12)


@pytest.mark.parametrize("grey", [0.0, 0.25, 1.0, -3.0])
def test_replaced_values_are_atoms_whatever_x_is(grey: float) -> None:
    x = torch.full((4, 1), grey, dtype=DOUBLE)
    values = torch.tensor([[grey], [0.0], [1.0], [7.0]], dtype=DOUBLE)
    with pyro.validation_enabled(False):
        salted = SaltAndPepper(0.4)(x).log_prob(values).exp()
        masked = Masking(0.4)(x).log_prob(values).exp()
    same = (values[:, 0] == grey).double()
    close(salted, 0.6 * same + torch.tensor([grey in (0, 1), 1, 1, 0]).double() * 0.2, 1e-12)
    close(masked, 0.6 * same + torch.tensor([grey == 0, 1, 0, 0]).double() * 0.4, 1e-12)


def test_known_mask_is_recorded() -> None:
    x = torch.randn(2000, 3, 4, dtype=DOUBLE)
    x_tilde = Masking(0.3, known=True)(x).sample()
    values, mask = x_tilde.unbind(1)
    assert torch.equal(values, x * mask)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    dropped = (mask == 0).sum((1, 2)).double()
    expected = dropped * math.log(0.3) + (12 - dropped) * math.log(0.7)
    close(Masking(0.3, known=True)(x).log_prob(x_tilde), expected, 1e-12)
    other = torch.stack([x * mask + mask, mask], 1)
    with pyro.validation_enabled(False):
        assert Masking(0.3, known=True)(x).log_prob(other)[dropped < 12].isneginf().all()


def test_poisson_thinning_is_binomial() -> None:
    x = torch.arange(6.0, dtype=DOUBLE).expand(6, 6).reshape(36, 1)
    x_tilde = torch.arange(6.0, dtype=DOUBLE)[:, None].expand(6, 6).reshape(36, 1)
    with pyro.validation_enabled(False):
        actual = PoissonThinning(0.3)(x).log_prob(x_tilde)
    close(actual, stats.binom.logpmf(x_tilde[:, 0].numpy(), x[:, 0].numpy(), 0.3), 1e-12)


def test_variances_match_samples(case: Case) -> None:
    # each fails once in 2 million seeds, times five or ten entries
    law = case.corruption(case.data(1, 5).double())
    draws = law.sample((20_000,))
    square = (draws - law.mean) ** 2
    std_error = square.std(0) / math.sqrt(len(draws))
    assert law.variance.shape == (1, *law.event_shape)
    assert ((square.mean(0) - law.variance).abs() <= 5 * std_error + 1e-9).all()


def test_variance_of_a_point_is_zero() -> None:
    assert torch.equal(Point(torch.randn(3, 2)).variance, torch.zeros(3, 2))
    assert torch.equal(ShiftedPoisson(torch.ones(2), torch.ones(2)).variance, torch.ones(2))


def test_variance_of_a_replacement_with_tensors() -> None:
    x, chance = torch.randn(4, dtype=DOUBLE), torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=DOUBLE)
    law = Replacement(dist.Normal(0.5, 2.0).expand((4,)), (x, 3.0), chance)
    second = (1 - chance) * 4.25 + chance * (x**2 + 9) / 2
    close(law.variance, second - law.mean**2)


def test_noise_has_its_variance() -> None:
    x = torch.zeros(20_000, 1)
    variance = GaussianNoise(0.3)(x).sample().var().item()
    sigma = 0.09 * math.sqrt(2 / 20_000)
    assert variance == pytest.approx(0.09, abs=5 * sigma)  # fails once in 2 million


@pytest.mark.parametrize(
    ("corruption", "x", "states", "probabilities"),
    [
        (BitFlip(0.1), 1.0, [0, 1], [0.1, 0.9]),
        (BitFlip(0.4, 0.2), 1.0, [0, 1], [0.2, 0.8]),
        (BitFlip(0.4, 0.2), 0.5, [0, 1], [0.4, 0.6]),  # binarised, then flipped
        (SaltAndPepper(0.3), 0.5, [0, 0.5, 1], [0.15, 0.7, 0.15]),
        (SaltAndPepper(0.3), 1.0, [0, 1], [0.15, 0.85]),
        (Masking(0.3), -2.0, [-2, 0], [0.7, 0.3]),
        (PoissonThinning(0.3), 4.0, range(5), stats.binom.pmf(range(5), 4, 0.3)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Corruption) else "",
)
def test_samples_have_their_frequencies(
    corruption: Corruption, x: float, states: Any, probabilities: Any
) -> None:
    # each fails once in a million seeds
    sample = corruption(torch.full((20_000, 1), x)).sample()
    found = np.array([int((sample == state).sum()) for state in states])
    assert found.sum() == 20_000
    assert_frequencies(found, np.asarray(probabilities))


def test_known_mask_drops_as_often_as_it_should() -> None:
    mask = Masking(0.3, known=True)(torch.ones(20_000, 1)).sample()[:, 1]
    assert stats.binomtest(int((mask == 0).sum()), 20_000, 0.3).pvalue > 1e-6


def test_equal_settings_print_alike() -> None:
    assert repr(Masking(0.3, known=True)) == "Masking(probability=0.3, known=True)"
    assert repr(BitFlip(0.1)) == repr(BitFlip(0.1, one_to_zero=0.1))


# ---- as a Pyro site in both programs ------------------------------------------------------------

OBJECTIVES: dict[str, Callable[[], pyro.infer.ELBO]] = {
    "Trace": partial(Trace_ELBO, num_particles=2),
    "Trace-vectorized": partial(
        Trace_ELBO, num_particles=2, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "Renyi": partial(RenyiELBO, num_particles=2),
    "ELBO": partial(probae.ELBO, num_particles=2),
    "IWAE": partial(probae.IWAE, 2),
    "IWAE-dreg": partial(probae.IWAE, 2, dreg=True),
}


@pytest.mark.parametrize("known", [False, True], ids=["x", "x_tilde"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_corrupted_pair(case: Case, objective: str, known: bool) -> None:
    pair, x = case.pair(known=known), case.data(7, 5)
    x = case.corruption(x).sample() if known else x
    loss = OBJECTIVES[objective]().loss_and_grads(pair.model, pair.guide, x)
    assert math.isfinite(loss)
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_the_site_cancels_exactly(case: Case) -> None:
    pair, x = case.pair(), case.data(7, 5)
    guide = poutine.trace(pair.guide).get_trace(x)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    for trace in (guide, model):
        trace.compute_log_prob()
        trace.compute_score_parts()
    sites = guide.nodes["x_tilde"], model.nodes["x_tilde"]
    assert sites[0]["value"] is sites[1]["value"]
    assert torch.equal(sites[0]["log_prob"], sites[1]["log_prob"])
    assert not sites[0]["value"].requires_grad
    assert sites[0]["fn"].has_rsample
    objective = probae.ELBO(analytic_kl=False)
    torch.manual_seed(0)
    loss = objective.loss(pair.model, pair.guide, x)
    torch.manual_seed(0)
    x_tilde = case.corruption(x).sample()
    z = pair.encoder(x_tilde).rsample()
    terms = (
        pair.decoder(z).log_prob(x) + pair.prior().log_prob(z) - pair.encoder(x_tilde).log_prob(z)
    )
    assert loss == pytest.approx(-float(terms.sum().detach()), rel=1e-5)


def test_bits_of_learned_probabilities_are_no_reparameterised_site() -> None:
    logits = torch.zeros(3, requires_grad=True)
    assert Bits(torch.full((3,), 0.5)).has_rsample
    assert not Bits(torch.sigmoid(logits)).has_rsample
    assert not Bits(torch.sigmoid(logits)).expand((2, 3)).to_event(1).has_rsample


# ---- p(x_tilde|z) and p(x|x_tilde, z), item T15 -------------------------------------------------


def states_of(*values: float, entries: int) -> Tensor:
    """All vectors of ``entries`` entries with these values, (len(values)**entries, entries)."""
    grid = torch.tensor(values, dtype=DOUBLE)
    return torch.cartesian_prod(*[grid] * entries).reshape(-1, entries)


def has_variance(law: Any) -> bool:
    """Whether the likelihood has a variance in closed form; DiscretizedLogistic has none."""
    try:
        return bool(law.variance.isfinite().all())
    except NotImplementedError:
        return False


def check_enumerated(
    corruption: Corruption, likelihood: Any, matrix: Tensor, values: list[float], tail: float = 0.0
) -> None:
    """Compare with sums over all states; ``matrix`` is C of one entry, rows the clean values."""
    (entries,) = likelihood.event_shape
    states = states_of(*values, entries=entries)  # (S, D)
    index = states_of(*range(len(values)), entries=entries).long()
    channel = matrix[index[:, None], index].prod(-1)  # (x, x_tilde)
    clean = likelihood.log_prob(states[:, None]).exp()  # (x, B)
    joint = clean[:, None] * channel[..., None]  # (x, x_tilde, B)
    noisy = corruption.marginal(likelihood)
    assert (noisy.batch_shape, noisy.event_shape) == (likelihood.batch_shape, (entries,))
    actual = noisy.log_prob(states[:, None]).exp()  # (x_tilde, B)
    close(actual, joint.sum(0))
    close(actual.sum(0), torch.ones_like(actual[0]), 1e-10 + tail)
    seen = joint.sum(0)[:, 0] > 1e-6
    law = corruption.posterior(likelihood, states[seen][:, None])  # batch (x_tilde, B)
    assert law.batch_shape == (int(seen.sum()), *likelihood.batch_shape)
    actual = law.log_prob(states[:, None, None]).exp()  # (x, x_tilde, B)
    expected = (joint / joint.sum(0))[:, seen]
    close(actual, expected)
    close(actual.sum(0), torch.ones_like(actual[0]), 1e-10 + tail)
    close(noisy.mean, (joint.sum(0).T @ states), 1e-10 + tail)
    close(law.mean, torch.einsum("xtb,xd->tbd", expected, states), 1e-10 + 100 * tail)
    if has_variance(likelihood):
        second = joint.sum(0).T @ states**2
        close(noisy.variance, second - noisy.mean**2, 1e-9 + tail)
        second = torch.einsum("xtb,xd->tbd", expected, states**2)
        close(law.variance, second - law.mean**2, 1e-9 + 100 * tail)


@pytest.mark.parametrize(
    "family", [probae.GreyBernoulli, dist.Bernoulli, torch.distributions.Bernoulli]
)
@pytest.mark.parametrize(("corruption", "matrix"), CHANNELS, ids=lambda value: repr(value))
def test_bits_by_enumeration(
    corruption: Corruption, matrix: list[list[float]], family: type
) -> None:
    logits = torch.tensor([[-3.0, 0.2, 1.5], [0.0, 9.0, -1.0]], dtype=DOUBLE)
    likelihood = torch.distributions.Independent(family(logits=logits), 1)
    check_enumerated(corruption, likelihood, torch.tensor(matrix, dtype=DOUBLE), [0.0, 1.0])
    assert isinstance(corruption.marginal(likelihood).base_dist, family)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[-1e4, -90.0, 90.0, 1e4]], requires_grad=True)
    for corruption, _ in CHANNELS:
        likelihood = probae.GreyBernoulli(logits=logits).to_event(1)
        for bit in (torch.zeros(1, 4), torch.ones(1, 4)):
            log_prob = corruption.marginal(likelihood).log_prob(bit)
            assert log_prob.isfinite().all()
            (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
            assert gradient.isfinite().all()
            assert not corruption.posterior(likelihood, bit).log_prob(bit).isnan().any()


def replacing(corruption: Corruption, values: list[float], chance: float) -> Tensor:
    """Matrix C of one entry whose values are replaced by 0, or by 0 and 1 alike."""
    matrix = (1 - chance) * torch.eye(len(values), dtype=DOUBLE)
    atoms = [0.0, 1.0] if isinstance(corruption, SaltAndPepper) else [0.0]
    for atom in atoms:
        matrix[:, values.index(atom)] += chance / len(atoms)
    return matrix


DISCRETE = {
    "poisson": (dist.Poisson(torch.tensor([[0.7], [3.0]], dtype=DOUBLE)), list(range(40))),
    "categorical": (dist.Categorical(torch.tensor([[[1.0, 2, 3, 4]] * 2], dtype=DOUBLE)), range(4)),
    "levels": (
        probae.DiscretizedLogistic(
            torch.tensor([[0.1, 0.9]], dtype=DOUBLE), torch.tensor([[0.3, 0.1]], dtype=DOUBLE), 5
        ),
        [0.0, 0.25, 0.5, 0.75, 1.0],
    ),
}


@pytest.mark.parametrize("corruption", [Masking(0.3), SaltAndPepper(0.4)], ids=repr)
@pytest.mark.parametrize("name", ["poisson", "levels"])
def test_discrete_likelihoods_by_enumeration(corruption: Corruption, name: str) -> None:
    law, states = DISCRETE[name]
    values = [float(state) for state in states]
    matrix = replacing(corruption, values, 0.3 if isinstance(corruption, Masking) else 0.4)
    check_enumerated(corruption, law.to_event(1), matrix, values)


def test_classes_by_enumeration() -> None:
    law, _ = DISCRETE["categorical"]
    classes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
    states = torch.arange(4.0, dtype=DOUBLE)[:, None, None].expand(4, 1, 2)
    noisy = Masking(0.25).marginal(law.to_event(1))
    expected = 0.75 * classes + 0.25 * torch.eye(4, dtype=DOUBLE)[0]
    close(noisy.log_prob(states)[:, 0].exp(), expected**2)
    restored = Masking(0.25).posterior(law.to_event(1), states[0])  # both 0
    close(
        restored.log_prob(states)[:, 0].exp(),
        (classes * torch.tensor([1, 0.25, 0.25, 0.25]) / 0.325) ** 2,
    )


@pytest.mark.parametrize("rate", [0.3, 4.0])
def test_thinned_poisson_by_enumeration(rate: float) -> None:
    values = [float(k) for k in range(40)]
    matrix = torch.from_numpy(stats.binom.pmf(np.arange(40), np.arange(40)[:, None], 0.35))
    likelihood = dist.Poisson(torch.full((2, 1), rate, dtype=DOUBLE)).to_event(1)
    check_enumerated(PoissonThinning(0.35), likelihood, matrix, values)


GRID = torch.linspace(-14, 14, 20_001, dtype=DOUBLE) + 1e-4  # holds neither 0 nor 1
STEP = float(GRID[1] - GRID[0])


@pytest.mark.parametrize("sigma", [0.2, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_gaussian_noise_by_quadrature(sigma: float, scale: float) -> None:
    g = torch.tensor([[0.7], [-1.2]], dtype=DOUBLE)
    likelihood = dist.Normal(g, scale).to_event(1)
    noise = GaussianNoise(sigma)
    x_tilde = torch.tensor([-2.0, 0.1, 1.9], dtype=DOUBLE)[:, None, None]
    joint = (  # (grid, x_tilde, B)
        dist.Normal(GRID[:, None, None], sigma).log_prob(x_tilde[:, 0, :])
        + likelihood.log_prob(GRID[:, None, None])[:, None]
    ).exp()
    close(noise.marginal(likelihood).log_prob(x_tilde).exp(), joint.sum(0) * STEP)
    actual = noise.posterior(likelihood, x_tilde).log_prob(GRID[:, None, None, None]).exp()
    close(actual, joint / (joint.sum(0) * STEP))
    close(actual.sum(0) * STEP, torch.ones(3, 2, dtype=DOUBLE))
    mass = noise.marginal(likelihood).log_prob(GRID[:, None, None]).exp().sum(0) * STEP
    close(mass, torch.ones(2, dtype=DOUBLE))


def test_gaussian_noise_takes_a_scale_for_each_entry() -> None:
    likelihood = dist.Normal(torch.zeros(2, 3), torch.tensor([0.5, 1.0, 2.0])).to_event(1)
    noise = GaussianNoise(1.0)
    close(noise.marginal(likelihood).variance[0], torch.tensor([1.25, 2.0, 5.0]), 1e-6)
    x_tilde = torch.full((2, 3), 5.0)
    close(noise.posterior(likelihood, x_tilde).mean[0], torch.tensor([1.0, 2.5, 4.0]), 1e-6)


CONTINUOUS_LAWS: dict[str, tuple[Any, Tensor, Tensor]] = {  # law, nodes, weights
    "normal": (
        dist.Normal(torch.tensor(0.4, dtype=DOUBLE), 0.8),
        GRID,
        torch.full_like(GRID, STEP),
    ),
}
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(60))
CONTINUOUS_LAWS["continuous-bernoulli"] = (
    probae.ContinuousBernoulli(torch.tensor(1.3, dtype=DOUBLE)),
    (NODES + 1) / 2,
    WEIGHTS / 2,
)


@pytest.mark.parametrize(
    ("corruption", "atoms"), [(Masking(0.3), [0.0]), (SaltAndPepper(0.3), [0.0, 1.0])]
)
@pytest.mark.parametrize("name", CONTINUOUS_LAWS)
def test_replaced_densities_by_quadrature(
    corruption: Corruption, atoms: list[float], name: str
) -> None:
    law, nodes, weights = CONTINUOUS_LAWS[name]
    likelihood = law.expand((1,)).to_event(1)
    noisy = corruption.marginal(likelihood)
    atom = torch.tensor(atoms, dtype=DOUBLE)
    density, mass = noisy.log_prob(nodes[:, None]).exp(), noisy.log_prob(atom[:, None]).exp()
    for function in (torch.ones_like, torch.cos, lambda x: x):  # E f(x_tilde), both ways
        actual = (density * function(nodes)) @ weights + (mass * function(atom)).sum()
        clean = (law.log_prob(nodes).exp() * function(nodes)) @ weights
        close(actual, 0.7 * clean + 0.3 * function(atom).mean())
    close(noisy.mean[0], 0.7 * law.mean + 0.3 * atom.mean())
    if has_variance(law):
        second = (density * nodes**2) @ weights + (mass * atom**2).sum()
        close(noisy.variance[0], second - noisy.mean[0] ** 2)
    # Bayes: an atom tells nothing about x, and any other value tells x
    at_atom = corruption.posterior(likelihood, atom[:1])
    close(at_atom.log_prob(nodes[:, None]), law.log_prob(nodes))
    close(at_atom.mean[0], law.mean)
    elsewhere = corruption.posterior(likelihood, nodes[3:4])
    close(elsewhere.log_prob(nodes[3:4]), torch.zeros((), dtype=DOUBLE))
    with pyro.validation_enabled(False):
        assert elsewhere.log_prob(nodes[4:5]).isneginf()
    assert torch.equal(elsewhere.sample((5,)), nodes[3:4].expand(5, 1))
    assert law.support.check(at_atom.sample((5,))).all()


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(torch.randn(3, dtype=DOUBLE), 0.8),
        dist.Poisson(torch.rand(3, dtype=DOUBLE)),
        probae.GreyBernoulli(logits=torch.randn(3, dtype=DOUBLE)),
        probae.DiscretizedLogistic(torch.rand(3, dtype=DOUBLE), torch.full((3,), 0.2).double(), 5),
        dist.LogNormal(torch.zeros(3, dtype=DOUBLE), 1.0),  # 0 is outside its support
        dist.Beta(torch.full((3,), 2.0, dtype=DOUBLE), 3.0),
    ],
    ids=lambda law: type(law).__name__,
)
def test_known_mask_leaves_what_was_seen(law: Any) -> None:
    x = law.sample((8,))
    mask = states_of(0.0, 1.0, entries=3)  # every pattern once
    x_tilde = torch.stack([x * mask, mask], 1)
    masking, likelihood = Masking(0.3, known=True), law.to_event(1)
    seen = math.log(0.7) + law.log_prob(x)
    expected = (mask * seen + (1 - mask) * math.log(0.3)).sum(-1)
    noisy = masking.marginal(likelihood)
    assert (noisy.batch_shape, noisy.event_shape) == ((), (2, 3))
    close(noisy.log_prob(x_tilde), expected)
    assert noisy.support.check(x_tilde).all()
    close(noisy.mean, 0.7 * torch.stack([law.mean, torch.ones(3, dtype=DOUBLE)]))
    restored = masking.posterior(likelihood, x_tilde)
    assert (restored.batch_shape, restored.event_shape) == ((8,), (3,))
    draw = restored.sample()
    assert torch.equal(draw * mask, x * mask)
    assert law.support.check(draw).all()
    close(restored.log_prob(draw), ((1 - mask) * law.log_prob(draw)).sum(-1))
    close(restored.mean, torch.where(mask == 1, x, law.mean))
    if has_variance(law):
        close(restored.variance, torch.where(mask == 1, 0, law.variance))
        second = torch.stack([law.variance + law.mean**2, torch.ones(3, dtype=DOUBLE)])
        close(noisy.variance, 0.7 * second - noisy.mean**2)


def test_total_mass_under_a_known_mask() -> None:
    nodes = torch.linspace(-9, 9, 301, dtype=DOUBLE)
    step = float(nodes[1] - nodes[0])
    law = dist.Normal(torch.tensor([0.4, -0.3], dtype=DOUBLE), 0.8).to_event(1)
    total = torch.zeros((), dtype=DOUBLE)
    for mask in states_of(0.0, 1.0, entries=2):
        axes = [nodes if m else torch.zeros(1, dtype=DOUBLE) for m in mask]
        x = torch.cartesian_prod(*axes)
        log_prob = (
            Masking(0.3, known=True).marginal(law).log_prob(torch.stack([x, mask.expand_as(x)], 1))
        )
        total += log_prob.exp().sum() * step ** float(mask.sum())
    close(total, torch.ones((), dtype=DOUBLE))


def test_batches_of_any_shape_keep_apart(case: Case) -> None:
    pair = case.pair((2, 3)).double()
    z = torch.randn(4, 7, 3, dtype=DOUBLE)
    likelihood = pair.decoder(z)  # batch (4, 7)
    noisy = case.corruption.marginal(likelihood)
    x_tilde = noisy.sample()[0]  # (7, ...)
    law = case.corruption.posterior(likelihood, x_tilde)
    assert (noisy.batch_shape, law.batch_shape) == ((4, 7), (4, 7))
    x = law.sample()
    assert x.shape == (4, 7, 2, 3)
    for k in range(4):
        alone = pair.decoder(z[k])
        close(noisy.log_prob(x_tilde)[k], case.corruption.marginal(alone).log_prob(x_tilde))
        posterior = case.corruption.posterior(alone, x_tilde)
        close(law.log_prob(x)[k], posterior.log_prob(x[k]))
        close(law.mean[k], posterior.mean)
    wide = law.expand((5, 4, 7))
    close(wide.log_prob(x), law.log_prob(x).expand(5, 4, 7))
    assert wide.sample().shape == (5, 4, 7, 2, 3)


def test_samples_of_the_marginal_are_corrupted_samples(case: Case) -> None:
    # means of two samples of one law; each fails once in 2 million seeds, times ten entries
    pair = case.pair()
    with torch.no_grad():
        likelihood = pair.decoder(torch.randn(1, 3)).expand((20_000,))
        direct = case.corruption.marginal(likelihood).sample()
        through = case.corruption(likelihood.sample().float()).sample()
        mean = case.corruption.marginal(likelihood).mean[0]
    for sample in (direct, through):
        std_error = sample.std(0).clamp(min=1e-3) / math.sqrt(len(sample))
        assert ((sample.mean(0) - mean).abs() < 5 * std_error).all()


def test_a_corruption_of_a_corruption() -> None:
    likelihood = dist.Normal(torch.randn(7, 5), 0.5).to_event(1)
    noisy = GaussianNoise(0.3).marginal(likelihood)
    twice = Masking(0.2, known=True).marginal(SaltAndPepper(0.2).marginal(noisy))
    x_tilde = twice.sample()
    assert x_tilde.shape == (7, 2, 5)
    assert twice.log_prob(x_tilde).isfinite().all()


# ---- pairs that are observed through a corruption -----------------------------------------------


def test_corrupted_decoder_is_the_marginal(case: Case) -> None:
    pair, z = case.pair(known=True), torch.randn(4, 7, 3)
    assert isinstance(pair.decoder, probae.CorruptedDecoder)
    law = pair.decoder(z)
    x_tilde = law.sample()
    expected = case.corruption.marginal(pair.decoder.decoder(z)).log_prob(x_tilde)
    assert torch.equal(law.log_prob(x_tilde), expected)
    assert pair.kind is probae.Kind.ELBO
    assert pair.x_shape == tuple(law.event_shape)


def test_corrupted_decoder_trains_is_saved_and_measured(case: Case, tmp_path: Any) -> None:
    pair = case.pair(known=True)
    x_tilde = case.corruption(case.data(20, 5)).sample()
    pair.initialize(x_tilde)
    before = probae.log_likelihood(pair, x_tilde, num_samples=50)
    run = probae.fit(pair, x_tilde, epochs=3, batch_size=8, lr=1e-2, progress=False)
    assert run.kind is probae.Kind.ELBO
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert math.isfinite(svi.step(x_tilde))
    loaded = probae.load(probae.save(pair, tmp_path / "pair"))
    after = [probae.log_likelihood(p, x_tilde, num_samples=50) for p in (pair, loaded)]
    assert torch.equal(after[0].values, after[1].values)
    assert after[0].mean > before.mean
    drawn = probae.sample(pair, 6, seed=0)
    assert drawn.x.shape == (6, *pair.x_shape)
    assert pair.decoder(drawn.z).log_prob(drawn.x).isfinite().all()


def test_pair_that_sees_a_known_mask_is_saved(tmp_path: Any) -> None:
    case = Case(Masking(0.3, known=True), BERNOULLI, bits)
    pair, x = case.pair(), bits(20, 5)
    probae.fit(pair, x, epochs=1, progress=False)
    loaded = probae.load(probae.save(pair, tmp_path / "pair"))
    lls = [probae.log_likelihood(p, x, num_samples=20).values for p in (pair, loaded)]
    assert torch.equal(lls[0], lls[1])


def test_exact_likelihood_of_missing_data_with_a_discrete_code() -> None:
    pair = probae.Autoencoder(
        probae.CategoricalPrior(3),
        probae.CategoricalEncoder(probae.MLP((2, 4), 3)),
        probae.CorruptedDecoder(
            probae.BernoulliDecoder(probae.MLP(3, 4)), Masking(0.3, known=True)
        ),
    ).double()
    x = torch.tensor([[1.0, math.nan, 0.0, math.nan]], dtype=DOUBLE)
    states = torch.eye(3, dtype=DOUBLE)
    clean = probae.CorruptedDecoder  # the clean decoder is still at hand
    assert isinstance(pair.decoder, clean)
    with torch.no_grad():
        pi = pair.decoder.decoder(states).mean
    expected = (0.7**2 * 0.3**2 * pi[:, 0] * (1 - pi[:, 2])).mean().log()
    exact = probae.log_likelihood(pair, stack_missing(x), "exact").values[0]
    close(exact, expected)


def test_grey_values_are_refused_as_everywhere() -> None:
    pair = Case(Masking(0.3, known=True), BERNOULLI, unit).pair(known=True)
    grey = Masking(0.3, known=True)(unit(7, 5)).sample()
    run = probae.fit(pair, grey, epochs=1, progress=False)
    assert "binarisation" in run.bound_on
    with pytest.raises(ValueError, match="grey pixels have no Bernoulli log-likelihood"):
        probae.log_likelihood(pair, grey, num_samples=2)


def test_values_and_mask_are_checked() -> None:
    pair = Case(Masking(0.3, known=True), GAUSSIAN, reals).pair(known=True)
    good = torch.stack([torch.tensor([0.3, 0.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 0, 1, 0, 1])])
    probae.log_likelihood(pair, good[None], num_samples=2)
    for index, value in (((1, 0), 0.5), ((0, 1), 3.0)):
        bad = good.clone()
        bad[index] = value
        message = (
            rf"pairs of values and mask.*1 values outside, the first {value:g} at index "
            rf"\(0, {index[0]}, {index[1]}\)"
        )
        with pytest.raises(ValueError, match=message):
            probae.log_likelihood(pair, bad[None], num_samples=2)


# ---- data with missing entries ------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.tensor, np.array, partial(np.array, dtype=">f8")])
def test_stack_missing(make: Callable[..., Any]) -> None:
    x = make([[[1.0, math.nan], [0.0, -2.0]]])
    stacked = stack_missing(x)
    assert stacked.tolist() == [[[[1.0, 0.0], [0.0, -2.0]], [[1.0, 0.0], [1.0, 1.0]]]]
    assert not stacked.requires_grad


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "f2"])
def test_masked_arrays_are_missing_where_masked(dtype: str) -> None:
    data = np.array([[1.0, 7.0, math.nan], [math.inf, -2.0, 0.0]], dtype=dtype)
    x = np.ma.masked_array(data, mask=[[False, True, False], [True, False, False]])
    stacked = stack_missing(x)
    assert stacked.dtype == (DOUBLE if "8" in dtype else torch.float32)
    assert stacked[:, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, -2.0, 0.0]]
    assert stacked[:, 1].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    assert x.data[0, 1] == 7.0
    unmasked = stack_missing(np.ma.masked_array(data[:, 1:2]))
    assert unmasked[:, 1].tolist() == [[1.0], [1.0]]
    flags = stack_missing(np.ma.masked_array([[True, True]], mask=[[False, True]]))
    assert flags.tolist() == [[[1.0, 0.0], [1.0, 0.0]]]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ma.masked_array([[1, 2]], mask=[[True, False]]), "x must .*int"),
        (torch.tensor([1.0, math.nan]), r"x must have shape \(N, \*x_shape\), got \(2,\)"),
        (torch.tensor([[1.0, math.inf]]), "x must be finite"),
        (np.array([[1.0, -math.inf]]), "x must be finite"),
        (torch.tensor([[1, 2]]), "x must .*int"),
        ([[1.0, 2.0]], "x must be a tensor"),
        (torch.zeros(0, 3), "x must have shape"),
        (np.array([["a"]]), "x must"),
        (None, "x must be a tensor"),
    ],
)
def test_stack_missing_refuses(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stack_missing(x)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Masking, SaltAndPepper, PoissonThinning, BitFlip])
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.1, math.nan, "a", None, True])
def test_probabilities_out_of_range(make: type, value: Any) -> None:
    with pytest.raises(ValueError, match=r"probability must be strictly in \(0, 1\), got"):
        make(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 1.0), r"one_to_zero must be in \[0, 1\), got 1.0"),
        ((-0.1, 0.5), r"probability must be in \[0, 1\), got -0.1"),
        ((0.1, "a"), r"one_to_zero must be in \[0, 1\), got 'a'"),
        ((0.0, 0.0), r"probability and one_to_zero must not both be 0: no bit would flip"),
    ],
)
def test_flip_probabilities_out_of_range(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitFlip(*arguments)


@pytest.mark.parametrize("known", ["no", 1, None, np.bool_(True)])
def test_known_must_be_a_bool(known: Any) -> None:
    with pytest.raises(ValueError, match=r"known must be True or False, got "):
        Masking(0.3, known=known)


ALL = [
    GaussianNoise(0.3),
    BitFlip(0.1),
    SaltAndPepper(0.2),
    Masking(0.2),
    Masking(0.2, known=True),
    PoissonThinning(0.6),
]
NO_DATA = [
    (np.zeros((7, 5)), r"must be a floating torch tensor, got ndarray; convert"),
    ([[0.0, 1.0]], r"must be a floating torch tensor, got list"),
    (None, r"must be a floating torch tensor, got NoneType"),
    (
        torch.zeros(7, 5, dtype=torch.int64),
        r"must have a floating dtype, got torch.int64; convert with",
    ),
    (torch.zeros(7, 5, dtype=torch.bool), r"must have a floating dtype, got torch.bool"),
    (torch.zeros(7, 5, dtype=torch.complex64), r"must have a floating dtype, got torch.complex64"),
    (torch.zeros(7, 5).to_sparse(), r"must be dense, got torch.sparse_coo; pass x.*to_dense"),
]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("corruption", ALL, ids=repr)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        *((x, "^x " + message) for x, message in NO_DATA),
        (torch.tensor(0.0), r"x must have shape \(N, \*x_shape\), got \(\); add a dimension"),
        (torch.tensor([[0.0, math.nan]]), r"^x must be .*got 1 values that are not, the first nan"),
        (torch.tensor([[math.inf, 0.0]]), r"^x must be .*got 1 values that are not, the first inf"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_data(corruption: Corruption, x: Any, message: str, validate: bool) -> None:
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=message):
        corruption(x)


DOMAIN = [
    (BitFlip(0.1), -0.25, r"x must be in \[0, 1\] under BitFlip\(.*3 values .*first -0.25; scale"),
    (BitFlip(0.1), 255.0, r"x must be in \[0, 1\] under BitFlip\(.*3 values .*first 255; scale"),
    (PoissonThinning(0.3), 0.5, r"x must be whole numbers >= 0 under Pois.*first 0.5; give it co"),
    (PoissonThinning(0.3), -1.0, r"x must be whole numbers >= 0 under Pois.*first -1; give it co"),
]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("corruption", "value", "message"), DOMAIN)
def test_data_outside_the_domain(
    corruption: Corruption, value: float, message: str, validate: bool
) -> None:
    x = torch.tensor([[0.0, 1.0, value], [value, value, 0.0]])
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=message):
        corruption(x)
    pair = probae.DenoisingAutoencoder(3, 2, hidden=(), corruption=corruption)
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"^x must be "):
        probae.fit(pair, x, epochs=1, progress=False)


@pytest.mark.parametrize("corruption", ALL, ids=repr)
def test_zero_is_in_every_domain(corruption: Corruption) -> None:
    assert corruption(torch.zeros(2, 3)).sample().isfinite().all()


@pytest.mark.parametrize("x_tilde", [x for x, _ in NO_DATA], ids=lambda x: type(x).__name__)
def test_posterior_of_what_is_no_data(case: Case, x_tilde: Any) -> None:
    law = case.pair().decoder(torch.randn(7, 3))
    with pytest.raises(ValueError, match=r"^x_tilde must "):
        case.corruption.posterior(law, x_tilde)


def test_shape_of_what_was_observed(case: Case) -> None:
    law = case.pair().decoder(torch.randn(7, 3))
    good = case.corruption(case.data(7, 5)).sample()
    assert case.corruption.posterior(law, good).batch_shape == (7,)
    assert case.corruption.posterior(law, good[0]).batch_shape == (7,)
    assert case.corruption.posterior(law, good[:, None]).batch_shape == (7, 7)
    for bad in (good[:3], good[..., :4], good[..., :1], good[0, ..., 0], torch.tensor(0.0)):
        message = r"x_tilde must have shape \(\.\.\., .*got \(.*; corrupt x as"
        with pytest.raises(ValueError, match=message):
            case.corruption.posterior(law, bad)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("corruption", "law", "x_tilde", "message"),
    [
        (
            BitFlip(0.1),
            dist.Bernoulli(0.5),
            [0.5],
            "x_tilde must be 0 or 1 under.*first 0.5; binar",
        ),
        (SaltAndPepper(0.1), dist.Bernoulli(0.5), [0.5], "x_tilde must be 0 or 1 under.*first 0.5"),
        (
            PoissonThinning(0.1),
            dist.Poisson(0.5),
            [0.5],
            "x_tilde must be whole numbers.*first 0.5",
        ),
        (
            GaussianNoise(0.1),
            dist.Normal(0.0, 0.5),
            [math.nan],
            "x_tilde must be finite .*first nan",
        ),
        (
            Masking(0.1, known=True),
            dist.Normal(0.0, 0.5),
            [[1.0], [0.5]],
            "x_tilde must be pairs of values and mask.*1 entries that are not, the first 0.5; mark",
        ),
        (
            Masking(0.1, known=True),
            dist.Normal(0.0, 0.5),
            [[1.0], [0.0]],
            "x_tilde must be pairs of values and mask.*1 entries that are not, the first 1; mark",
        ),
    ],
)
def test_what_no_corruption_makes(
    corruption: Corruption, law: Any, x_tilde: list[Any], message: str, validate: bool
) -> None:
    likelihood = law.expand((7, 1)).to_event(1)
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match=message):
        corruption.posterior(likelihood, torch.tensor(x_tilde))


@pytest.mark.parametrize("law", [torch.zeros(7, 5), None, 0.5], ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("corruption", ALL, ids=repr)
def test_what_is_no_distribution(corruption: Corruption, law: Any) -> None:
    x_tilde = corruption(torch.zeros(7, 5)).sample()
    message = rf"distribution must be p\(x\|z\), a torch.*Distribution, got {type(law).__name__};"
    for call in (corruption.marginal, partial(corruption.posterior, x_tilde=x_tilde)):
        with pytest.raises(ValueError, match=message):
            call(law)


UNFIT = [
    (GaussianNoise(0.1), dist.Bernoulli(logits=torch.zeros(7, 5)).to_event(1), "a Normal of"),
    (BitFlip(0.1), dist.Normal(torch.zeros(7, 5), 1.0).to_event(1), "a Bernoulli of"),
    (PoissonThinning(0.1), dist.Normal(torch.zeros(7, 5), 1.0).to_event(1), "a Poisson of"),
    (
        GaussianNoise(0.1),
        dist.MultivariateNormal(torch.zeros(7, 5), torch.eye(5)),
        "a Normal of independent entries",
    ),
    (
        Masking(0.1, known=True),
        dist.MultivariateNormal(torch.zeros(7, 5), torch.eye(5)),
        "a product over entries",
    ),
    (
        SaltAndPepper(0.1),
        dist.Normal(torch.zeros(7, 5), 1.0).to_event(1).mask(False),
        "a product over entries",
    ),
]


@pytest.mark.parametrize(("corruption", "law", "needs"), UNFIT)
def test_no_closed_form(corruption: Corruption, law: Any, needs: str) -> None:
    x_tilde = corruption(torch.zeros(7, 5)).sample()
    message = rf"distribution must be {needs}.* {type(corruption).__name__}\(.*, got \w+ with event"
    for call in (corruption.marginal, partial(corruption.posterior, x_tilde=x_tilde)):
        with pytest.raises(ValueError, match=message):
            call(law)


class Blur(Corruption):
    """A corruption without closed forms."""

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Normal(x.mean(-1, keepdim=True).expand_as(x), 1.0).to_event(x.dim() - 1)


def test_a_corruption_of_ones_own() -> None:
    decoder, encoder = GAUSSIAN(probae.MLP(3, 5)), probae.GaussianEncoder(probae.MLP(5, (2, 3)))
    pair = probae.Autoencoder(probae.StandardNormalPrior(3), encoder, decoder, Blur())
    assert math.isfinite(probae.ELBO().loss(pair.model, pair.guide, reals(7, 5)))
    message = r"corruption Blur\(\) must have closed forms here: .*marginal and posterior"
    with pytest.raises(ValueError, match=message):
        probae.CorruptedDecoder(decoder, Blur())(torch.zeros(7, 3))
    with pytest.raises(ValueError, match=message):
        Blur().posterior(decoder(torch.zeros(7, 3)), torch.zeros(7, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, BitFlip(0.1)), r"decoder must be a torch.nn.Module .*got None"),
        ((BERNOULLI(probae.MLP(3, 5)), None), r"corruption must be a probae.Corruption.*got None"),
        (
            (BERNOULLI(probae.MLP(3, 5)), torch.nn.Dropout()),
            r"must be a probae.Corruption.*Dropout",
        ),
    ],
)
def test_corrupted_decoder_refuses(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probae.CorruptedDecoder(*arguments)


def test_a_likelihood_that_does_not_fit_fails_at_construction() -> None:
    with pytest.raises(ValueError, match=r"decoder does not fit .*must be a Normal.*GreyBernoulli"):
        Case(GaussianNoise(0.1), BERNOULLI, bits).pair(known=True)


@pytest.mark.parametrize(
    ("law", "value"),
    [
        (Replacement(dist.Normal(torch.zeros(2), 1.0), (0.0,), 0.5), math.nan),
        (Replacement(Point(torch.ones(2)), (0.0,), 0.5), 0.5),
        (ShiftedPoisson(torch.ones(2), torch.ones(2)), 0.5),
        (Bits(torch.rand(2)), 0.5),
        (Seen(dist.Normal(torch.zeros(2), 1.0), 0.5, 1), 0.5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_outside_the_support(law: Any, value: float) -> None:
    law._validate_args = True
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.full(law.event_shape or (2,), value))


def test_kl_of_thinned_counts_is_that_of_binomials() -> None:
    counts, kept = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.2, 0.5, 0.9])
    p, q = Thinned(counts, kept), Thinned(counts, kept.flip(0))
    expected = torch.distributions.Binomial(counts, kept)
    expected = kl_divergence(expected, torch.distributions.Binomial(counts, kept.flip(0)))
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert kl_divergence(p, Thinned(counts - 1, kept)).isinf().all()
    assert kl_divergence(p, Thinned(counts + 1, kept)).isnan().all()  # not an elementary function


def test_the_kl_of_a_corruption_from_itself_costs_nothing() -> None:
    probs, others = torch.rand(2, 5, dtype=torch.float64)
    bernoulli = torch.distributions.Bernoulli
    expected = kl_divergence(bernoulli(probs), bernoulli(others))
    torch.testing.assert_close(kl_divergence(Bits(probs), Bits(others)), expected, rtol=0, atol=0)
    assert kl_divergence(Bits(probs), Bits(probs)).tolist() == [0] * 5

    made = []

    class Flips(probae.BitFlip):
        def forward(self, x: Tensor) -> Any:
            made.append(super().forward(x))
            return made[-1]

    pair = probae.DenoisingVAE(6, 2, corruption=Flips(0.2), hidden=(5,))
    x = (torch.rand(7, 6) < 0.4).float()
    made.clear()
    traces = trace_pair(pair.model, pair.guide, (x,), {}, 1)
    assert len(made) == 1  # the model takes what the guide made
    laws = [sites["x_tilde"]["fn"] for sites in (traces.guide, traces.model)]
    assert kl_divergence(*laws).tolist() == [0] * 7
    pair.guide(x)
    pair.model(x)
    assert len(made) == 3  # and nothing outside of objectives
