"""Likelihood estimators: chunking, streaming, enumeration, diagnostics, and what they refuse."""

import itertools
import math
import subprocess
import sys
import warnings

import arviz
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    LowerCholeskyTransform,
    SigmoidTransform,
    StickBreakingTransform,
)

import probae
from probae import importance, memory
from probae.arviz import pareto_khat


def vae(x_dim: int = 6) -> probae.VAE:
    torch.manual_seed(0)
    return probae.VAE(x_dim, 2, hidden=(5,)).double()


def binary(n: int = 11, x_dim: int = 6) -> Tensor:
    return (torch.rand(n, x_dim, dtype=torch.float64) > 0.5).double()


def discrete(prior: torch.nn.Module, z_dim: int) -> probae.Autoencoder:
    torch.manual_seed(0)
    return probae.Autoencoder(
        prior,
        probae.BernoulliEncoder(probae.MLP(5, z_dim))
        if isinstance(prior, probae.BernoulliPrior)
        else probae.CategoricalEncoder(probae.MLP(5, z_dim)),
        probae.BernoulliDecoder(probae.MLP(z_dim, 5, (4,))),
    ).double()


def test_bits_are_enumerated() -> None:
    pair, x = discrete(probae.BernoulliPrior(4, 0.3), 4), binary(6, 5)
    total = torch.zeros(6, dtype=torch.float64)
    for bits in itertools.product([0.0, 1.0], repeat=4):
        z = torch.tensor(bits, dtype=torch.float64)
        total += (pair.prior().log_prob(z) + pair.decoder(z[None]).log_prob(x)).exp().detach()
    ll = probae.log_likelihood(pair, x)
    assert ll.method == "exact"
    assert torch.allclose(ll.values, total.log(), atol=1e-12)


def test_one_hot_causes_are_enumerated() -> None:
    pair, x = discrete(probae.CategoricalPrior(7), 7), binary(6, 5)
    z = torch.eye(7, dtype=torch.float64)[:, None]
    expected = (pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)).logsumexp(0)
    assert torch.allclose(probae.log_likelihood(pair, x, "exact").values, expected, atol=1e-12)


def test_evidence_of_all_binary_data_sums_to_one() -> None:
    pair = discrete(probae.BernoulliPrior(3), 3)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=torch.float64)
    assert float(probae.log_likelihood(pair, x).values.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_small_chunks_of_states_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = discrete(probae.BernoulliPrior(6), 6), binary(9, 5)
    whole = probae.log_likelihood(pair, x).values
    monkeypatch.setattr(memory, "CHUNK_BYTES", 1000)
    assert torch.allclose(probae.log_likelihood(pair, x).values, whole, atol=1e-12)


def test_too_many_states_are_refused_and_estimated_instead() -> None:
    pair, x = discrete(probae.BernoulliPrior(40), 40), binary(3, 5)
    with pytest.raises(ValueError, match="method='exact' needs"):
        probae.log_likelihood(pair, x, "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", probae.LikelihoodWarning)
        assert probae.log_likelihood(pair, x, num_samples=50).method == "iwae"


def test_streaming_sums_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(k, 4, dtype=torch.float64) * 3 for k in (7, 1, 250, 42)]
    weights = torch.cat(blocks)
    streaming = importance.StreamingWeights(300, torch.zeros(4, 1))
    for block in blocks:
        streaming.add(block)
    values, std_error, ess, khat = streaming.iwae()
    w = (weights - weights.max(0).values).exp()
    assert torch.allclose(values, weights.logsumexp(0) - math.log(300), atol=1e-12)
    assert torch.allclose(ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-10)
    assert torch.allclose(std_error, w.std(0) / math.sqrt(300) / w.mean(0), rtol=1e-8)
    mean, mean_error, _, _ = streaming.elbo()
    assert torch.allclose(mean, weights.mean(0), atol=1e-12)
    assert torch.allclose(mean_error, weights.std(0) / math.sqrt(300), rtol=1e-10)
    if hasattr(arviz, "psislw"):
        _, whole = arviz.psislw(weights.T.numpy())
        assert np.allclose(khat.numpy(), whole, atol=1e-8)


def test_pareto_k_tells_heavy_tails_from_light_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, 2, generator=generator, dtype=torch.float64)
    weights = torch.stack([-0.2 * uniform[:, 0].log(), -0.9 * uniform[:, 1].log()], 1)
    tail = weights.topk(200, 0).values  # log of Pareto weights with k = 0.2 and 0.9
    khat = pareto_khat(tail, 4000)
    assert abs(khat[0] - 0.2) < 0.2
    assert abs(khat[1] - 0.9) < 0.2


@pytest.mark.parametrize("method", ["elbo", "iwae"])
def test_chunks_of_data_and_samples_estimate_the_same(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pair, x = vae(), binary()
    whole = probae.log_likelihood(pair, x, method, num_samples=4000)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 8 * 6 * 100)  # 100 rows at once
    parts = probae.log_likelihood(pair, x, method, num_samples=4000, seed=1)
    error = torch.hypot(whole.std_error, parts.std_error)
    assert ((whole.values - parts.values).abs() < 5 * error).all()


def test_same_seed_same_values_and_the_global_stream_untouched() -> None:
    pair, x = vae(), binary()
    state = torch.get_rng_state()
    first = probae.log_likelihood(pair, x, "iwae", 50, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.values, probae.log_likelihood(pair, x, "iwae", 50, seed=4).values)
    other = probae.log_likelihood(pair, x, "iwae", 50, seed=5)
    assert not torch.equal(first.values, other.values)


def test_result_is_in_nats_per_datum() -> None:
    pair, x = vae(), binary()
    ll = probae.log_likelihood(pair, x, "iwae", 100)
    assert ll.values.shape == ll.std_error.shape == ll.ess.shape == ll.khat.shape == (11,)
    assert ll.mean == pytest.approx(float(ll.values.mean()))
    assert ll.mean_std_error == pytest.approx(float(ll.values.std() / math.sqrt(11)))
    assert ll.bits_per_dim == pytest.approx(-ll.mean / 6 / math.log(2))
    assert ((ll.ess >= 1) & (ll.ess <= 100)).all()
    assert "lower bound" in repr(ll)


def test_bounds_are_ordered() -> None:
    pair, x = vae(), binary(300)
    elbo = probae.log_likelihood(pair, x, "elbo", 500)
    few = probae.log_likelihood(pair, x, "iwae", 5)
    many = probae.log_likelihood(pair, x, "iwae", 500)
    assert elbo.mean < few.mean < many.mean


def test_proposal_measures_a_point_code() -> None:
    torch.manual_seed(0)
    pair = probae.UndercompleteAutoencoder(
        6, 2, hidden=(), prior="normal", likelihood="gaussian"
    ).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    exact = probae.log_likelihood(pair, x)
    assert exact.method == "exact"
    for method in ("elbo", "iwae"):
        with pytest.raises(ValueError, match=r"MAP_JOINT.*proposal="):
            probae.log_likelihood(pair, x, method)
    proposal = probae.LinearGaussianPosterior(pair.decoder)
    ll = probae.log_likelihood(pair, x, "iwae", 10, proposal=proposal)
    assert torch.allclose(ll.values, exact.values, atol=1e-8)
    with pytest.raises(ValueError, match="proposal"):
        probae.log_likelihood(pair, x, "iwae", proposal=pair.encoder)


def test_flat_prior_has_no_likelihood() -> None:
    pair = probae.UndercompleteAutoencoder(6, 2)
    for method in ("auto", "exact", "elbo", "iwae"):
        with pytest.raises(ValueError, match=r"RECONSTRUCTION.*prior"):
            probae.log_likelihood(pair, torch.randn(3, 6), method)


def test_grey_pixels_have_no_bernoulli_likelihood() -> None:
    x = binary()
    x[3, 2] = 0.5
    with pytest.raises(ValueError, match=r"grey pixels.*binarise.*continuous-bernoulli"):
        probae.log_likelihood(vae(), x)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    program = """
import resource, sys, torch, probae
pair = probae.VAE(784, 50, hidden=(200, 200))
x = (torch.rand(10, 784) > 0.5).float()
probae.log_likelihood(pair, x, "iwae", 200)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
probae.log_likelihood(pair, x, "iwae", int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", program, "20000"], capture_output=True, text=True, check=True
    ).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 150 * 2**20


class ShiftedPrior(torch.nn.Module):
    """Gaussian prior that is not standard."""

    def forward(self) -> torch.distributions.Distribution:
        loc = torch.tensor([1.0, -2.0], dtype=torch.float64)
        scale = torch.tensor([0.5, 3.0], dtype=torch.float64)
        return dist.Normal(loc, scale).to_event(1)


def test_exact_evidence_under_a_prior_that_is_not_standard() -> None:
    torch.manual_seed(0)
    decoder = probae.GaussianDecoder(probae.MLP(2, 4), scale=0.7).double()
    encoder = probae.GaussianEncoder(probae.MLP(4, (2, 2))).double()
    pair = probae.Autoencoder(ShiftedPrior(), encoder, decoder)
    x = torch.randn(5, 4, dtype=torch.float64)
    weight, bias, _ = (t.detach() for t in decoder.affine())
    prior = pair.prior()
    covariance = weight @ torch.diag(prior.variance) @ weight.T + 0.49 * torch.eye(4).double()
    marginal = torch.distributions.MultivariateNormal(weight @ prior.mean + bias, covariance)
    assert torch.allclose(probae.log_likelihood(pair, x).values, marginal.log_prob(x), atol=1e-8)


def test_proposal_under_a_corruption_is_still_a_bound() -> None:
    torch.manual_seed(0)
    decoder = probae.GaussianDecoder(probae.MLP(2, 4), scale=0.7).double()
    encoder = probae.GaussianEncoder(probae.MLP(4, (2, 2))).double()
    prior = probae.StandardNormalPrior(2).double()
    pair = probae.Autoencoder(prior, encoder, decoder, probae.GaussianNoise(0.5))
    x = torch.randn(5, 4, dtype=torch.float64)
    exact = probae.log_likelihood(pair, x, "exact").values
    proposal = probae.LinearGaussianPosterior(decoder)
    ll = probae.log_likelihood(pair, x, "iwae", 50, proposal=proposal)
    assert torch.allclose(ll.values, exact, atol=1e-8)


class MaskedEncoder(torch.nn.Module):
    """Encoder whose density is masked out, so that its log-weights bound nothing."""

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        return dist.Normal(x[..., :2], 1.0).to_event(1).mask(False)


class HalfFlatPrior(torch.nn.Module):
    """Prior that is improper in one of two dimensions."""

    def forward(self) -> torch.distributions.Distribution:
        mask = torch.tensor([True, False])
        return dist.Normal(torch.zeros(2).double(), 1.0).mask(mask).to_event(1)


class HiddenPoint(torch.nn.Module):
    """Point code behind a transform."""

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        shift = torch.distributions.transforms.AffineTransform(1.0, 2.0)
        return dist.TransformedDistribution(dist.Delta(x[..., :2]), [shift]).to_event(1)


def test_improper_and_hidden_point_parts_get_no_likelihood() -> None:
    decoder = probae.GaussianDecoder(probae.MLP(2, 4)).double()
    encoder = probae.GaussianEncoder(probae.MLP(4, (2, 2))).double()
    prior = probae.StandardNormalPrior(2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    masked = probae.Autoencoder(prior, MaskedEncoder(), decoder)
    assert masked.kind is probae.Kind.ENERGY
    with pytest.raises(ValueError, match="ENERGY"):
        probae.log_likelihood(masked, x, "iwae")
    with pytest.raises(ValueError, match="proposal"):
        probae.log_likelihood(masked, x, "iwae", proposal=MaskedEncoder())
    half = probae.Autoencoder(HalfFlatPrior(), encoder, decoder)
    assert half.kind is probae.Kind.ENERGY
    for method in ("exact", "iwae"):
        with pytest.raises(ValueError, match="prior is flat"):
            probae.log_likelihood(half, x, method)
    hidden = probae.Autoencoder(prior, HiddenPoint(), decoder)
    assert hidden.kind is probae.Kind.MAP_JOINT
    with pytest.raises(ValueError, match="MAP_JOINT"):
        probae.log_likelihood(hidden, x, "iwae")


class ScalarCause(torch.nn.Module):
    """One categorical cause, not in one-hot code."""

    def forward(self) -> torch.distributions.Distribution:
        return dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))


class Table(torch.nn.Module):
    """Decoder that looks its parameters up."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(3, 5)

    def forward(self, z: Tensor) -> torch.distributions.Distribution:
        return probae.GreyBernoulli(logits=self.logits(z)).to_event(1)


class Causes(torch.nn.Module):
    """Encoder to one categorical cause."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Linear(5, 3)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        return dist.Categorical(logits=self.network(x))


def test_scalar_integer_causes_are_enumerated() -> None:
    torch.manual_seed(0)
    pair = probae.Autoencoder(ScalarCause(), Causes(), Table()).double()
    x = binary(6, 5)
    z = torch.arange(3)[:, None]
    expected = (pair.prior().log_prob(z) + pair.decoder(z).log_prob(x)).logsumexp(0)
    assert torch.allclose(probae.log_likelihood(pair, x).values, expected, atol=1e-12)


class Normed(torch.nn.Module):
    """Encoder with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = torch.nn.BatchNorm1d(6), probae.MLP(6, (2, 2))

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        loc, raw = self.head(self.norm(x)).unbind(-2)
        return dist.Normal(loc, raw.exp()).to_event(1)


def test_proposal_is_evaluated_and_not_trained() -> None:
    proposal = Normed().double()
    before = proposal.norm.running_mean.clone()
    probae.log_likelihood(vae(), binary(), "iwae", 10, proposal=proposal)
    assert torch.equal(proposal.norm.running_mean, before)
    assert proposal.training


def test_pareto_k_where_there_is_no_tail() -> None:
    two_larger = torch.zeros(200, 1)
    two_larger[:2] = 1.0
    impossible = torch.full((200, 1), -math.inf)
    rounding = 1e-12 * torch.rand(200, 1, dtype=torch.float64)
    same = torch.zeros(200, 1)  # as of draws that are all one code
    khat = pareto_khat(torch.cat([rounding, two_larger, impossible, same], 1), 4000)
    assert khat[0] == 0
    assert khat[1:].isnan().all()


def test_comparison_is_paired() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5) * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])
    models = [probae.PPCA.maximum_likelihood(x, k) for k in (2, 1)]
    first, second = (probae.log_likelihood(model, x) for model in models)
    found = probae.compare(first, second)
    difference = first.values - second.values
    assert found.difference == pytest.approx(float(difference.mean()), rel=1e-12)
    assert found.std_error == pytest.approx(float(difference.std()) / 200**0.5, rel=1e-12)
    assert found.difference > 0
    assert found.std_error < first.mean_std_error
    assert "in favour of the first, 200 data, paired)" in repr(found)
    swapped = probae.compare(second, first)
    assert swapped.difference == -found.difference
    bound = probae.log_likelihood(models[1], x, "elbo", 5)
    assert "an upper bound on the difference" in repr(probae.compare(first, bound))


def test_comparison_of_other_data_is_refused() -> None:
    pair = probae.PPCA(5, 2)
    ll = probae.log_likelihood(pair, torch.randn(6, 5))
    with pytest.raises(ValueError, match="must be of the same data, got 6 data of dimension 5"):
        probae.compare(ll, probae.log_likelihood(pair, torch.randn(7, 5)))
    with pytest.raises(ValueError, match="must be of the same data"):
        probae.compare(ll, probae.log_likelihood(probae.PPCA(4, 2), torch.randn(6, 4)))
    with pytest.raises(ValueError, match="second must be a LogLikelihood"):
        probae.compare(ll, ll.values)


def poor_encoder(scale: float) -> tuple[probae.Autoencoder, Tensor]:
    """Return a pair whose encoder is N(0, scale²) whatever x is, under p(z) = N(0, 1)."""
    torch.manual_seed(0)
    encoder = probae.GaussianEncoder(probae.MLP(6, (2, 1)))
    with torch.no_grad():
        encoder.network.output.weight.zero_()
    pair = probae.Autoencoder(
        probae.StandardNormalPrior(1), encoder, probae.BernoulliDecoder(probae.MLP(1, 6))
    )
    encoder.network.set_bias(torch.tensor([[0.0], [math.log(math.expm1(scale))]]))
    return pair.double(), binary(40, 6)


def test_auto_warns_of_data_it_cannot_be_trusted_on_and_names_the_way_out() -> None:
    # a proposal of scale s under weights like N(0, 1): k is 1 - s² in the limit, 0.91 at 0.3
    pair, x = poor_encoder(0.3)
    with pytest.warns(probae.LikelihoodWarning, match=r"use method='ais'") as caught:
        ll = probae.log_likelihood(pair, x)
    assert caught[0].filename == __file__  # the caller's line, so that it can be filtered by module
    share = float((ll.khat > 0.7).double().mean())
    assert share > 0.5
    assert ll.unreliable == share
    assert f"for {100 * share:.0f} % of 40 data" in str(caught[0].message)
    with pytest.warns(probae.LikelihoodWarning, match="cannot be told, for 100 %"):
        assert probae.log_likelihood(pair, x, num_samples=20).unreliable == 1  # too few for a tail
    assert f"no estimate for {100 * share:.0f} % of the data by Pareto k" in repr(ll)
    better = probae.log_likelihood(pair, x, "ais", annealing=probae.Annealing(50))
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_joint = pair.prior().log_prob(grid)[:, None] + pair.decoder(grid[:, None]).log_prob(x)
    exact = log_joint.logsumexp(0) + math.log(18 / 20_000)
    assert (better.values - exact).abs().max() < 0.1


def test_auto_is_silent_where_the_samples_serve_and_explicit_methods_always_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair, x = poor_encoder(1.2)
        ll = probae.log_likelihood(pair, x)
        assert ll.method == "iwae"
        assert ll.unreliable == 0
        assert "Pareto" not in repr(ll)
        probae.log_likelihood(*poor_encoder(0.3), "iwae")
        assert probae.log_likelihood(probae.PPCA(6, 2).double(), x).unreliable is None


def test_advice_for_discrete_codes_is_another() -> None:
    pair, x = discrete(probae.BernoulliPrior(40, 0.01), 40), binary(5, 5)
    with pytest.warns(probae.LikelihoodWarning, match=r"use more samples \(num_samples > 300\)"):
        probae.log_likelihood(pair, x, num_samples=300)


def test_likelihood_before_a_scaling_is_that_of_the_rescaled_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5
    a = torch.tensor([0.5, 0.1, -7.0, 2.0], dtype=torch.float64)
    scaling = AffineTransform(-2.0, a)
    pair = probae.PPCA(4, 2).double()
    ll = probae.log_likelihood(pair, scaling(x))
    weight, bias, scale = (part.detach() for part in pair.decoder.affine())
    covariance = weight @ weight.T + scale**2 * torch.eye(4, dtype=torch.float64)
    pushed = torch.distributions.MultivariateNormal(
        (bias + 2) / a, torch.diag(1 / a) @ covariance @ torch.diag(1 / a)
    )
    before = ll.before(scaling, x)
    assert torch.allclose(before.values, pushed.log_prob(x), atol=1e-10)
    assert not before.is_bound
    assert before.bits_per_dim == pytest.approx(-before.mean / 4 / math.log(2))
    chain = ComposeTransform([AffineTransform(1.0, 3.0), AffineTransform(-5.0, 1 / 3)])
    assert torch.allclose(ll.before(chain, x).values, ll.values)  # 3 · 1/3 = 1


def test_likelihood_before_a_logit_is_a_density_on_the_unit_interval() -> None:
    pair = probae.PPCA(2, 1).double()
    axis = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
    grid = torch.cartesian_prod(axis, axis)
    logit = SigmoidTransform().inv
    ll = probae.log_likelihood(pair, logit(grid)).before(logit, grid)
    assert float(ll.values.exp().mean()) == pytest.approx(1, abs=1e-4)


def test_likelihood_before_a_scaling_of_images() -> None:
    images = probae.VAE((1, 2, 2), 2, likelihood="gaussian").double()
    y = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    ll = probae.log_likelihood(images, y, "elbo", 10)
    double = ll.before(AffineTransform(0, 2), y / 2)
    assert torch.allclose(double.values, ll.values + 4 * math.log(2))


def test_probabilities_of_grey_levels_sum_to_at_most_one() -> None:
    # every x of two pixels of three levels: the bound Σ_k exp E_u log p((k+u)/3) / 3² is below 1
    pair = probae.PPCA(2, 1, scale=0.4).double()
    u = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    total = 0.0
    for k in itertools.product(range(3), repeat=2):
        x = (torch.tensor(k) + torch.cartesian_prod(u, u)) / 3
        bound = probae.log_likelihood(pair, x).discrete(3)
        assert bound.is_bound
        total += math.exp(bound.mean)
    inside = total + 0.0
    assert 0 < inside < 1
    ll = probae.log_likelihood(pair, x)
    assert ll.discrete(256).bits_per_dim == pytest.approx(ll.bits_per_dim + 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ll, x: ll.discrete(1), "levels must be an int >= 2"),
        (lambda ll, x: ll.discrete(2.5), "levels must be an int >= 2"),
        (lambda ll, x: ll.before(lambda x: 2 * x, x), "transform must be an invertible torch.dist"),
        (lambda ll, x: ll.before(AffineTransform(0, 2), x[:3]), "x must be the 5 data of dim"),
        (lambda ll, x: ll.before(AffineTransform(0, 2), x[:, :1]), "x must be the 5 data of dim"),
        (lambda ll, x: ll.before(SigmoidTransform().inv, x + 9), "must lie in the domain"),
        (lambda ll, x: ll.before(LowerCholeskyTransform(), x), "must be an invertible"),
        (lambda ll, x: ll.before(AbsTransform(), x), "must be an invertible"),
        (lambda ll, x: ll.before(AffineTransform(0, 0), x), "has no finite log-determinant"),
        (lambda ll, x: ll.before(AffineTransform(0, 2), x * math.nan), "x .*NaN|x .*finite"),
        (lambda ll, x: ll.before(StickBreakingTransform(), x), "must keep the number of dimen"),
    ],
)
def test_bad_preprocessing_is_refused(call: object, message: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2)
    ll = probae.log_likelihood(probae.PPCA(2, 1), x)
    with pytest.raises(ValueError, match=message):
        call(ll, x)


def test_auto_sees_through_draws_that_are_all_the_same() -> None:
    pair, x = discrete(probae.BernoulliPrior(24), 24), binary(5, 5)
    with torch.no_grad():  # a saturated encoder
        pair.encoder.network.output.weight.mul_(1e4)
    with pytest.warns(probae.LikelihoodWarning):
        ll = probae.log_likelihood(pair, x, num_samples=200)
    assert ll.ess.min() == pytest.approx(200)  # which alone would look perfect
    assert ll.unreliable == 1


def test_standard_error_is_unknown_where_one_sample_carries_the_weight() -> None:
    streaming = importance.StreamingWeights(100, torch.zeros(2, 1))
    weights = torch.zeros(100, 2, dtype=torch.float64)
    weights[0, 1] = 50.0
    streaming.add(weights)
    _, std_error, ess, _ = streaming.iwae()
    assert std_error.tolist() == [0.0, math.inf]
    assert ess.tolist() == pytest.approx([100.0, 1.0])


@pytest.mark.parametrize(
    ("likelihood", "density"),
    [("bernoulli", False), ("poisson", False), ("discretized-logistic", False), ("gaussian", True)],
)
def test_probabilities_take_no_volume_correction(likelihood: str, density: bool) -> None:
    pair, x = probae.VAE(3, 2, likelihood=likelihood), torch.ones(4, 3)
    ll = probae.log_likelihood(pair, x, "iwae", 30)
    assert ll.is_density is density
    calls = (lambda a: a.discrete(4), lambda a: a.before(AffineTransform(0, 2.0), x / 2))
    if density:
        assert not ll.discrete(4).is_density
        ll = ll.discrete(4)
    for call in calls:
        with pytest.raises(ValueError, match="are log-probabilities of discrete data"):
            call(ll)


def test_a_comparison_says_what_it_is() -> None:
    pair, x = probae.PPCA(3, 1), torch.randn(9, 3)
    exact, bound = (probae.log_likelihood(pair, x, method) for method in ("exact", "elbo"))
    assert repr(probae.compare(exact, exact)).endswith("paired)")
    assert "; an upper bound on the difference" in repr(probae.compare(exact, bound))
    assert "; a lower bound on the difference" in repr(probae.compare(bound, exact))
    assert "which is no bound" in repr(probae.compare(exact.discrete(2), bound.discrete(2)))
    with pytest.raises(ValueError, match="both be densities, or both probabilities"):
        probae.compare(exact, exact.discrete(2))
