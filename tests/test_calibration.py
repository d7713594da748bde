"""Ranks and coverage on simulated data: uniform and nominal for a posterior, and for that alone.

Failure rates are declared as the probability that a right implementation fails a test, were its
seed drawn anew; the seeds are fixed, so a test that passes keeps passing.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Distribution

import probae
from probae import calibration, expected_coverage, simulation_based_calibration

DOUBLE = torch.float64
SURE = 1e-8  # p-value of what is plainly wrong
RATE = 1e-3  # failure rate of a test that asks for p-values above it


def ppca(weight: list[list[float]] | None = None, scale: float = 0.5) -> probae.PPCA:
    """Exact pair, by default of correlated codes."""
    w = torch.tensor(weight or [[1.0, 0.9], [0.5, 0.6], [0.2, -0.1]], dtype=DOUBLE)
    pair = probae.PPCA(len(w), w.shape[1]).double()
    pair.set_parameters(w, torch.arange(len(w)).double(), scale)
    return pair


class Wrong(nn.Module):
    """The exact posterior, with a scale and a shift that it should not have."""

    def __init__(self, pair: probae.PPCA, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.exact, self.scale, self.shift = pair.encoder, scale, shift

    def forward(self, x: Tensor) -> Distribution:
        law: Any = self.exact(x)
        return dist.MultivariateNormal(
            law.loc + self.shift * law.stddev, scale_tril=self.scale * law.scale_tril
        )


class Diagonal(nn.Module):
    """The posterior without its correlations: with the right marginals, or the optimal ELBO."""

    def __init__(self, pair: probae.PPCA, optimal: bool) -> None:
        super().__init__()
        self.exact, self.optimal = pair.encoder, optimal

    def forward(self, x: Tensor) -> Distribution:
        law: Any = self.exact(x)
        scale = law.stddev
        if self.optimal:
            scale = law.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return dist.Normal(law.loc, scale).to_event(1)


class Prior(nn.Module):
    """The prior in the place of a posterior, whatever x."""

    def __init__(self, pair: probae.Autoencoder) -> None:
        super().__init__()
        self.pair_prior, self.x_ndim = pair.prior, len(pair.x_shape)

    def forward(self, x: Tensor) -> Distribution:
        return self.pair_prior().expand(x.shape[: x.dim() - self.x_ndim])


class Bayes(nn.Module):
    """Exact posterior of a one-hot code, by enumeration; ``power`` spoils it."""

    def __init__(self, prior: nn.Module, decoder: nn.Module, power: float = 1.0) -> None:
        super().__init__()
        self.prior, self.decoder, self.power = prior, decoder, power

    def forward(self, x: Tensor) -> Distribution:
        states = torch.eye(self.prior().event_shape[0], dtype=x.dtype)
        prior = self.prior().log_prob(states)  # (K,)
        logits = prior + self.decoder(states).log_prob(x.unsqueeze(-2))
        return dist.OneHotCategorical(logits=self.power * logits)


def one_hot(power: float = 1.0) -> probae.Autoencoder:
    prior = probae.CategoricalPrior(4)
    prior.logits.data = torch.tensor([0.0, 0.5, 1.0, -1.0])
    decoder = probae.BernoulliDecoder(probae.MLP(4, 3))
    for parameter in decoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return probae.Autoencoder(prior, Bayes(prior, decoder, power), decoder).double()


def vae(**options: Any) -> probae.VAE:
    return probae.VAE(4, 2, hidden=(5,), **options)


# ---- ranks ---------------------------------------------------------------------------------------


def test_ranks_of_the_posterior_are_uniform() -> None:
    pair = ppca()
    ranks = simulation_based_calibration(pair, 5000, statistic=lambda z, x: z[..., 0] - x[:, 0])
    assert ranks.ranks.shape == (5000, 2)
    assert ranks.statistic_ranks.shape == (5000, 2)
    assert ranks.ranks.dtype == torch.int64
    assert ranks.names == ("z[0]", "z[1]", "log p(x|z)", "statistic")
    assert ranks.table.shape == (5000, 4)
    assert ranks.table.min() == 0
    assert ranks.table.max() == 99
    assert ranks.p_value > RATE  # failure rate: RATE
    assert f"p = {ranks.p_value:.3g} for 4 quantities together" in repr(ranks)
    assert "5000 simulations, 99 draws each" in repr(ranks)


def test_p_values_of_the_posterior_are_uniform_themselves() -> None:
    # Kolmogorov-Smirnov over 100 seeds, for each of 3 quantities: failure rate 3 RATE
    pair = ppca()
    p = torch.stack(
        [simulation_based_calibration(pair, 400, 19, seed=seed).p_values for seed in range(100)]
    )
    for quantity in range(3):
        assert stats.kstest(p[:, quantity].numpy(), "uniform").pvalue > RATE
    together = [min(1.0, 3 * row.min().item()) for row in p]
    # Bonferroni is valid: at most 10 % below 0.1, and 5 standard errors
    assert np.mean(np.array(together) < 0.1) < 0.1 + 5 * (0.09 / 100) ** 0.5


@pytest.mark.parametrize(("scale", "shift"), [(0.7, 0.0), (1.4, 0.0), (1.0, 0.3), (1.0, -0.3)])
def test_ranks_tell_of_what_is_wrong(scale: float, shift: float) -> None:
    pair = ppca([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    ranks = simulation_based_calibration(pair, 2000, proposal=Wrong(pair, scale, shift))
    assert ranks.p_value < SURE
    counts = ranks.histogram(10)[:2].double()  # coordinates
    ends, middle = counts[:, [0, 9]].mean(1), counts[:, 4:6].mean(1)
    if shift:
        low, high = counts[:, 0], counts[:, 9]  # an encoder above the code leaves low ranks
        assert (low > 1.5 * high).all() if shift > 0 else (high > 1.5 * low).all()
    else:
        assert (ends > 1.5 * middle).all() if scale < 1 else (middle > 1.5 * ends).all()


def test_an_encoder_far_off_has_extreme_ranks() -> None:
    pair = ppca()
    for shift, rank in ((-1e4, 19), (1e4, 0)):
        ranks = simulation_based_calibration(pair, 20, 19, proposal=Wrong(pair, shift=shift))
        assert (ranks.ranks == rank).all()


def test_coordinates_do_not_see_a_prior_in_place_of_the_posterior_but_the_likelihood_does() -> None:
    pair = ppca()
    ranks = simulation_based_calibration(pair, 5000, proposal=Prior(pair))
    of_z, of_x = ranks.p_values[:2], ranks.p_values[2]
    assert (of_z > RATE).all()  # failure rate: 2 RATE
    assert of_x < SURE
    assert ranks.p_value < SURE
    assert "the least even log p(x|z)" in repr(ranks)


def test_a_diagonal_encoder_of_correlated_codes_is_caught() -> None:
    pair = ppca()
    marginal = simulation_based_calibration(pair, 5000, proposal=Diagonal(pair, optimal=False))
    assert (marginal.p_values[:2] > RATE).all()  # each marginal is right; failure rate: 2 RATE
    assert marginal.p_values[2] < SURE
    optimal = simulation_based_calibration(pair, 5000, proposal=Diagonal(pair, optimal=True))
    assert (optimal.p_values[:2] < SURE).all(), "the optimal ELBO is too narrow on each"


def test_a_statistic_finds_what_it_looks_for() -> None:
    # as above, and the product of the codes has the wrong sign too often
    pair = ppca()
    ranks = simulation_based_calibration(
        pair, 5000, proposal=Diagonal(pair, optimal=False), statistic=lambda z, x: z.prod(-1)
    )
    assert ranks.p_values[3] < SURE


def test_ranks_of_discrete_codes_are_uniform_under_their_posterior() -> None:
    pair = one_hot()
    ranks = simulation_based_calibration(pair, 5000, statistic=lambda z, x: (z * x[:, :1]).sum(-1))
    assert ranks.names[:5] == ("z[0]", "z[1]", "z[2]", "z[3]", "log p(x|z)")
    assert ranks.p_value > RATE  # failure rate: RATE
    assert (ranks.histogram(100) > 0).double().mean() > 0.99, "no rank is left out by ties"
    for power in (0.5, 2.0):
        assert simulation_based_calibration(one_hot(power), 5000).p_value < SURE


@pytest.mark.parametrize("count", [1, 2, 7])
def test_ranks_of_discrete_codes_are_uniform_for_any_number_of_draws(count: int) -> None:
    ranks = simulation_based_calibration(one_hot(), 5000, count)
    assert ranks.p_value > RATE  # failure rate: RATE


def test_equal_codes_tie_though_their_likelihoods_round_differently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a likelihood that rounds up in small batches and down in large ones, as a product may
    pair = one_hot()
    exact = pair.decoder.forward

    def rounded(z: Tensor) -> Any:
        law: Any = exact(z)
        log_prob = law.log_prob
        law.log_prob = lambda x: log_prob(x) + (1e-9 if z.shape[0] == 1 else -1e-9)
        return law

    monkeypatch.setattr(pair.decoder, "forward", rounded)
    assert simulation_based_calibration(pair, 5000).p_value > RATE  # failure rate: RATE


def test_spike_and_slab_codes_tie_at_zero() -> None:
    pair = probae.SparseAutoencoder(4, 3, prior="spike-and-slab", posterior="spike-and-slab")
    ranks = simulation_based_calibration(pair, 5000, proposal=Prior(pair))
    assert (ranks.p_values[:3] > RATE).all()  # failure rate: 3 RATE
    assert ranks.names[-1] == "log p(x|z)"


# ---- the table, its histogram and its test -------------------------------------------------------


def some_ranks(num_draws: int, size: int = 1000) -> probae.CalibrationRanks:
    table = torch.randint(0, num_draws + 1, (size, 3))
    return probae.CalibrationRanks(table[:, :2], table[:, 2:], ("a", "b", "c"), num_draws)


@pytest.mark.parametrize(("num_draws", "bins"), [(99, 20), (9, 10), (99, 7), (6, 3), (18, None)])
def test_histogram_and_expected_counts_are_those_of_the_ranks(
    num_draws: int, bins: int | None
) -> None:
    ranks = some_ranks(num_draws)
    counts, expected = ranks.histogram(bins), ranks.expected(bins)
    size = counts.shape[1]
    assert size == (bins or min(20, num_draws + 1))
    of_rank = [rank * size // (num_draws + 1) for rank in range(num_draws + 1)]
    for b in range(size):
        members = [rank for rank in range(num_draws + 1) if of_rank[rank] == b]
        inside = torch.isin(ranks.table, torch.tensor(members)).sum(0)
        assert torch.equal(counts[:, b], inside)
        assert expected[b].item() == pytest.approx(1000 * len(members) / (num_draws + 1))
    assert counts.sum(1).tolist() == [1000] * 3
    if bins == min(20, num_draws + 1) or bins is None:
        known = [stats.chisquare(row, expected.numpy()).pvalue for row in counts.numpy()]
        np.testing.assert_allclose(ranks.p_values.numpy(), known, rtol=1e-10)
        assert ranks.p_value == pytest.approx(min(1.0, 3 * min(known)), rel=1e-10)


def test_bins_hold_ten_simulations_on_average() -> None:
    assert some_ranks(99, size=20).histogram().shape == (3, 2)
    assert some_ranks(99, size=55).histogram().shape == (3, 5)
    assert some_ranks(1).histogram().shape == (3, 2)


def test_bins_that_there_are_no_ranks_for_are_refused() -> None:
    for method in (some_ranks(9).histogram, some_ranks(9).expected):
        with pytest.raises(ValueError, match="bins must be at most the 10 ranks that there are"):
            method(11)
        with pytest.raises(ValueError, match="bins must be an int >= 1, got 0"):
            method(0)


def test_the_sum_of_p_values_is_capped() -> None:
    assert some_ranks(9).p_value <= 1


# ---- coverage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draws", [1, 3, 99])
@pytest.mark.parametrize("build", [ppca, one_hot])
def test_coverage_of_the_posterior_is_nominal(
    build: Callable[[], probae.Autoencoder], num_draws: int
) -> None:
    coverage = expected_coverage(build(), 4000, num_draws)
    assert torch.allclose(coverage.levels, torch.arange(0.05, 0.96, 0.05, dtype=DOUBLE))
    # 19 levels within 4.5 standard errors: failure rate 2e-4
    assert ((coverage.coverage - coverage.levels).abs() < 4.5 * coverage.std_error).all()
    assert coverage.p_value > RATE  # failure rate: RATE
    assert coverage.credibility.shape == (4000,)
    assert stats.kstest(coverage.credibility.numpy(), "uniform").pvalue > RATE  # and RATE again
    assert coverage.num_draws == num_draws


@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_coverage_of_a_wrong_scale_is_that_of_its_closed_form(scale: float) -> None:
    # in two dimensions: z is in the region of mass α of N(m, c² S) with probability 1 - (1 - α)^c²
    pair = ppca()
    coverage = expected_coverage(pair, 4000, 999, proposal=Wrong(pair, scale))
    expected = 1 - (1 - coverage.levels) ** scale**2
    # 4.5 standard errors and 1/(L + 1) for the finite number of draws; failure rate 2e-4
    error = (coverage.coverage - expected).abs()
    assert (error < 4.5 * coverage.std_error + 1e-3).all()
    gap = coverage.coverage - coverage.levels
    assert (gap < 0).all() if scale < 1 else (gap > 0).all()
    assert coverage.p_value < SURE


def test_coverage_falls_with_a_shift() -> None:
    pair = ppca()
    shifted = expected_coverage(pair, 2000, proposal=Wrong(pair, shift=1.0))
    assert (shifted.coverage < shifted.levels).all()


def test_coverage_sees_lost_correlations_and_not_a_prior() -> None:
    pair = ppca()
    blind = expected_coverage(pair, 5000, proposal=Prior(pair))
    assert blind.p_value > RATE  # failure rate: RATE
    assert expected_coverage(pair, 5000, proposal=Diagonal(pair, False)).p_value < SURE


def test_p_values_of_coverage_are_uniform_themselves() -> None:
    # Kolmogorov-Smirnov over 100 seeds; failure rate: RATE
    pair = ppca()
    p = [expected_coverage(pair, 400, 9, seed=seed).p_value for seed in range(100)]
    assert stats.kstest(p, "uniform").pvalue > RATE


def test_standard_errors_are_binomial_and_never_zero() -> None:
    pair = ppca()
    coverage = expected_coverage(pair, 500, levels=[0.5, 0.9])
    share = coverage.coverage
    binomial = (share * (1 - share) / 500).sqrt()
    assert torch.allclose(coverage.std_error, binomial, rtol=0.02)
    far = expected_coverage(pair, 500, levels=torch.tensor([0.5]), proposal=Wrong(pair, shift=1e4))
    assert far.coverage.item() == 0
    assert 0 < far.std_error.item() < 0.01
    assert "0.000 ± 0.002 at level 0.5, the furthest off of 1; p = 0" in repr(far)


def test_a_code_outside_the_support_of_the_encoder_is_outside_every_region() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Distribution:
            return dist.LogNormal(torch.zeros(*x.shape[:-1], 2), 1.0).to_event(1)

    pair = probae.PPCA(3, 2)
    coverage = expected_coverage(pair, 1000, levels=[0.98], proposal=Positive())
    assert 0.15 < coverage.coverage.item() < 0.35, "a quarter of the codes is positive"


# ---- corruptions ---------------------------------------------------------------------------------


class Deconvolved(nn.Module):
    r"""Encoder of x̃ whose mixture over the noise of x̃ is the posterior given the clean x.

    p(z|x) = N(kx, v) with k = 1/(1+s²), v = s²k, and N(kx̃, v - k²σ²) mixes to it.
    """

    def __init__(self, noise: float, s: float) -> None:
        super().__init__()
        self.k = 1 / (1 + s**2)
        self.scale = math.sqrt(s**2 * self.k - self.k**2 * noise**2)

    def forward(self, x: Tensor) -> Distribution:
        return dist.Normal(self.k * x, self.scale).to_event(1)


def deconvolved(noise: float = 0.9, s: float = 1.0) -> probae.Autoencoder:
    decoder = probae.GaussianDecoder(probae.MLP(1, 1), scale=s)
    for name, parameter in decoder.network.named_parameters():
        parameter.data.fill_(1.0 if "weight" in name else 0.0)
    prior, encoder = probae.StandardNormalPrior(1), Deconvolved(noise, s)
    return probae.Autoencoder(prior, encoder, decoder, probae.GaussianNoise(noise)).double()


def test_a_guide_under_a_corruption_is_checked_as_a_mixture_over_corrupted_data() -> None:
    pair = deconvolved()
    ranks = simulation_based_calibration(pair, 5000)
    assert ranks.p_value > RATE  # failure rate: RATE
    coverage = expected_coverage(pair, 4000)
    assert ((coverage.coverage - coverage.levels).abs() < 4.5 * coverage.std_error).all()  # 2e-4
    # the same encoder given the clean x is too narrow
    assert simulation_based_calibration(pair, 5000, proposal=pair.encoder).p_value < SURE
    assert expected_coverage(pair, 4000, proposal=pair.encoder).p_value < SURE


@pytest.mark.parametrize(
    ("corruption", "channels"),
    [
        (probae.Masking(0.3, known=True), ()),
        (probae.BitFlip(0.1), ()),
        (probae.BitFlip(0.1), (3,)),
    ],
    ids=repr,
)
def test_corrupted_data_of_any_shape_go_through(
    corruption: probae.Corruption, channels: tuple[int, ...]
) -> None:
    shape, hidden = (1, 4, 4), (5,)
    options: dict[str, Any] = {"likelihood": "bernoulli", "channels": channels, "hidden": hidden}
    pair = probae.DenoisingVAE(shape, 2, corruption=corruption, **options)
    ranks = simulation_based_calibration(pair, 20, 7)
    assert ranks.ranks.shape == (20, 2)
    assert expected_coverage(pair, 20, 7, levels=[0.5]).coverage.shape == (1,)


# ---- what it leaves alone, what it refuses -------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64, 10_000])
def test_chunks_keep_ranks_uniform(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(calibration, "rows_in_budget", lambda pair: rows)
    pair = ppca()
    ranks = simulation_based_calibration(pair, 70, 11)
    assert ranks.table.shape == (70, 3)
    assert ranks.p_value > RATE  # failure rate: RATE
    coverage = expected_coverage(pair, 70, 11)
    assert coverage.credibility.shape == (70,)
    assert coverage.p_value > RATE  # failure rate: RATE


@pytest.mark.parametrize("check", [simulation_based_calibration, expected_coverage])
def test_seeds_fix_the_result_and_nothing_else_changes(check: Callable[..., Any]) -> None:
    pair = vae()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = (check(pair, 30, 9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not all(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))
    check(pair, 30, 9, seed=None)
    assert not torch.equal(torch.get_rng_state(), state)
    assert pair.training
    assert all(module.training for module in pair.modules())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())
    assert len(pyro.get_param_store()) == 0


def test_a_proposal_keeps_its_mode() -> None:
    pair, proposal = ppca(), nn.Sequential(nn.Dropout(0.5), ppca().encoder)
    simulation_based_calibration(pair, 20, 9, proposal=proposal)
    assert proposal.training
    assert proposal[0].training


def test_statistics_may_be_several_of_any_dtype() -> None:
    pair = ppca()
    seen = []

    def statistic(z: Tensor, x: Tensor) -> Tensor:
        seen.append((tuple(z.shape), tuple(x.shape)))
        return torch.stack([z[..., 0] > 0, z[..., 1] > z[..., 0]], -1)

    ranks = simulation_based_calibration(pair, 5000, statistic=statistic)
    assert ranks.names[3:] == ("statistic[0]", "statistic[1]")
    assert ranks.p_value > RATE  # failure rate: RATE; ties everywhere
    assert all(len(z) == 3 and z[2] == 2 and x == (z[1], 3) for z, x in seen)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (3, "statistic must be a function of z and x, got int"),
        (lambda z, x: z.sum(), r"must return a real tensor of shape \(1, 20\).* got \(\)"),
        (lambda z, x: x.sum(-1), r"must return a real tensor of shape"),
        (lambda z, x: 0.0, "must return a real tensor .* got float"),
        (lambda z, x: 0.0, r"shape \(1, 20\), one number a code, or \(1, 20, J\), for z"),
        (lambda z, x: 1 / 0, r"failed for z of shape \(1, 20, 2\) .* ZeroDivisionError: division"),
        (lambda z: z, "failed for z of shape .* with TypeError"),
        (lambda z, x: z.sum(-1) * math.nan, "must not be NaN"),
        (lambda z, x: z.sum(-1).to(torch.complex64), "must return a real tensor"),
    ],
)
def test_statistics_that_cannot_be_ranked_are_refused(statistic: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulation_based_calibration(ppca(), 20, 9, statistic=statistic)


@pytest.mark.parametrize("check", [simulation_based_calibration, expected_coverage])
def test_pairs_without_a_posterior_are_refused(check: Callable[..., Any]) -> None:
    point = probae.SparseAutoencoder(4, 3)
    with pytest.raises(
        ValueError, match=r"kind MAP_JOINT: its encoder gives a point, .*=probae\.fit_proposal"
    ):
        check(point)
    check(point, 20, 3, proposal=probae.LaplaceEncoder(probae.MLP(4, (2, 3))))
    with pytest.raises(ValueError, match="kind RECONSTRUCTION: nothing can be drawn from its flat"):
        check(probae.UndercompleteAutoencoder(4, 2))
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got int"):
        check(3)
    with pytest.raises(ValueError, match=r"proposal\(x\) must return a continuous density"):
        check(vae(), proposal=probae.PointEncoder(probae.MLP(4, 2)))
    with pytest.raises(ValueError, match="proposal must be an encoder"):
        check(vae(), proposal=lambda x: x)
    with pytest.raises(ValueError, match="with event shape"):
        check(vae(), proposal=probae.GaussianEncoder(probae.MLP(4, (2, 3))))
    hashing = probae.SemanticHashing(4, 3, posterior="noise", hidden=(5,))
    with pytest.raises(ValueError, match=r"kind CONDITIONAL"):
        check(hashing)


@pytest.mark.parametrize("check", [simulation_based_calibration, expected_coverage])
def test_counts_and_seeds_out_of_range_are_refused(check: Callable[..., Any]) -> None:
    for bad in (19, 0, 2.5, True):
        with pytest.raises(ValueError, match="num_simulations must be an int >= 20, got"):
            check(vae(), bad)
    for bad in (0, -1, 9.0):
        with pytest.raises(ValueError, match="num_draws must be an int >= 1, got"):
            check(vae(), 20, bad)
    with pytest.raises(ValueError, match="seed must be a 64-bit int"):
        check(vae(), 20, seed="a")


@pytest.mark.parametrize("levels", [[], [0.0], [1.0], [0.5, math.nan], ["a"], 0.5, "ab", [True]])
def test_levels_out_of_range_are_refused(levels: Any) -> None:
    with pytest.raises(
        ValueError, match=r"levels must be one or more numbers strictly in \(0, 1\)"
    ):
        expected_coverage(vae(), 20, levels=levels)


@pytest.mark.parametrize("check", [simulation_based_calibration, expected_coverage])
def test_an_encoder_that_broke_is_refused(check: Callable[..., Any]) -> None:
    pair = vae()
    pair.encoder.network.output.bias.data[:2] = math.nan  # of the means; torch refuses scales
    with pytest.raises(ValueError, match="has a parameter that is not finite, encoder"):
        check(pair, 20, 3)


@pytest.mark.parametrize("likelihood", probae.LIKELIHOODS)
def test_every_likelihood_goes_through(likelihood: str) -> None:
    options = {"num_classes": 3} if likelihood == "categorical" else None
    pair = vae(likelihood=likelihood, likelihood_options=options)
    assert simulation_based_calibration(pair, 20, 5).ranks.shape == (20, 2)
    assert expected_coverage(pair, 20, 5).credibility.shape == (20,)


@pytest.mark.parametrize("prior", ["normal", "laplace", "mixture", "vamp", "flow"])
def test_every_proper_prior_goes_through(prior: str) -> None:
    pair = vae(prior=prior)
    assert simulation_based_calibration(pair, 20, 5).ranks.shape == (20, 2)
    assert expected_coverage(pair, 20, 5).credibility.shape == (20,)


def test_codes_of_one_number_are_ranked_too() -> None:
    class Normal(torch.nn.Module):
        def forward(self) -> torch.distributions.Distribution:
            return dist.Normal(torch.tensor(0.0), torch.tensor(1.0))

    class Posterior(torch.nn.Module):
        def forward(self, x: Tensor) -> torch.distributions.Distribution:
            return dist.Normal(x[..., 0] / 2, torch.tensor(0.5**0.5))

    class Decoder(torch.nn.Module):
        def forward(self, z: Tensor) -> torch.distributions.Distribution:
            return dist.Normal(z[..., None], 1.0).to_event(1)

    pair = probae.Autoencoder(Normal(), Posterior(), Decoder())
    ranks = probae.simulation_based_calibration(pair, 300)  # exact: fails in 1 of 1000 seeds
    assert ranks.names == ("z", "log p(x|z)")
    assert ranks.p_value > 1e-3
    assert probae.expected_coverage(pair, 300).p_value > 1e-3
    with pytest.raises(ValueError, match="kind='spherical' needs a Gaussian prior"):
        probae.interpolate(pair, torch.ones(2), 2 * torch.ones(2), kind="spherical")
