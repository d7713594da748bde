"""What a pair says of data, in ArviZ's containers of 0.x and of 1.x."""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import probae
from probae import Kind
from probae.arviz import _leave_one_out, pareto_khat, tail_size
from probae.distributions import is_discrete, is_flat, is_point

from .conftest import CASES, Case, N, Z

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 0.23 announces 1.x
    import arviz as az

matplotlib.use("agg")
OLD = not hasattr(az, "convert_to_datatree")
DOUBLE = torch.float64


def groups(data: Any) -> set[str]:
    return set(data.groups()) if OLD else set(data.children)


def loo(data: Any) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """Elpd, its standard error, p_loo, elpd and Pareto k of each datum."""
    found = az.loo(data, pointwise=True)
    names = ("elpd_loo", "p_loo", "loo_i") if OLD else ("elpd", "p", "elpd_i")
    elpd, p, pointwise = (getattr(found, name) for name in names)
    return float(elpd), float(found.se), float(p), np.asarray(pointwise), np.asarray(found.pareto_k)


def values(data: Any, group: str, variable: str = "x") -> Tensor:
    return torch.tensor(data[group][variable].values)


def ppca(dimension: int = 6, z_dim: int = 2, posterior: str = "exact") -> probae.PPCA:
    torch.manual_seed(3)
    pair = probae.PPCA(dimension, z_dim, posterior=posterior).double()
    weight = torch.randn(dimension, z_dim, dtype=DOUBLE)
    pair.set_parameters(weight, torch.linspace(-1, 1, dimension, dtype=DOUBLE), 0.7)
    return pair


def vae() -> probae.VAE:
    torch.manual_seed(3)
    return probae.VAE(5, 2, hidden=(6,), activation="tanh").double()


# ---- the log-likelihood and leave-one-out -------------------------------------------------------


def test_leave_one_out_is_exact_on_simulated_data() -> None:
    pair = ppca()
    x, _ = probae.sample(pair, 300, seed=11)
    exact = probae.log_likelihood(pair, x, "exact").values.numpy()
    elpd, se, p_loo, pointwise, khat = loo(probae.to_arviz(pair, x))
    assert abs(elpd - exact.sum()) < 2 * se
    np.testing.assert_allclose(pointwise, exact, atol=1e-5)  # all weights are p(x)
    assert abs(p_loo) < 1e-5
    assert (khat < 0).all()  # and ArviZ takes the spread for a tail without weight


@pytest.mark.parametrize(
    ("posterior", "dtype"),
    [("exact", torch.float32), ("exact", DOUBLE), ("diagonal", torch.float32)],
)
def test_leave_one_out_is_within_two_standard_errors_on_digits(
    posterior: str, dtype: torch.dtype
) -> None:
    data = probae.load_dataset("digits")
    train, x = data.train.flatten(1).to(dtype), data.test.flatten(1)[:100].to(dtype)
    torch.manual_seed(0)
    pair = probae.PPCA(64, 5, posterior=posterior).to(dtype)
    pair.initialize(train)
    probae.fit(pair, train, epochs=30, lr=1e-2, progress=False)
    exact = probae.log_likelihood(pair, x, "exact").values.double().numpy()
    result = probae.to_arviz(pair, x, num_samples=200, num_prior_samples=0, predictive=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a Pareto k, under the diagonal encoder
        elpd, se, p_loo, _, khat = loo(result)
    assert abs(elpd - exact.sum()) < 2 * se
    assert abs(elpd - exact.sum()) < (0.01 if posterior == "exact" else 5)  # far below 2 se
    assert (khat < 0.5).mean() > 0.8
    assert -1e-6 < p_loo < 0.1  # no parameter is counted
    # log p(x|z), at codes made from x itself, would be far off, by more than 2 se
    result["log_likelihood"]["x"][:] = result["sample_stats"]["reconstruction"].values
    with pytest.warns(UserWarning, match="Pareto"):
        assert loo(result)[0] > exact.sum() + 2 * se


def test_where_conditional_leave_one_out_works_the_two_agree() -> None:
    # 1 / E_post[1 / p(x|z)] = p(x): a code of one dimension that x says little about
    pair = probae.PPCA(2, 1).double()
    pair.set_parameters(torch.full((2, 1), 0.4, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), 1.0)
    x, _ = probae.sample(pair, 40, seed=11)
    result = probae.to_arviz(pair, x, num_samples=20_000, num_prior_samples=0)
    _, _, _, pointwise, _ = loo(result)
    result["log_likelihood"]["x"][:] = result["sample_stats"]["reconstruction"].values
    _, _, _, conditional, khat = loo(result)
    assert khat.mean() < 0.5  # that of 1 / p(x|z) is |w|² / (1 + |w|²) = 0.24 here
    # relative standard deviation of 1 / p(x|z) below 1: 40 means of 20 000, 6 errors each
    np.testing.assert_allclose(conditional, pointwise, atol=6 / math.sqrt(20_000))


def test_log_likelihood_is_the_mean_weight_of_the_other_draws() -> None:
    pair = ppca(posterior="diagonal")
    x, _ = probae.sample(pair, 9, seed=11)
    result = probae.to_arviz(pair, x, num_samples=30)
    weights = values(result, "sample_stats", "log_weight")[0].exp()
    stored = values(result, "log_likelihood")[0]
    for s in range(30):
        others = torch.cat([weights[:s], weights[s + 1 :]])
        torch.testing.assert_close(stored[s], others.mean(0).log(), rtol=0, atol=2e-6)
    # together they are the estimate by all the weights
    mean = stored.logsumexp(0) - math.log(30)
    torch.testing.assert_close(mean, weights.mean(0).log(), rtol=0, atol=2e-6)


def test_one_weight_above_all_others_is_handled_and_seen() -> None:
    # no cancellation where a draw holds all the weight: the other draws know nothing of it
    log_weights = torch.full((50, 1), -1000.0, dtype=DOUBLE)
    log_weights[7] = 0.0
    result = _leave_one_out(log_weights)
    torch.testing.assert_close(result[7], torch.tensor([-1000.0], dtype=DOUBLE), rtol=1e-8, atol=0)
    assert torch.allclose(result[8:], torch.tensor(-math.log(49.0), dtype=DOUBLE), atol=1e-5)


class Broad(nn.Module):
    """The prior as the encoder: no posterior."""

    def forward(self, x: Tensor) -> dist.Distribution:
        zeros = x.new_zeros(*x.shape[:-1], 2)
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)


def test_a_bad_encoder_is_flagged_and_its_elpd_is_a_bound() -> None:
    # z from the prior: few draws come near the posterior, whose scale is 0.7 / |weight|
    pair = ppca(dimension=30)
    x, _ = probae.sample(pair, 100, seed=11)
    exact = probae.log_likelihood(pair, x, "exact").values
    result = probae.to_arviz(pair, x, num_samples=200, num_prior_samples=0, proposal=Broad())
    with pytest.warns(UserWarning, match="Pareto"):
        elpd, _, _, pointwise, khat = loo(result)
    stored = values(result, "sample_stats", "khat").numpy()
    assert (stored > 0.7).mean() > 0.5
    flagged = (khat > 0.7) == (stored > 0.7)
    assert flagged.mean() > 0.9  # ArviZ's k is that of the weights
    assert elpd < float(exact.sum())
    # Markov: an unbiased estimate is above e^3 p(x) for one datum in 20 at most
    assert (pointwise - exact.numpy() > 3).mean() < 0.05


@pytest.mark.parametrize("num_samples", [50, 200, 2000])
def test_draws_that_are_all_one_code_are_flagged(num_samples: int) -> None:
    # equal weights of many codes are those of a posterior; of one code, they tell nothing
    torch.manual_seed(0)
    pair = probae.SemanticHashing(6, 3, posterior="bernoulli", hidden=()).double()
    with torch.no_grad():
        pair.encoder.network.output.weight.zero_()
        pair.encoder.network.output.bias.fill_(40.0)  # q(z|x) = 1 at z = (1, 1, 1)
    x = torch.rand(5, 6, dtype=DOUBLE).round()
    exact = probae.log_likelihood(pair, x, "exact").values
    result = probae.to_arviz(pair, x, num_samples=num_samples, num_prior_samples=0)
    assert (values(result, "posterior", "z") == 1).all()
    with pytest.warns(UserWarning, match="Pareto"):
        _, _, _, pointwise, khat = loo(result)
    assert (khat > 0.7).all()
    assert (torch.from_numpy(pointwise) < exact).all()  # the joint of one code


class Narrow(nn.Module):
    """The posterior with its variance times ``ratio``."""

    def __init__(self, pair: probae.PPCA, ratio: float) -> None:
        super().__init__()
        self.posterior, self.ratio = pair.encoder, ratio

    def forward(self, x: Tensor) -> dist.Distribution:
        exact = self.posterior(x)
        return dist.MultivariateNormal(exact.mean, self.ratio * exact.covariance_matrix)


@pytest.mark.parametrize("ratio", [0.8, 0.3])
def test_pareto_k_is_known_for_a_posterior_that_is_too_narrow(ratio: float) -> None:
    # w = exp(a z²) with z ~ N(0, r) and 2 a = 1/r - 1 has P(w > t) ~ t^(-1/k), k = 1 - r
    pair = ppca(z_dim=1)
    x, _ = probae.sample(pair, 60, seed=11)
    result = probae.to_arviz(
        pair,
        x,
        num_samples=2000,
        num_prior_samples=0,
        predictive=False,
        proposal=Narrow(pair, ratio),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        khat = loo(result)[4]
    stored = values(result, "sample_stats", "khat").numpy()
    # logarithms in the tail bias each k a little; the mean of 60 has a standard error of 0.02
    assert abs(stored.mean() - (1 - ratio)) < 0.15
    # ArviZ fits its tail to an affine function of the weights, but for a curvature of their share
    np.testing.assert_allclose(khat, stored, atol=0.05)


def test_the_estimate_is_that_of_log_likelihood_under_a_corruption_too() -> None:
    torch.manual_seed(3)
    pair = probae.DenoisingVAE(5, 1, corruption=probae.GaussianNoise(0.5), likelihood="gaussian")
    pair.double()
    x = torch.randn(6, 5, dtype=DOUBLE)
    result = probae.to_arviz(pair, x, num_samples=4000, num_prior_samples=0)
    found = values(result, "log_likelihood")[0].logsumexp(0) - math.log(4000)
    ll = probae.log_likelihood(pair, x, "iwae", num_samples=20_000)
    weights = values(result, "sample_stats", "log_weight")[0]
    error = (weights - weights.logsumexp(0) + math.log(4000)).exp().std(0) / math.sqrt(4000)
    # six differences of 5 standard errors: fails for one seed in 300 000
    assert ((found - ll.values).abs() < 5 * (error**2 + ll.std_error**2).sqrt()).all()


# ---- draws --------------------------------------------------------------------------------------


def test_statistics_are_the_densities_of_the_stored_draws() -> None:
    pair, x = vae(), torch.rand(7, 5, dtype=DOUBLE).round()
    result = probae.to_arviz(pair, x, num_samples=40)
    z = values(result, "posterior", "z")[0]
    with torch.no_grad():
        log_q = pair.encoder(x).log_prob(z)
        reconstruction = pair.decoder(z).log_prob(x)
        log_p = pair.prior().log_prob(z) + reconstruction
    expected = {
        "reconstruction": reconstruction,
        "log_p": log_p,
        "log_q": log_q,
        "log_weight": log_p - log_q,
    }
    for name, value in expected.items():
        stored = values(result, "sample_stats", name)[0]
        torch.testing.assert_close(stored, value, rtol=0, atol=1e-10)
    khat = pareto_khat((log_p - log_q).topk(tail_size(40), 0).values, 40)
    torch.testing.assert_close(values(result, "sample_stats", "khat"), khat)
    assert torch.equal(values(result, "observed_data").double(), x)


def test_draws_follow_posterior_prior_and_decoder() -> None:
    pair, count = ppca(dimension=3), 20_000
    x, _ = probae.sample(pair, 3, seed=11)
    result = probae.to_arviz(pair, x, num_samples=count, num_prior_samples=count)
    weight, mean, scale = (t.detach() for t in pair.decoder.affine())
    with torch.no_grad():
        posterior = pair.encoder(x)
    eye = torch.eye(3, dtype=DOUBLE)
    spread = weight @ posterior.covariance_matrix @ weight.T + scale**2 * eye
    unit = torch.eye(2, dtype=DOUBLE)
    expected = {
        ("posterior", "z"): (posterior.mean, posterior.covariance_matrix),
        ("posterior_predictive", "x"): (posterior.mean @ weight.T + mean, spread),
        ("prior", "z"): (torch.zeros(3, 2, dtype=DOUBLE), unit),
        ("prior_predictive", "x"): (mean.expand(3, 3), weight @ weight.T + scale**2 * eye),
    }
    for (group, variable), (centre, covariance) in expected.items():
        draws = values(result, group, variable)[0]  # (count, 3, dimension)
        variances = covariance.diagonal(dim1=-2, dim2=-1).expand_as(centre)
        # 39 means, 5 standard errors each: fails for one seed in 40 000
        assert ((draws.mean(0) - centre).abs() < 5 * (variances / count).sqrt()).all()
        for n in range(3):
            found = torch.cov(draws[:, n].T)
            sizes = variances[n].sqrt()
            # |correlations| < 1: standard error at most sqrt(2 / count) of a product of scales
            bound = 6 * math.sqrt(2 / count) * sizes[:, None] * sizes
            assert ((found - covariance.expand(3, *found.shape)[n]).abs() < bound).all()


def test_predictions_stand_beside_the_codes_they_were_drawn_at() -> None:
    # a decoder of almost no noise gives the code away
    pair = probae.PPCA(3, 2).double()
    weight = torch.randn(3, 2, dtype=DOUBLE)
    pair.set_parameters(weight, torch.zeros(3, dtype=DOUBLE), 1e-2)
    x = torch.randn(5, 3, dtype=DOUBLE)
    result = probae.to_arviz(pair, x, num_samples=20, num_prior_samples=10)
    for of_z, of_x in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        residual = values(result, of_x) - values(result, of_z, "z") @ weight.T
        assert residual.abs().max() < 6e-2  # 6 standard deviations


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_pair_has_the_groups_that_its_kind_allows(case: Case) -> None:
    pair, x = case.pair(), case.x()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    modes = [module.training for module in pair.modules()]
    stream = torch.get_rng_state()
    result = probae.to_arviz(pair, x, num_samples=5, num_prior_samples=4)
    assert torch.equal(torch.get_rng_state(), stream)
    assert modes == [module.training for module in pair.modules()]
    assert all(torch.equal(before[name], t) for name, t in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())
    with torch.no_grad():
        prior, code = (
            pair.prior(),
            pair.encoder(probae.corruptions.encoder_input(pair.corruption, x)),
        )
    proper, dense = not is_flat(prior), not (is_point(code) or is_flat(code))
    expected = {"posterior", "posterior_predictive", "sample_stats", "observed_data"}
    expected |= {"prior", "prior_predictive"} if proper else set()
    expected |= {"constant_data"} if pair.corruption is not None else set()
    expected |= {"log_likelihood"} if case.kind is Kind.ELBO else set()
    assert groups(result) == expected
    stats = {"reconstruction"} | ({"log_p"} if proper else set()) | ({"log_q"} if dense else set())
    stats |= {"log_weight", "khat"} if case.kind is Kind.ELBO else set()
    assert set(result["sample_stats"].data_vars) == stats
    for group in ("posterior", "prior") if proper else ("posterior",):
        draws = {"posterior": 5, "prior": 4}[group]
        assert result[group]["z"].shape == (1, draws, N, Z)
        assert result[f"{group}_predictive"]["x"].shape == (1, draws, N, *case.x_shape)
        assert (result[group]["z"].dtype.kind == "i") == is_discrete(prior)
        # what is drawn lies where the data may lie
        pair.check_input(values(result, f"{group}_predictive")[0, 0].float())
    for name in stats:
        numbers = result["sample_stats"][name].values
        assert np.isfinite(numbers).all() or name == "khat"  # no tail in five draws
    assert result.attrs["kind"] == case.kind.value
    assert result.attrs["statement"] == case.kind.statement


def test_a_point_code_is_one_value_made_from_the_stored_corruption() -> None:
    torch.manual_seed(0)
    pair = probae.DenoisingAutoencoder(5, 2, corruption=probae.Masking(0.5, known=True))
    x = torch.randn(7, 5)
    result = probae.to_arviz(pair, x, num_samples=3)
    x_tilde = values(result, "constant_data", "x_tilde")
    assert x_tilde.shape == (7, 2, 5)
    seen = x_tilde[:, 1] == 1
    assert torch.equal(x_tilde[:, 0][seen], x[seen])
    assert 0 < seen.float().mean() < 1
    with torch.no_grad():
        expected = pair.encoder(x_tilde).mean
    z = values(result, "posterior", "z")[0]
    torch.testing.assert_close(z, expected.expand_as(z))


def test_a_proposal_weighs_what_has_no_density() -> None:
    torch.manual_seed(0)
    pair = probae.PredictiveSparseDecomposition(5, 2).double()  # a point code and a factor
    x, _ = probae.sample(pair, 50, seed=11)
    proposal = probae.fit_proposal(pair, x, epochs=2, progress=False)
    result = probae.to_arviz(pair, x, num_samples=500, proposal=proposal)
    z = values(result, "posterior", "z")[0]
    with torch.no_grad():
        weights = pair.prior().log_prob(z) + pair.decoder(z).log_prob(x) - proposal(x).log_prob(z)
    torch.testing.assert_close(values(result, "sample_stats", "log_weight")[0], weights)
    best = probae.log_likelihood(pair, x, "iwae", num_samples=20_000, proposal=Broad()).values
    found = values(result, "log_likelihood")[0].mean(0)
    assert (found - best).abs().mean() < 0.5
    assert result.attrs["proposal"] == "GaussianEncoder"
    assert result.attrs["kind"] == "ENERGY"  # that of the pair, all the same


def test_discrete_data_are_stored_as_whole_numbers() -> None:
    counts = probae.to_arviz(
        probae.VAE(5, 2, likelihood="poisson"), torch.poisson(torch.full((4, 5), 3.0))
    )
    bits = probae.to_arviz(probae.VAE(5, 2), torch.rand(4, 5).round())
    for result, kind in ((counts, np.int32), (bits, np.int8)):
        for group in ("posterior_predictive", "prior_predictive", "observed_data"):
            assert result[group]["x"].dtype == kind
    # grey data under a flat prior stay grey
    pair = probae.DenoisingAutoencoder(
        5, 2, corruption=probae.SaltAndPepper(0.1), likelihood="bernoulli"
    )
    grey = torch.rand(4, 5)
    result = probae.to_arviz(pair, grey)
    assert torch.equal(values(result, "observed_data"), grey)
    assert result["posterior_predictive"]["x"].dtype == np.int8


def test_chunks_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = vae(), torch.rand(130, 5, dtype=DOUBLE).round()
    monkeypatch.setattr("probae.arviz.rows_in_budget", lambda pair: 70)
    result = probae.to_arviz(pair, x, num_samples=3, num_prior_samples=5)
    z, prior = values(result, "posterior", "z")[0], values(result, "prior", "z")[0]
    assert len(z.flatten(0, 1).unique(dim=0)) == 3 * 130
    assert len(prior.flatten(0, 1).unique(dim=0)) == 5 * 130
    with torch.no_grad():
        expected = pair.encoder(x).log_prob(z)
    torch.testing.assert_close(values(result, "sample_stats", "log_q")[0], expected)


def test_seed() -> None:
    pair, x = vae(), torch.rand(3, 5, dtype=DOUBLE).round()

    def draw(seed: int | None) -> Any:
        return probae.to_arviz(pair, x, num_samples=3, num_prior_samples=2, seed=seed)

    first, same, other = draw(1), draw(1), draw(2)
    for group in groups(first):
        for name in first[group].data_vars:
            again = same[group][name].values
            np.testing.assert_array_equal(first[group][name].values, again)
    assert not torch.equal(values(first, "posterior", "z"), values(other, "posterior", "z"))
    torch.manual_seed(5)
    streams = [draw(None), draw(None)]
    zs = [values(stream, "posterior", "z") for stream in streams]
    assert not torch.equal(*zs)
    assert (first.attrs["seed"], streams[0].attrs["seed"]) == (1, "none")
    torch.manual_seed(5)
    assert torch.equal(values(draw(None), "posterior", "z"), zs[0])


# ---- the container ------------------------------------------------------------------------------


def test_the_container_is_that_of_the_version() -> None:
    result = probae.to_arviz(vae(), torch.ones(3, 5), num_samples=4)
    name = type(result).__name__
    assert name == ("InferenceData" if OLD else "DataTree")
    assert isinstance(result, az.InferenceData if OLD else type(az.convert_to_datatree(result)))
    expected = {"inference_library", "inference_method", "kind", "seed", "created_at"}
    expected |= {f"{name}_version" for name in ("torch", "pyro", "arviz", "inference_library")}
    assert expected <= set(result.attrs)
    assert result.attrs["inference_method"] == "svi"
    assert result.attrs["arviz_version"] == az.__version__
    assert result["posterior"].attrs["kind"] == "ELBO"
    assert result["log_likelihood"]["x"].attrs["units"] == "nats"


def test_dimensions_and_labels() -> None:
    pair = probae.VAE((1, 4, 6), 3, hidden=(6,))
    x = torch.rand(5, 1, 4, 6).round()
    plain = probae.to_arviz(pair, x, num_samples=4)
    assert plain["posterior"]["z"].dims == ("chain", "draw", "datum", "z_dim")
    dims = ("datum", "x_dim_0", "x_dim_1", "x_dim_2")
    assert plain["observed_data"]["x"].dims == dims
    assert plain["posterior_predictive"]["x"].dims == ("chain", "draw", *dims)
    assert plain["sample_stats"]["khat"].dims == ("datum",)
    np.testing.assert_array_equal(plain["posterior"]["datum"], np.arange(5))
    named = probae.to_arviz(
        pair,
        x,
        num_samples=4,
        dims={"x": ["channel", "row", "column"]},
        coords={"datum": list("abcde"), "row": torch.arange(4) * 10, "z_dim": ["u", "v", "w"]},
    )
    assert named["prior_predictive"]["x"].dims[2:] == ("datum", "channel", "row", "column")
    picked = named["posterior"]["z"].sel(datum="c", z_dim="v")
    np.testing.assert_array_equal(picked, plain["posterior"]["z"][:, :, 2, 1])
    np.testing.assert_array_equal(named["observed_data"]["x"].sel(row=20), x[:, :, 2])
    assert set(named["log_likelihood"].coords) == {"chain", "draw", "datum"}


def test_x_tilde_has_the_dimensions_of_x_where_it_has_its_shape() -> None:
    x = torch.randn(4, 2, 3)
    noise = probae.GaussianNoise(0.3)
    same = probae.to_arviz(
        probae.DenoisingAutoencoder((2, 3), 2, corruption=noise), x, dims={"x": ["t", "c"]}
    )
    assert same["constant_data"]["x_tilde"].dims == ("datum", "t", "c")
    mask = probae.Masking(0.3, known=True)
    other = probae.to_arviz(probae.DenoisingAutoencoder((2, 3), 2, corruption=mask), x)
    names = tuple(f"x_tilde_dim_{i}" for i in range(3))
    assert other["constant_data"]["x_tilde"].dims == ("datum", *names)


def test_round_trip_through_netcdf(tmp_path: Path) -> None:
    pair = probae.DenoisingVAE(5, 2, corruption=probae.BitFlip(0.1))
    result = probae.to_arviz(
        pair, torch.rand(4, 5).round(), num_samples=30, coords={"datum": list("abcd")}, seed=None
    )
    result.to_netcdf(tmp_path / "result.nc")
    back = az.from_netcdf(tmp_path / "result.nc")
    assert groups(back) == groups(result)
    assert dict(back.attrs) == dict(result.attrs)
    for group in groups(result):
        before, after = result[group], back[group]
        assert set(before.data_vars) == set(after.data_vars)
        for name in before.data_vars:
            assert before[name].dims == after[name].dims
            assert before[name].dtype == after[name].dtype
            assert before[name].attrs == after[name].attrs
            np.testing.assert_array_equal(before[name].values, after[name].values)
        for name in before.coords:
            np.testing.assert_array_equal(before[name].values, after[name].values)
    assert loo(back)[0] == loo(result)[0]


def test_summary_has_no_r_hat() -> None:
    pair = ppca()
    x, _ = probae.sample(pair, 2, seed=11)
    table = az.summary(probae.to_arviz(pair, x, num_samples=400), var_names=["z"])
    assert len(table) == 2 * 2
    if "r_hat" in table:
        assert table["r_hat"].astype(float).isna().all()
    with torch.no_grad():
        mean = pair.encoder(x).mean.flatten().numpy()
    # rounded to two digits or three; standard error at most 1 / sqrt(400), 5 of them
    np.testing.assert_allclose(table["mean"].astype(float), mean, atol=0.05 + 5 / 20)
    assert (table["ess_bulk"].astype(float) > 250).all()  # independent draws


PLOTS: dict[str, Callable[[Any], object]] = (
    {
        "trace": lambda data: az.plot_trace(data, var_names=["z"], coords={"datum": [0]}),
        "posterior": lambda data: az.plot_posterior(data, var_names=["z"], coords={"datum": [0]}),
        "forest": lambda data: az.plot_forest(data, var_names=["z"], coords={"datum": [0]}),
        "ppc": lambda data: az.plot_ppc(data, num_pp_samples=5),
        "prior-ppc": lambda data: az.plot_ppc(data, group="prior", num_pp_samples=5),
        "khat": lambda data: az.plot_khat(az.loo(data, pointwise=True)),
    }
    if OLD
    else {
        "trace": lambda data: az.plot_trace_dist(data, var_names=["z"], coords={"datum": [0]}),
        "posterior": lambda data: az.plot_dist(data, var_names=["z"], coords={"datum": [0]}),
        "forest": lambda data: az.plot_forest(data, var_names=["z"], coords={"datum": [0]}),
        "ppc": lambda data: az.plot_ppc_dist(data, num_samples=5),
        "prior-ppc": lambda data: az.plot_ppc_dist(data, group="prior_predictive", num_samples=5),
        "khat": lambda data: az.plot_khat(az.loo(data, pointwise=True)),
    }
)


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.filterwarnings("ignore:Estimated shape", "ignore:Variables x in")
def test_plots_run(name: str) -> None:
    from matplotlib import pyplot

    pair = ppca()
    x, _ = probae.sample(pair, 8, seed=11)
    images = probae.VAE((1, 3, 4), 2, hidden=(6,))
    try:
        assert PLOTS[name](probae.to_arviz(pair, x, num_samples=60)) is not None
        bits = torch.rand(6, 1, 3, 4).round()
        assert PLOTS[name](probae.to_arviz(images, bits, num_samples=60)) is not None
    finally:
        pyplot.close("all")


def test_compare_puts_the_better_pair_first() -> None:
    good, bad = ppca(), ppca()
    x, _ = probae.sample(good, 60, seed=11)
    bad.set_parameters(torch.zeros(6, 2, dtype=DOUBLE), torch.zeros(6, dtype=DOUBLE), 1.0)
    table = az.compare({name: probae.to_arviz(p, x) for name, p in (("bad", bad), ("good", good))})
    assert list(table.index) == ["good", "bad"]
    differences = table["elpd_diff"].astype(float).abs()
    expected = probae.compare(*(probae.log_likelihood(p, x) for p in (good, bad)))
    assert abs(differences["bad"] - 60 * expected.difference) < 0.06 * 60  # printed with few digits


# ---- bad input ----------------------------------------------------------------------------------


def test_memory_is_bounded_before_anything_is_drawn() -> None:
    pair, x = probae.VAE(5, 2), torch.ones(1000, 5)
    # (4 + 2·4 bytes of x as int8 and of z, 5 statistics of 8 bytes) per draw and datum
    per_datum = 200 * (5 + 8 + 40) + 100 * (5 + 8) + 2 * 5
    message = r"num_samples=200 and num_prior_samples=100.*1000 data.*at most 99 data, x\[:99\]"
    with pytest.raises(ValueError, match=message):
        probae.to_arviz(pair, x, max_bytes=99.5 * per_datum)
    result = probae.to_arviz(pair, x[:99], max_bytes=99.5 * per_datum)
    size = sum(result[group][v].nbytes for group in groups(result) for v in result[group].data_vars)
    assert 0.95 * 99 * per_datum < size < 1.05 * 99 * per_datum
    with pytest.raises(ValueError, match=r"predictive=False.*larger max_bytes"):
        probae.to_arviz(pair, x, num_samples=10**9)
    with pytest.raises(ValueError, match="max_bytes=1e-09 GB; pass predictive=False, fewer"):
        probae.to_arviz(pair, x, max_bytes=1)
    less = probae.to_arviz(pair, x[:3], predictive=False, num_prior_samples=0)
    assert groups(less) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}


class Failing(nn.Module):
    """An encoder with a mistake."""

    def forward(self, x: Tensor) -> dist.Distribution:
        raise KeyError("what is not there")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples must be an int >= 2, got 1"),
        ({"num_samples": 2.5}, "num_samples must be an int"),
        ({"num_prior_samples": -1}, "num_prior_samples must be an int >= 0"),
        ({"predictive": "no"}, "predictive must be True or False, got 'no'"),
        ({"max_bytes": 0}, "max_bytes must be a finite number > 0"),
        ({"seed": 0.5}, "seed must be a 64-bit int"),
        ({"dims": ["a"]}, "dims must be a dict of variables to the names of their dimensions"),
        ({"dims": {"y": ["a"]}}, "dims must be for z, x, got 'y'"),
        ({"dims": {"x": "pixel"}}, r"dims\['x'\] must be a list of 1 different names"),
        ({"dims": {"x": ["a", "b"]}}, r"list of 1 different names, for the shape \(5,\) of one x"),
        ({"dims": {"z": ["draw"]}}, "none of them chain, draw or datum; got"),
        ({"dims": {"z": [3]}}, r"dims\['z'\] must be a list of 1"),
        ({"dims": {"x": ["x"]}}, "not those of variables such as x"),
        ({"dims": {"x": ["khat"]}}, "not those of variables such as x"),
        ({"dims": {"x": ["a/b"]}}, "without slashes"),
        ({"dims": {"x": [""]}}, r"list of 1 different names"),
        ({"dims": {"x": ["."]}}, r"list of 1 different names"),
        ({"coords": {"datum": [object()] * 3}}, "numbers, strings or dates, all of one kind"),
        ({"coords": {"datum": ["a", None, "b"]}}, "numbers, strings or dates, all of one kind"),
        ({"coords": {"datum": [1j, 2j, 3j]}}, "numbers, strings or dates, all of one kind"),
        ({"coords": {"datum": [[1], [1, 2], [3]]}}, r"coords\['datum'\] must be 3 labels: "),
        ({"coords": {"datum": "abc"}}, r"must be 3 labels, got shape \(\)"),
        ({"dims": {"z": 3}}, r"dims\['z'\] must be a list of 1"),
        (
            {"dims": {"z": ["k"], "x": ["k"]}},
            "different names, got 'k' for sizes 2 and 5",
        ),
        ({"coords": [1, 2]}, "coords must be a dict of names of dimensions to labels, got list"),
        ({"coords": {"pixel": [1]}}, "coords must be for the dimensions datum, z_dim, x_dim"),
        ({"coords": {"datum": [1, 2]}}, r"coords\['datum'\] must be 3 labels, got shape \(2,\)"),
        ({"proposal": nn.Linear(5, 2)}, r"proposal\(x\) must return a continuous density"),
        ({"proposal": "encoder"}, "proposal must be an encoder"),
        ({"proposal": Failing()}, "proposal does not take x of shape .* 'what is not there'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probae.to_arviz(probae.VAE(5, 2), torch.ones(3, 5), **options)


@pytest.mark.parametrize(
    "labels",
    [
        range(3),
        iter("abc"),
        {"a": 0, "b": 1, "c": 2}.keys(),
        torch.arange(3),
        np.array(["a", "b", "c"], dtype=object),
        np.arange(3).astype("datetime64[D]"),
        [True, False, True],
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_of_any_kind_go_to_a_file_and_back(labels: Any, tmp_path: Path) -> None:
    result = probae.to_arviz(probae.VAE(5, 2), torch.ones(3, 5), coords={"datum": labels})
    result.to_netcdf(tmp_path / "result.nc")
    back = az.from_netcdf(tmp_path / "result.nc")["posterior"]["datum"].values
    np.testing.assert_array_equal(back, result["posterior"]["datum"].values)


def test_a_netcdf_backend_comes_with_the_package() -> None:
    # h5netcdf does not bring h5py, and ArviZ 1.x brings neither
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    needed = project.split("dependencies = [")[1].split("]")[0]
    assert {"h5netcdf", "h5py"} <= set(re.findall(r'"([\w-]+)', needed))


def test_bad_data_and_pairs_are_refused() -> None:
    pair, x = probae.VAE(5, 2), torch.ones(3, 5)
    lost = probae.VAE(5, 2)
    with torch.no_grad():
        next(lost.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="pair has a parameter that is not finite"):
        probae.to_arviz(lost, x)
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got Linear"):
        probae.to_arviz(nn.Linear(5, 2), x)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 5\)"):
        probae.to_arviz(pair, x[:, :4])
    with pytest.raises(ValueError, match=r"binarise them with probae\.binarize"):
        probae.to_arviz(pair, 0.5 * x)
    with pytest.raises(ValueError, match=r"x must have shape \(N, ...\) with N >= 1"):
        probae.to_arviz(pair, x[:0])
    with pytest.raises(ValueError, match="x must be finite"):
        probae.to_arviz(pair, x * math.nan)
    flat = probae.UndercompleteAutoencoder(5, 2)
    proposal = probae.GaussianEncoder(probae.MLP(5, (2, 2)))
    with pytest.raises(ValueError, match=r"proposal needs a pair with a proper prior.*RECONSTR"):
        probae.to_arviz(flat, x, proposal=proposal)
    # x_tilde is named only where there is one
    with pytest.raises(ValueError, match="dims must be for z, x, got 'x_tilde'"):
        probae.to_arviz(pair, x, dims={"x_tilde": ["a"]})


# ---- Pareto k -----------------------------------------------------------------------------------


def test_pareto_k_of_a_tail_of_one_value_is_no_error() -> None:
    tail = torch.zeros(tail_size(100), 1)
    tail[-1] = -1.0  # the threshold; all above it are equal
    khat = pareto_khat(tail, 100)
    assert khat.isnan() or khat.isfinite()


@pytest.mark.parametrize(("num_samples", "expected"), [(2, 2), (25, 6), (225, 46), (10_000, 301)])
def test_size_of_the_tail(num_samples: int, expected: int) -> None:
    assert tail_size(num_samples) == expected
