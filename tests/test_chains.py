"""Chains against laws known exactly: by enumeration, recursion, quadrature, or in closed form."""

import copy
import itertools
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

import probae
from probae import GaussianNoise
from probae.autoencoder import frozen
from probae.chains import _Moves, _score_field

DOUBLE = torch.float64
ALPHA = 1e-3  # probability with which a chi-square or Kolmogorov-Smirnov test fails by chance


def law(seed: int, *shape: int, least: float = 0.02) -> Tensor:
    """Random probabilities along the last dimension, none of them tiny."""
    weights = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    weights = weights + least
    return weights / weights.sum(-1, keepdim=True)


def stationary(transition: Tensor) -> Tensor:
    """Stationary law of a stochastic matrix (..., S, S), by a linear system: (..., S)."""
    size = transition.shape[-1]
    system = transition.mT - torch.eye(size, dtype=DOUBLE)
    system[..., -1, :] = 1  # the equations have rank S - 1; the last one is that of the total
    right = torch.zeros(*transition.shape[:-1], dtype=DOUBLE)
    right[..., -1] = 1
    return torch.linalg.solve(system, right)


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Of the chi-square test of counts against probabilities, both flattened."""
    counts = observed.flatten().numpy()
    return float(stats.chisquare(counts, expected.flatten().numpy() * counts.sum()).pvalue)


# ---- GSN: two discrete pairs whose laws can be written out --------------------------------------

STATES = torch.tensor(  # six of the eight patterns of three pixels: no product over pixels
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=DOUBLE
)
PATTERNS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=DOUBLE)


class Table(nn.Module):
    """Encoder into a one-hot code, the probabilities of the codes looked up."""

    def __init__(self, table: Tensor, place: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.place = place

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.OneHotCategorical(probs=self.table[self.place(x)])


def pixel_place(x: Tensor) -> Tensor:
    return (x @ torch.tensor([4.0, 2.0, 1.0], dtype=x.dtype)).round().long()


def log_flips(rho: float) -> Tensor:
    """Log C(x_tilde|x) of the states (6) and all patterns (8)."""
    distance = (STATES[:, None] - PATTERNS).abs().sum(-1)
    return distance * math.log(rho) + (3 - distance) * math.log1p(-rho)


def pixel_pair(p: Tensor, rho: float, posterior: Tensor | None = None) -> probae.Autoencoder:
    """Three pixels whose code is the state: z ~ q(z|x_tilde) by a table, x = the state's pattern.

    The table is by default the exact posterior of the state under p and bit flips.
    """
    if posterior is None:
        posterior = torch.softmax(p.log() + log_flips(rho).T, 1)  # (8, 6)
    pair = probae.Autoencoder(
        probae.CategoricalPrior(6),
        Table(posterior, pixel_place),
        probae.BernoulliDecoder(probae.MLP(6, 3)),
        probae.BitFlip(rho),
    ).double()
    with torch.no_grad():
        pair.prior.logits.copy_(p.log())
        # logits of ±60: pixels differ from the pattern once in 1e26
        pair.decoder.network.output.weight.copy_(120 * (STATES.T - 0.5))
        pair.decoder.network.output.bias.zero_()
    return pair


def pixel_transition(pair: probae.Autoencoder) -> Tensor:
    """P(x'|x) over the six states, by enumeration of x_tilde and z with the pair's own parts."""
    with frozen(pair, 0):
        both = [PATTERNS.repeat(6, 1), STATES.repeat_interleave(8, 0)]
        corrupt = pair.corruption(both[1]).log_prob(both[0]).exp().reshape(6, 8)
        encode = pair.encoder(PATTERNS).probs  # (8, 6)
        decode = pair.decoder(torch.eye(6, dtype=DOUBLE)[:, None]).log_prob(STATES).exp()
    return corrupt @ encode @ decode


def pixel_index(x: Tensor) -> Tensor:
    """Which state each x is; fails where it is none."""
    hits = (x[..., None, :] == STATES).all(-1)
    assert hits.any(-1).all()
    return hits.double().argmax(-1)


class Replaced(nn.Module):
    """Corruption of a class to another, by a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Categorical(probs=self.table[x.long()]).to_event(1)


def class_place(x: Tensor) -> Tensor:
    return x.long()[..., 0]


def class_pair(
    p: Tensor, corrupt: Tensor, encode: Tensor, decode: Tensor | None = None
) -> probae.Autoencoder:
    """A single entry of S classes, any corruption (S, S), any encoder (S, K) into one-hot codes.

    The decoder (K, S) is by default the exact law of x given z for data from p.
    """
    if decode is None:
        decode = (p[:, None] * (corrupt @ encode)).T
        decode = decode / decode.sum(1, keepdim=True)
    codes, size = decode.shape
    pair = probae.Autoencoder(
        probae.CategoricalPrior(codes),
        Table(encode, class_place),
        probae.CategoricalDecoder(probae.MLP(codes, (size, 1))),
        Replaced(corrupt),
    ).double()
    with torch.no_grad():
        pair.decoder.network.output.weight.copy_(decode.T.log())
        pair.decoder.network.output.bias.zero_()
    return pair


def class_transition(pair: probae.Autoencoder) -> Tensor:
    with frozen(pair, 0):
        x = torch.arange(len(pair.encoder.table), dtype=DOUBLE)[:, None]
        corrupt = pair.corruption(x).base_dist.probs[:, 0]
        encode = pair.encoder(x).probs
        decode = pair.decoder(torch.eye(encode.shape[1], dtype=DOUBLE)).base_dist.probs[:, 0]
    return corrupt @ encode @ decode


@pytest.mark.parametrize("rho", [0.02, 0.2, 0.45])
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_posterior_makes_a_reversible_chain_at_the_law_of_the_data(
    rho: float, seed: int
) -> None:
    p = law(seed, 6)
    transition = pixel_transition(pixel_pair(p, rho))
    torch.testing.assert_close(transition.sum(1), torch.ones(6, dtype=DOUBLE), rtol=0, atol=1e-14)
    torch.testing.assert_close(p @ transition, p, rtol=0, atol=1e-14)  # stationarity
    flow = p[:, None] * transition
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)  # detailed balance
    assert (transition > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_any_noise_and_any_encoder_will_do_where_the_decoder_is_exact(seed: int) -> None:
    p, corrupt, encode = law(seed, 5), law(seed + 10, 5, 5), law(seed + 20, 5, 3)
    transition = class_transition(class_pair(p, corrupt, encode))
    torch.testing.assert_close(p @ transition, p, rtol=0, atol=1e-14)
    flow = p[:, None] * transition
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-14)


def test_the_real_chain_has_the_law_of_the_data() -> None:
    p, rho, burn_in = law(1, 6, least=0.1), 0.2, 40
    pair = pixel_pair(p, rho)
    transition = pixel_transition(pair)
    left = torch.linalg.matrix_power(transition, burn_in)[0] - p
    assert left.abs().sum() < 1e-6  # of the start, far below what the tests resolve
    x0 = STATES[:1].repeat(20_000, 1)  # independent chains, all from one state
    chain = probae.gsn_chain(pair, x0, 2, burn_in=burn_in, seed=5)
    before, after = pixel_index(chain.x)
    counts = torch.bincount(after, minlength=6)
    moves = torch.bincount(6 * before + after, minlength=36)
    assert p_value(counts, p) > ALPHA
    assert p_value(moves, p[:, None] * transition) > ALPHA
    assert p_value(counts, law(2, 6, least=0.1)) < 1e-12  # the tests have power
    assert p_value(moves, p[:, None] * p) < 1e-12
    # the pattern of the code, and the means of the pixels
    assert torch.equal(chain.z @ STATES, chain.x)
    torch.testing.assert_close(chain.mean, chain.x, rtol=0, atol=1e-14)
    flips = (chain.x_tilde[1] != chain.x[0]).double()
    assert abs(float(flips.mean()) - rho) < 5 * math.sqrt(rho * (1 - rho) / flips.numel())  # 6e-7


def test_the_stationary_law_moves_by_no_more_than_the_perturbation_bound() -> None:
    def tv(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a - b).abs().sum(-1)

    shares = []
    for seed in range(20):
        rho = 0.05 + 0.4 * float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        p = law(seed, 6)
        corrupt = log_flips(rho).exp()
        posterior = torch.softmax(p.log() + log_flips(rho).T, 1)
        exact = corrupt @ posterior
        contraction = tv(exact[:, None], exact).max()
        other = law(seed + 100, 200, 8, 6, least=0.0) ** 4  # spiky, each row for itself
        other = other / other.sum(-1, keepdim=True)
        epsilon = torch.linspace(0.001, 1, 200, dtype=DOUBLE)[:, None, None]
        perturbed = corrupt @ ((1 - epsilon) * posterior + epsilon * other)  # (200, 6, 6)
        error = tv(perturbed, exact).amax(-1)
        moved = tv(stationary(perturbed), p)
        bound = error / (1 - contraction)
        assert (moved <= bound + 1e-14).all()
        # the same with the contraction of the perturbed chain
        own = tv(perturbed[:, :, None], perturbed[:, None]).amax((-1, -2))
        assert (moved <= error / (1 - own) + 1e-14).all()
        shares.append(moved / bound)
    share = torch.cat(shares)
    assert share.max() > 0.5  # so the bound says something
    assert share.min() > 1e-4  # and every perturbation moves the law


def test_the_real_chain_follows_a_perturbed_posterior() -> None:
    p, rho = law(1, 6, least=0.1), 0.2
    exact = pixel_pair(p, rho).encoder.table
    pair = pixel_pair(p, rho, 0.8 * exact + 0.2 * law(7, 8, 6, least=0.0))
    transition = pixel_transition(pair)
    moved = stationary(transition)
    torch.testing.assert_close(moved @ transition, moved, rtol=0, atol=1e-14)
    x0 = STATES[:1].repeat(20_000, 1)
    x = probae.gsn_chain(pair, x0, 1, burn_in=40, seed=6).x[0]
    counts = torch.bincount(pixel_index(x), minlength=6)
    assert p_value(counts, moved) > ALPHA
    assert p_value(counts, p) < 1e-12


def test_the_real_chain_of_any_encoder_has_the_law_of_the_data() -> None:
    p = law(0, 5, least=0.1)
    pair = class_pair(p, law(10, 5, 5), law(20, 5, 3))
    assert pair.kind is probae.Kind.ELBO  # as a denoising VAE
    chain = probae.gsn_chain(pair, torch.zeros(20_000, 1, dtype=DOUBLE), 1, burn_in=40, seed=3)
    counts = torch.bincount(class_place(chain.x[0]), minlength=5)
    assert p_value(counts, p) > ALPHA
    assert p_value(counts, torch.full((5,), 0.2, dtype=DOUBLE)) < 1e-12
    assert chain.x.dtype == DOUBLE
    assert chain.mean.isnan().all()  # classes have none


def test_walkback_returns_to_the_start() -> None:
    p = law(1, 6, least=0.1)
    pair = pixel_pair(p, 0.1)
    transition = pixel_transition(pair)
    x0 = STATES[3:4].repeat(5_000, 1)
    index = pixel_index(probae.gsn_chain(pair, x0, 9, walkback=3, seed=1).x)  # (9, N)
    for step in range(3):  # the states 1, 4 and 7 have the law of one step from x0, and so on
        expected = torch.linalg.matrix_power(transition, step + 1)[3]
        counts = torch.bincount(index[step::3].flatten(), minlength=6)
        assert p_value(counts, expected) > ALPHA
        assert p_value(counts, p) < 1e-12
    never = probae.gsn_chain(pair, x0, 9, seed=1).x
    assert torch.equal(never[:3], probae.gsn_chain(pair, x0, 9, walkback=3, seed=1).x[:3])
    assert torch.equal(never, probae.gsn_chain(pair, x0, 9, walkback=9, seed=1).x)


def denoising_pair(**options: Any) -> probae.Autoencoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"corruption": probae.SaltAndPepper(0.4), "likelihood": "bernoulli"}
    return probae.DenoisingAutoencoder(8, 12, **{**settings, **options})


def test_thinning_and_burn_in_pick_from_the_same_chain() -> None:
    pair, x0 = denoising_pair(), torch.rand(5, 8)
    whole = probae.gsn_chain(pair, x0, 12, seed=2)
    part = probae.gsn_chain(pair, x0, 3, burn_in=4, thin=2, seed=2)
    for name in part._fields:
        assert torch.equal(getattr(part, name), getattr(whole, name)[[5, 7, 9]])


@pytest.mark.parametrize("name", ["gsn", "langevin", "mala", "annealed", "posterior"])
def test_chains_leave_no_trace_and_repeat(name: str) -> None:
    noise = GaussianNoise(0.3)
    pair = denoising_pair(likelihood="gaussian", corruption=noise)
    pair.encoder.eval()  # one part of it, to be left so
    if name == "posterior":
        pair = probae.DenoisingVAE(8, 2, hidden=(4,), corruption=noise, likelihood="gaussian")
        pair.encoder.eval()
    calls: dict[str, Callable[[int | None], Any]] = {
        "gsn": lambda seed: probae.gsn_chain(pair, torch.rand(5, 8), 3, seed=seed).x,
        "langevin": lambda seed: probae.langevin(pair, torch.rand(5, 8), 3, 0.1, seed=seed).x,
        "mala": lambda seed: (
            probae.langevin(pair, torch.rand(5, 8), 3, 0.1, metropolis=True, seed=seed).x
        ),
        "annealed": lambda seed: (
            probae.annealed_denoising(pair, torch.rand(5, 8), num_steps=3, seed=seed).x
        ),
        "posterior": lambda seed: (
            probae.posterior_samples(pair, torch.zeros(1, 8), 4, warmup=4, seed=seed).z
        ),
    }

    def call(seed: int | None) -> Tensor:
        torch.manual_seed(9)
        return calls[name](seed)

    for parameter in pair.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(pair.state_dict())
    modes = [module.training for module in pair.modules()]
    first = call(3)
    stream = torch.get_rng_state()
    torch.manual_seed(9)
    torch.rand(5, 8) if name != "posterior" else None  # what the call itself drew
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(first, call(3))
    assert not torch.equal(first, call(4))
    assert torch.equal(call(None), call(None))
    assert not torch.equal(torch.get_rng_state(), stream)
    assert not first.requires_grad
    assert [module.training for module in pair.modules()] == modes
    for key, value in pair.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in pair.parameters())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    ("likelihood", "corruption", "x_shape"),
    [
        ("bernoulli", probae.BitFlip(0.1), (8,)),
        ("bernoulli", probae.Masking(0.3), (1, 4, 4)),
        ("gaussian", probae.Masking(0.3, known=True), (8,)),
        ("continuous-bernoulli", probae.SaltAndPepper(0.3), (8,)),
        ("poisson", probae.PoissonThinning(0.5), (8,)),
    ],
)
def test_every_corruption_and_likelihood_makes_a_chain(
    likelihood: str, corruption: probae.Corruption, x_shape: tuple[int, ...]
) -> None:
    for preset in (probae.DenoisingAutoencoder, probae.DenoisingVAE):
        pair = preset(x_shape, 3, hidden=(6,), likelihood=likelihood, corruption=corruption)
        x0 = torch.ones(5, *x_shape)
        chain = probae.gsn_chain(pair, x0, 4)
        assert chain.x.shape == chain.mean.shape == (4, 5, *x_shape)
        assert chain.x_tilde.shape == (4, *corruption(x0).sample().shape)
        assert chain.z.shape == (4, 5, 3)
        assert chain.x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: probae.gsn_chain(3, x, 5), "pair must be a probae.Autoencoder"),
        (
            lambda p, x: probae.gsn_chain(probae.VAE(8, 2), x, 5),
            r"kind ELBO and has no corruption.*DenoisingAutoencoder, or draw.*probae\.sample",
        ),
        (
            lambda p, x: probae.gsn_chain(
                probae.Autoencoder(
                    p.prior,
                    p.encoder,
                    p.decoder,
                    p.corruption,
                    probae.ContractivePenalty(p.encoder, 0.1),
                ),
                x,
                5,
            ),
            "kind ENERGY: under a factor",
        ),
        (lambda p, x: probae.gsn_chain(p, x[:, :3], 5), r"x0 must have shape \(N, 8\), got \(5, 3"),
        (lambda p, x: probae.gsn_chain(p, x + math.nan, 5), "x0 must be finite"),
        (lambda p, x: probae.gsn_chain(p, x[:0], 5), "x0 must have shape .* N >= 1"),
        (lambda p, x: probae.gsn_chain(p, 2 * x + 2, 5), "x0 must lie in the support"),
        (lambda p, x: probae.gsn_chain(p, x, 0), "num_steps must be an int >= 1, got 0"),
        (lambda p, x: probae.gsn_chain(p, x, 5, walkback=0), "walkback must be an int >= 1"),
        (lambda p, x: probae.gsn_chain(p, x, 5, burn_in=-1), "burn_in must be an int >= 0"),
        (lambda p, x: probae.gsn_chain(p, x, 5, thin=0.5), "thin must be an int >= 1"),
        (lambda p, x: probae.gsn_chain(p, x, 5, seed=0.5), "seed must be a 64-bit int"),
        (
            lambda p, x: probae.gsn_chain(
                denoising_pair(likelihood="gaussian", corruption=probae.BitFlip(0.1)), x, 5
            ),
            r"pair draws x that its corruption BitFlip.*does not take.*in \[0, 1\].*likelihood",
        ),
    ],
)
def test_bad_arguments_of_the_denoising_chain(
    call: Callable[[probae.Autoencoder, Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(denoising_pair(), torch.rand(5, 8))


# ---- Langevin: a Gaussian, mixtures, and fields that are and are not gradients ------------------

MEAN = torch.tensor([0.5, -1.0], dtype=DOUBLE)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=DOUBLE)
SIGMA = 0.5


def identity(dim: int) -> probae.MLP:
    network = probae.MLP(dim, dim)
    with torch.no_grad():
        network.output.weight.copy_(torch.eye(dim))
    return network


def linear_pair(weight: Tensor, bias: Tensor, sigma: float) -> probae.Autoencoder:
    """Denoising autoencoder with r(x) = Wx + b."""
    dim = len(bias)
    pair = probae.Autoencoder(
        probae.FlatPrior(dim),
        probae.PointEncoder(identity(dim)),
        probae.GaussianDecoder(probae.MLP(dim, dim)),
        GaussianNoise(sigma),
    ).double()
    with torch.no_grad():
        pair.decoder.network.output.weight.copy_(weight)
        pair.decoder.network.output.bias.copy_(bias)
    return pair


def gaussian_pair() -> tuple[probae.Autoencoder, Tensor]:
    """The best autoencoder for N(MEAN, COVARIANCE), and the covariance of p_σ."""
    smoothed = COVARIANCE + SIGMA**2 * torch.eye(2, dtype=DOUBLE)
    weight = COVARIANCE @ torch.linalg.inv(smoothed)
    return linear_pair(weight, MEAN - weight @ MEAN, SIGMA), smoothed


def z_scores(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Of the sample mean and of the second moments of independent rows of x, against a Gaussian."""
    centred = x - mean
    products = torch.stack(
        [centred[:, 0] ** 2, centred[:, 1] ** 2, centred[:, 0] * centred[:, 1]], 1
    )
    expected = torch.stack([covariance[0, 0], covariance[1, 1], covariance[0, 1]])
    values = torch.cat([centred, products - expected], 1)  # (N, 5), of mean zero
    return values.mean(0) / (values.std(0) / math.sqrt(len(x)))


def test_uncorrected_steps_have_exactly_the_law_of_their_recursion() -> None:
    # five z-scores under 4.5: fails by chance once in 3e4
    pair, smoothed = gaussian_pair()
    step, num_steps = 0.9, 25
    drift = torch.eye(2, dtype=DOUBLE) - 0.5 * step**2 * torch.linalg.inv(smoothed)
    covariance = torch.zeros(2, 2, dtype=DOUBLE)
    for _ in range(num_steps):
        covariance = drift @ covariance @ drift.T + step**2 * torch.eye(2, dtype=DOUBLE)
    chain = probae.langevin(pair, MEAN.repeat(40_000, 1), 1, step, burn_in=num_steps - 1)
    assert z_scores(chain.x[0], MEAN, covariance).abs().max() < 4.5
    assert chain.acceptance is None
    assert chain.circulation is None
    # which is not that of p_σ: variances are too large by 1/(1 - ε²/4v)
    assert z_scores(chain.x[0], MEAN, smoothed).abs().max() > 20
    values, axes = torch.linalg.eigh(smoothed)
    limit = axes @ torch.diag(values / (1 - step**2 / (4 * values))) @ axes.T
    torch.testing.assert_close(covariance, limit, rtol=1e-3, atol=1e-3)


def test_correction_removes_the_error_of_large_steps() -> None:
    # from a point far from equilibrium; five z-scores under 4.5: fails by chance once in 3e4
    pair, smoothed = gaussian_pair()
    chain = probae.langevin(pair, MEAN.repeat(40_000, 1), 1, 1.0, metropolis=True, burn_in=39)
    assert chain.acceptance is not None
    assert chain.circulation is not None
    assert z_scores(chain.x[0], MEAN, smoothed).abs().max() < 4.5
    assert 0.4 < float(chain.acceptance.mean()) < 0.95
    assert chain.circulation.max() < 1e-10
    uncorrected = probae.langevin(pair, MEAN.repeat(40_000, 1), 1, 1.0, burn_in=39)
    assert z_scores(uncorrected.x[0], MEAN, smoothed).abs().max() > 20


class Best(nn.Module):
    """Decoder whose mean is E[x|x_tilde = z] for a mixture on the line."""

    def __init__(self, means: Tensor, widths: Tensor, weights: Tensor, sigma: float) -> None:
        super().__init__()
        for name, value in (("means", means), ("widths", widths), ("weights", weights)):
            self.register_buffer(name, value)
        self.sigma = sigma

    def forward(self, z: Tensor) -> dist.Distribution:
        variance = self.widths**2 + self.sigma**2
        log_joint = self.weights.log() - 0.5 * variance.log() - (z - self.means) ** 2 / variance / 2
        mean = self.means + self.widths**2 / variance * (z - self.means)  # (..., C)
        best = (torch.softmax(log_joint, -1) * mean).sum(-1, keepdim=True)
        return dist.Normal(best, 1.0).to_event(1)


def mixture_pair(
    means: Tensor, widths: Tensor, weights: Tensor, sigma: float
) -> probae.Autoencoder:
    return probae.Autoencoder(
        probae.FlatPrior(1),
        probae.PointEncoder(identity(1)),
        Best(means, widths, weights, sigma),
        GaussianNoise(sigma),
    ).double()


def test_a_mixture_is_sampled_as_its_smoothed_density() -> None:
    means, widths, weights = (
        torch.tensor(values, dtype=DOUBLE) for values in ([-1.0, 1.2], [0.4, 0.6], [0.35, 0.65])
    )
    sigma = 0.3
    pair = mixture_pair(means, widths, weights, sigma)
    scale = (widths**2 + sigma**2).sqrt()

    def p(x: Tensor) -> float:
        def cdf(at: np.ndarray) -> np.ndarray:
            within = stats.norm.cdf((at[:, None] - means.numpy()) / scale.numpy())
            return within @ weights.numpy()

        return float(stats.kstest(x.flatten().numpy(), cdf).pvalue)

    x0 = torch.zeros(5000, 1, dtype=DOUBLE)
    corrected = probae.langevin(pair, x0, 1, 0.8, metropolis=True, burn_in=80, seed=1)
    assert p(corrected.x[0]) > ALPHA
    assert corrected.circulation.mean() < 5e-3  # eight nodes, on moves of two widths
    finer = probae.langevin(pair, x0, 1, 0.8, metropolis=True, num_nodes=40, burn_in=1, seed=1)
    assert finer.circulation.max() < 1e-6
    assert p(probae.langevin(pair, x0, 1, 0.8, burn_in=80, seed=1).x[0]) < 1e-12
    # small uncorrected steps are within what 5000 draws resolve
    assert p(probae.langevin(pair, x0, 1, 0.2, burn_in=400, seed=1).x[0]) > ALPHA


def tied_pair(activation: str, sigma: float = 0.4) -> tuple[probae.Autoencoder, Any]:
    """DAE r(x) = W' a(Wx + b) + c, and its log-density up to a constant."""
    torch.manual_seed(3)
    out = None if activation == "linear" else activation
    network = probae.MLP(3, 7, out_activation=out)
    mirror = probae.TransposedMLP(network)
    with torch.no_grad():
        network.output.weight.mul_(0.3 if activation == "linear" else 1.5)
        network.output.bias.normal_()
        mirror.set_bias(torch.randn(3))
    pair = probae.Autoencoder(
        probae.FlatPrior(7),
        probae.PointEncoder(network),
        probae.GaussianDecoder(mirror),
        GaussianNoise(sigma),
    ).double()
    weight, b, c = network.output.weight, network.output.bias, mirror.biases[0]

    @torch.no_grad()
    def log_density(x: Tensor) -> Tensor:
        a = x @ weight.T + b
        sums = nn.functional.softplus(a).sum(-1) if out == "sigmoid" else 0.5 * (a**2).sum(-1)
        return (x @ c - 0.5 * (x**2).sum(-1) + sums) / sigma**2

    return pair, log_density


@pytest.mark.parametrize("activation", ["linear", "sigmoid"])
def test_the_line_integral_is_the_energy_of_tied_weights(activation: str) -> None:
    pair, log_density = tied_pair(activation)
    x, new = torch.randn(2, 50, 3, dtype=DOUBLE)
    field, _, _ = _score_field(pair, x)
    exact = log_density(new) - log_density(x)
    errors = []
    for nodes in (1, 2, 4, 8, 16):
        with frozen(pair, 0):
            moves = _Moves(field, 1.0, nodes)
            work = moves.work(x, new)
            torch.testing.assert_close(moves.work(new, x), -work, rtol=0, atol=1e-11)
        errors.append(float((work - exact).abs().max()))
    if activation == "linear":  # a field of degree one
        assert max(errors) < 1e-11
    else:
        assert errors[0] > 0.1
        assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))
        assert errors[-1] < 1e-8


def test_the_work_around_a_loop_is_area_times_curl() -> None:
    # r(x) = Wx is no gradient where W is not symmetric: ∮ s·dx = area (W_21 - W_12)/σ²
    weight = torch.tensor([[0.5, 0.1], [0.7, 0.3]], dtype=DOUBLE)
    pair = linear_pair(weight, torch.zeros(2, dtype=DOUBLE), SIGMA)
    corners = torch.randn(3, 20, 2, dtype=DOUBLE)
    field, _, _ = _score_field(pair, corners[0])
    with frozen(pair, 0):
        moves = _Moves(field, 1.0, 2)
        work = sum(moves.work(corners[i], corners[(i + 1) % 3]) for i in range(3))
    (a, b), (c, d) = ((corners[i] - corners[0]).unbind(1) for i in (1, 2))
    area = 0.5 * (a * d - b * c)
    torch.testing.assert_close(work, area * 0.6 / SIGMA**2, rtol=0, atol=1e-11)


def test_circulation_tells_gradients_from_other_fields() -> None:
    pair, _ = tied_pair("sigmoid")
    x0 = torch.zeros(200, 3, dtype=DOUBLE)
    tied = probae.langevin(pair, x0, 2, 0.3, metropolis=True, num_nodes=16)
    assert tied.circulation.max() < 1e-9
    untied_decoder = probae.GaussianDecoder(probae.MLP(7, 3))  # with weights of its own
    parts = pair.float()  # a pair is built in one dtype
    free = probae.Autoencoder(parts.prior, parts.encoder, untied_decoder, parts.corruption).double()
    untied = probae.langevin(free, x0, 2, 0.3, metropolis=True, num_nodes=16)
    assert untied.circulation.median() > 1e-3


def test_langevin_keeps_the_states_that_were_asked_for() -> None:
    pair, _ = gaussian_pair()
    x0 = torch.zeros(5, 2, dtype=DOUBLE)
    whole = probae.langevin(pair, x0, 12, 0.3, seed=2)
    part = probae.langevin(pair, x0, 3, 0.3, burn_in=4, thin=2, seed=2)
    assert torch.equal(part.x, whole.x[[5, 7, 9]])
    image = probae.DenoisingAutoencoder((1, 4, 4), 3, hidden=(6,))
    chain = probae.langevin(image, torch.zeros(5, 1, 4, 4), 2, 0.1, metropolis=True)
    assert chain.x.shape == (2, 5, 1, 4, 4)
    assert chain.acceptance.shape == chain.circulation.shape == (5,)


def test_steps_that_are_too_large_leave_the_numbers_unless_they_are_corrected() -> None:
    pair, _ = gaussian_pair()
    x0 = torch.ones(5, 2, dtype=DOUBLE)
    with pytest.raises(FloatingPointError, match=r"within \d+ steps of size 3; make them smaller"):
        probae.langevin(pair, x0, 1, 3.0, burn_in=400)
    chain = probae.langevin(pair, x0, 1, 3.0, burn_in=400, metropolis=True)
    assert chain.x.isfinite().all()
    away = linear_pair(5 * torch.eye(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE), SIGMA)
    with pytest.raises(FloatingPointError, match=r"within 1000 steps .* lower relative_step"):
        probae.annealed_denoising(away, x0, num_steps=1000, relative_step=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: probae.langevin(3, x, 5, 0.1), "pair must be a probae.Autoencoder"),
        (
            lambda p, x: probae.langevin(denoising_pair(), x.repeat(1, 4), 5, 0.1),
            r"pair must have the corruption GaussianNoise, got SaltAndPepper",
        ),
        (
            lambda p, x: probae.langevin(
                probae.DenoisingVAE(2, 2, corruption=GaussianNoise(0.1), likelihood="gaussian"),
                x,
                5,
                0.1,
            ),
            "pair must be of kind CONDITIONAL, got ELBO",
        ),
        (lambda p, x: probae.langevin(p, x[:, :1], 5, 0.1), r"x0 must have shape \(N, 2\)"),
        (lambda p, x: probae.langevin(p, x / 0, 5, 0.1), "x0 must be finite"),
        (lambda p, x: probae.langevin(p, x, 0, 0.1), "num_steps must be an int >= 1"),
        (lambda p, x: probae.langevin(p, x, 5, 0.0), "step_size must be a finite number > 0"),
        (lambda p, x: probae.langevin(p, x, 5, "1"), "step_size must be a finite number > 0"),
        (lambda p, x: probae.langevin(p, x, 5, 0.1, metropolis=1), "metropolis must be True or"),
        (lambda p, x: probae.langevin(p, x, 5, 0.1, num_nodes=0), "num_nodes must be an int >= 1"),
        (lambda p, x: probae.langevin(p, x, 5, 0.1, thin=0), "thin must be an int >= 1"),
        (lambda p, x: probae.annealed_denoising([], x), "pairs is empty"),
        (lambda p, x: probae.annealed_denoising(3, x), "pairs must be a probae.Autoencoder"),
        (lambda p, x: probae.annealed_denoising([p, p], x), r"decreasing noise, got .*0\.5, 0\.5"),
        (lambda p, x: probae.annealed_denoising(p, x, num_steps=0), "num_steps must be an int"),
        (
            lambda p, x: probae.annealed_denoising(p, x, relative_step=2),
            r"relative_step must be in",
        ),
        (
            lambda p, x: probae.annealed_denoising(
                [p, probae.DenoisingAutoencoder(3, 2, corruption=GaussianNoise(0.1))], x
            ),
            r"x0 must have shape \(N, 3\)",
        ),
    ],
)
def test_bad_arguments_of_langevin_chains(
    call: Callable[[probae.Autoencoder, Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(gaussian_pair()[0], torch.zeros(5, 2, dtype=DOUBLE))


def test_annealing_fills_modes_in_proportion_where_one_scale_gets_stuck() -> None:
    means, widths, weights = (
        torch.tensor(values, dtype=DOUBLE) for values in ([-4.0, 4.0], [0.1, 0.1], [0.8, 0.2])
    )
    scales = [6.0 * 0.6**level for level in range(10)]  # 6 to 0.06
    pairs = [mixture_pair(means, widths, weights, scale) for scale in scales]
    x0 = 6 * torch.randn(4000, 1, dtype=DOUBLE)
    samples = probae.annealed_denoising(pairs, x0, num_steps=100, seed=1)
    assert samples.x.shape == samples.denoised.shape == (4000, 1)
    assert samples.levels.shape == (10, 4000, 1)
    assert torch.equal(samples.levels[-1], samples.x)
    torch.testing.assert_close(samples.scales, torch.tensor(scales, dtype=DOUBLE))
    # 4.5 standard errors of a share (7e-6), and 0.01 for the error of the steps
    left = float((samples.x < 0).double().mean())
    assert abs(left - 0.8) < 4.5 * 0.4 / math.sqrt(4000) + 0.01
    stuck = probae.langevin(pairs[-1], x0, 1, 0.3 * scales[-1], burn_in=1000, seed=1)
    assert abs(float((stuck.x < 0).double().mean()) - 0.5) < 0.05  # where they happened to start
    # within a mode the draws have the width of p_σ, up to the error of the steps, and denoising
    # takes the noise off: E[x|x_tilde] has a standard deviation of 0.1²/√(0.1² + σ²)
    mode = samples.x[:, 0] < 0
    smoothed = math.hypot(0.1, scales[-1])
    assert float(samples.x[mode].std()) == pytest.approx(smoothed, rel=0.06)
    shrunk = smoothed * (0.1 / smoothed) ** 2
    assert float(samples.denoised[mode].std()) == pytest.approx(shrunk, rel=0.06)
    torch.testing.assert_close(
        samples.denoised, samples.x + scales[-1] ** 2 * probae.score(pairs[-1], samples.x)
    )


# ---- the posterior of z -------------------------------------------------------------------------


def z_scores_of_draws(values: Tensor) -> Tensor:
    """Of the means of correlated draws (T, M), whose expectation is zero."""
    ess = pyro.ops.stats.effective_sample_size(values[None])
    ess = torch.where((ess > 0) & (ess < len(values)), ess, len(values))
    return values.mean(0) / (values.std(0) / ess.sqrt())


@pytest.mark.parametrize("method", ["nuts", "hmc"])
def test_posterior_of_ppca_is_the_exact_gaussian(method: str) -> None:
    # five z-scores under 5 with standard errors from the effective sample size, which is itself an
    # estimate: fails by chance about once in 1e5
    torch.manual_seed(0)
    pair = probae.PPCA(5, 2, scale=0.5)
    pair.set_parameters(torch.randn(5, 2), torch.randn(5), 0.5)
    pair = pair.double()
    x = torch.randn(1, 5, dtype=DOUBLE)
    draws = probae.posterior_samples(pair, x, 240, method=method, warmup=120, seed=2)
    assert (draws.r_hat < 1.1).all()
    assert (draws.ess > 50).all()
    assert (draws.acceptance > 0.5).all()
    assert (draws.divergences == 0).all()
    with torch.no_grad():
        exact = pair.encoder(x)
    mean, covariance = exact.mean[0], exact.covariance_matrix[0]
    entries = [(0, 0), (1, 1), (0, 1)]
    centred = draws.z[0, :, 0] - mean
    products = torch.stack([centred[:, i] * centred[:, j] for i, j in entries], 1)
    expected = torch.stack([covariance[i, j] for i, j in entries])
    values = torch.cat([centred, products - expected], 1)  # (draws, 5), of mean zero
    assert z_scores_of_draws(values).abs().max() < 5
    assert abs(float(covariance[0, 1])) > 0.3 * float(covariance.diag().prod().sqrt())  # no product


@pytest.mark.parametrize("name", ["corruption", "factor", "exponential", "mixture"])
def test_posterior_is_that_of_prior_and_likelihood_alone(name: str) -> None:
    # mean and variance of a z of one dimension against quadrature, 5 standard errors: about 1e-6
    torch.manual_seed(4)
    builders: dict[str, Callable[[], probae.Autoencoder]] = {
        "corruption": lambda: probae.DenoisingVAE(
            6, 1, hidden=(), corruption=probae.BitFlip(0.4), likelihood="bernoulli"
        ),
        "factor": lambda: probae.PredictiveSparseDecomposition(6, 1, rate=1.0, coupling=4.0),
        "exponential": lambda: probae.SparseAutoencoder(6, 1, prior="exponential"),
        "mixture": lambda: probae.VAE(6, 1, hidden=(), prior="mixture", likelihood="gaussian"),
    }
    pair = builders[name]().double()
    x = torch.tensor([[1.0, 0, 1, 1, 0, 1]], dtype=DOUBLE)
    low = 1e-6 if name == "exponential" else -12.0
    grid = torch.linspace(low, 12, 20_001, dtype=DOUBLE)[:, None]
    with frozen(pair, 0):
        log_joint = pair.prior().log_prob(grid) + pair.decoder(grid[:, None]).log_prob(x)[:, 0]
    weights = torch.softmax(log_joint, 0)
    mean = float((weights * grid[:, 0]).sum())
    variance = float((weights * (grid[:, 0] - mean) ** 2).sum())
    draws = probae.posterior_samples(pair, x, 200, warmup=60, seed=1)
    centred = draws.z[0, :, 0] - mean
    values = torch.cat([centred, centred**2 - variance], 1)
    assert z_scores_of_draws(values).abs().max() < 5
    assert (draws.ess > 50).all()
    assert (draws.ess <= 200 * math.log10(200)).all()
    if name == "exponential":
        assert (draws.z > 0).all()


def test_posterior_of_several_data_has_the_shapes_that_were_announced() -> None:
    pair = probae.PPCA((2, 3), 2)
    draws = probae.posterior_samples(pair, torch.zeros(3, 2, 3), 5, num_chains=2, warmup=5)
    assert draws.z.shape == (2, 5, 3, 2)
    assert draws.r_hat.shape == draws.ess.shape == (3, 2)
    assert draws.acceptance.shape == draws.divergences.shape == (2, 3)


def test_chains_of_a_posterior_start_apart_and_r_hat_tells_modes() -> None:
    # x = z² + noise: two modes of z, and no way between
    class Square(nn.Module):
        def forward(self, z: Tensor) -> dist.Distribution:
            return dist.Normal(z**2, 0.5).to_event(1)

    pair = probae.Autoencoder(
        probae.StandardNormalPrior(1), probae.GaussianEncoder(probae.MLP(1, (2, 1))), Square()
    )
    draws = probae.posterior_samples(pair, torch.full((1, 1), 4.0), 20, num_chains=4, warmup=20)
    means = draws.z.mean((1, 2, 3))  # of each chain
    assert (means.abs() - 2).abs().max() < 0.2
    assert means.min() < 0 < means.max()
    assert draws.r_hat > 2
    assert draws.z.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: probae.posterior_samples(3, x), "pair must be a probae.Autoencoder"),
        (
            lambda p, x: probae.posterior_samples(denoising_pair(), x),
            "pair must have a prior with a density.*under a flat prior there is no p",
        ),
        (
            lambda p, x: probae.posterior_samples(
                probae.SemanticHashing(8, 2, posterior="bernoulli"), x
            ),
            "pair must have a prior with a density",
        ),
        (
            lambda p, x: probae.posterior_samples(
                probae.SparseAutoencoder(8, 2, prior="spike-and-slab"), x
            ),
            "pair must have a prior with a density",
        ),
        (lambda p, x: probae.posterior_samples(p, x[:, :3]), r"x must have shape \(N, 8\)"),
        (lambda p, x: probae.posterior_samples(p, 0.5 * x), "x must lie in the support"),
        (lambda p, x: probae.posterior_samples(p, x, 3), "num_samples must be an int >= 4"),
        (lambda p, x: probae.posterior_samples(p, x, warmup=0), "warmup must be an int >= 1"),
        (lambda p, x: probae.posterior_samples(p, x, num_chains=0), "num_chains must be an int"),
        (lambda p, x: probae.posterior_samples(p, x, method="gibbs"), "method must be 'nuts' or"),
        (
            lambda p, x: probae.posterior_samples(p, x, target_acceptance=1.0),
            r"target_acceptance must be strictly in \(0, 1\)",
        ),
    ],
)
def test_bad_arguments_of_posterior_samples(
    call: Callable[[probae.Autoencoder, Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(probae.VAE(8, 2, hidden=(4,)), torch.ones(2, 8))


def test_posterior_samples_need_gradients() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="posterior_samples needs gradients"),
    ):
        probae.posterior_samples(probae.VAE(8, 2), torch.ones(1, 8), 4)
