"""The pull-back metric and its geodesics: definitions, KL divergences, spheres, refusals."""

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
from torch import Tensor, nn
from torch.distributions import kl_divergence

import probae
from probae import manifold, memory
from probae.corrupted import Replacement
from probae.distributions import base_distribution

K, D, LEVELS, CLASSES = 2, 2, 5, 3


def network(*parameters: int, x_dim: int = D) -> probae.MLP:
    made = probae.MLP(K, (*parameters, x_dim), (6,), "tanh")
    with torch.no_grad():
        made.output.bias.normal_()
    return made


def pair_of(decoder: nn.Module, x_shape: int | tuple[int, ...] = D) -> probae.Autoencoder:
    encoder = probae.GaussianEncoder(probae.MLP(x_shape, (2, K)))
    parts = (probae.StandardNormalPrior(K), encoder, decoder)
    return probae.Autoencoder(*(part.double() for part in parts))


def bernoulli() -> nn.Module:
    return probae.BernoulliDecoder(network())


def poisson() -> nn.Module:
    return probae.PoissonDecoder(network())


def normal() -> nn.Module:
    return probae.HeteroscedasticGaussianDecoder(network(2))


def levels() -> nn.Module:
    return probae.DiscretizedLogisticDecoder(network(2), LEVELS)


def categorical() -> nn.Module:
    return probae.CategoricalDecoder(network(CLASSES))


def corrupted(decoder: nn.Module, corruption: probae.Corruption) -> nn.Module:
    return probae.CorruptedDecoder(decoder, corruption)


# ---- how far apart two laws are, without their Fisher information --------------------------------


def registered(p: Any, q: Any) -> Tensor:
    return kl_divergence(base_distribution(p), base_distribution(q)).flatten(1).sum(1)


def enumerated(values: list[float]) -> Callable[[Any, Any], Tensor]:
    """KL by summation over every x of D entries, each one of the values."""

    def kl(p: Any, q: Any) -> Tensor:
        x = torch.tensor(list(itertools.product(values, repeat=D)), dtype=torch.float64)[:, None]
        log_p, log_q = p.log_prob(x), q.log_prob(x)  # (outcomes, N)
        assert torch.allclose(log_p.exp().sum(0), torch.ones(()).double(), atol=1e-10)
        return (log_p.exp() * (log_p - log_q)).sum(0)

    return kl


def masked_bits(p: Any, q: Any) -> Tensor:
    """KL by summation over every x of D bits that are seen or missing."""
    entries = itertools.product([(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)], repeat=D)
    x = torch.tensor(list(entries), dtype=torch.float64).mT[:, None]  # (outcomes, 1, 2, D)
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    assert torch.allclose(log_p.exp().sum(0), torch.ones(()).double(), atol=1e-10)
    return (log_p.exp() * (log_p - log_q)).sum(0)


def quadrature(low: float, high: float, atoms: tuple[float, ...] = ()) -> Callable[..., Tensor]:
    """KL of independent entries by Gauss-Legendre quadrature, and by summation over the atoms."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(400))
    nodes = low + (high - low) * (nodes + 1) / 2
    weights = weights * (high - low) / 2

    def kl(p: Any, q: Any) -> Tensor:
        x = torch.cat([nodes, torch.tensor(atoms, dtype=torch.float64)])[:, None, None]
        w = torch.cat([weights, torch.ones(len(atoms)).double()])[:, None, None]
        log_p, log_q = (base_distribution(law).log_prob(x) for law in (p, q))  # (nodes, N, D)
        assert torch.allclose((w * log_p.exp()).sum(0), torch.ones(()).double(), atol=1e-10)
        return (w * log_p.exp() * (log_p - log_q)).sum((0, 2))

    return kl


BITS, COUNTS = [0.0, 1.0], [float(n) for n in range(60)]
GREY = [n / (LEVELS - 1) for n in range(LEVELS)]
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "gaussian": (lambda: probae.GaussianDecoder(network(), scale=0.7), registered),
    "gaussian-learned": (
        lambda: probae.GaussianDecoder(network(), scale=0.7, learn_scale=True),
        registered,
    ),
    "heteroscedastic-gaussian": (normal, registered),
    "bernoulli": (bernoulli, enumerated(BITS)),
    "continuous-bernoulli": (
        lambda: probae.ContinuousBernoulliDecoder(network()),
        quadrature(0, 1),
    ),
    "poisson": (poisson, enumerated(COUNTS)),
    "categorical": (categorical, enumerated([0.0, 1.0, 2.0])),
    "discretized-logistic": (levels, enumerated(GREY)),
    "gaussian-noise": (lambda: corrupted(normal(), probae.GaussianNoise(0.5)), registered),
    "bit-flip": (lambda: corrupted(bernoulli(), probae.BitFlip(0.1, 0.3)), enumerated(BITS)),
    "known-mask": (
        lambda: corrupted(bernoulli(), probae.Masking(0.3, known=True)),
        masked_bits,
    ),
    "mask-of-bits": (lambda: corrupted(bernoulli(), probae.Masking(0.3)), enumerated(BITS)),
    "mask-of-reals": (
        lambda: corrupted(normal(), probae.Masking(0.3)),
        quadrature(-25.0123, 25, (0.0,)),
    ),
    "salt-and-pepper-of-reals": (
        lambda: corrupted(normal(), probae.SaltAndPepper(0.3)),
        quadrature(-25.0123, 25, (0.0, 1.0)),
    ),
    "mask-of-counts": (lambda: corrupted(poisson(), probae.Masking(0.3)), enumerated(COUNTS)),
    "salt-and-pepper-of-counts": (
        lambda: corrupted(poisson(), probae.SaltAndPepper(0.3)),
        enumerated(COUNTS),
    ),
    "salt-and-pepper-of-levels": (
        lambda: corrupted(levels(), probae.SaltAndPepper(0.3)),
        enumerated(GREY),
    ),
    "mask-of-classes": (
        lambda: corrupted(categorical(), probae.Masking(0.3)),
        enumerated([0.0, 1.0, 2.0]),
    ),
    "thinning": (
        lambda: corrupted(poisson(), probae.PoissonThinning(0.4)),
        enumerated(COUNTS),
    ),
    "twice-masked-counts": (
        lambda: corrupted(corrupted(poisson(), probae.Masking(0.3)), probae.SaltAndPepper(0.2)),
        enumerated(COUNTS),
    ),
    "twice-masked-reals": (
        lambda: corrupted(corrupted(normal(), probae.Masking(0.3)), probae.SaltAndPepper(0.2)),
        quadrature(-25.0123, 25, (0.0, 1.0)),
    ),
}


def case(family: str) -> tuple[probae.Autoencoder, Callable[[Any, Any], Tensor]]:
    torch.manual_seed(3)
    make, kl = FAMILIES[family]
    decoder = make()
    return pair_of(decoder, (2, D) if family == "known-mask" else D), kl


def codes(n: int = 4) -> Tensor:
    return torch.randn(n, K, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# ---- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_metric_is_the_second_order_of_the_divergence(family: str) -> None:
    pair, kl = case(family)
    z, direction = codes(), codes(8)[4:]
    direction = direction / direction.norm(dim=1, keepdim=True)
    metric = probae.pullback_metric(pair, z)
    length = (direction * (metric @ direction[..., None]).squeeze(-1)).sum(1)  # (N,)
    assert (length > 1e-3).all()  # so that the ratios below mean something

    def ratio(step: float) -> Tensor:
        with torch.no_grad(), pyro.validation_enabled(False):
            p, q = pair.decoder(z), pair.decoder(z + step * direction)
            return kl(p, q) / (0.5 * step**2 * length)

    # ratio = 1 + a t + b t² + …; the mean of both directions has no odd terms
    both = [(ratio(t) + ratio(-t)) / 2 - 1 for t in (0.02, 0.01)]
    one = [ratio(t) - 1 for t in (1e-3, 5e-4)]
    assert (ratio(1e-3) + ratio(-1e-3) - 2).abs().max() < 1e-5
    assert one[0].abs().max() < 2e-2
    first = (one[0] / one[1])[one[0].abs() > 1e-4]
    assert ((first - 2).abs() < 0.05).all(), first
    second = (both[0] / both[1])[both[0].abs() > 1e-5]
    assert len(second) > 0
    assert ((second - 4).abs() < 0.1).all(), second


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("bernoulli", BITS),
        ("poisson", COUNTS),
        ("categorical", [0.0, 1.0, 2.0]),
        ("discretized-logistic", GREY),
        ("bit-flip", BITS),
        ("mask-of-counts", COUNTS),
        ("salt-and-pepper-of-levels", GREY),
        ("mask-of-classes", [0.0, 1.0, 2.0]),
        ("twice-masked-counts", COUNTS),
    ],
)
def test_metric_is_the_expected_outer_product_of_scores(family: str, values: list[float]) -> None:
    pair, _ = case(family)
    z = codes(2)
    x = torch.tensor(list(itertools.product(values, repeat=D)), dtype=torch.float64)[:, None]
    at = z.expand(len(x), *z.shape).clone().requires_grad_()  # (outcomes, N, k)
    log_prob = pair.decoder(at).log_prob(x)
    (score,) = torch.autograd.grad(log_prob.sum(), at)
    expected = torch.einsum("on,oni,onj->nij", log_prob.detach().exp(), score, score)
    assert torch.allclose(probae.pullback_metric(pair, z), expected, rtol=1e-10, atol=1e-12)


def test_gaussian_metric_is_the_product_of_jacobians() -> None:
    torch.manual_seed(3)
    pair, z = pair_of(normal()), codes()
    for i in range(len(z)):

        def parameters(z: Tensor) -> tuple[Tensor, Tensor]:
            law = base_distribution(pair.decoder(z))
            return law.loc, law.scale

        loc, scale = torch.autograd.functional.jacobian(parameters, z[i])
        variance = parameters(z[i])[1].detach() ** 2
        expected = loc.T @ (loc / variance[:, None]) + 2 * scale.T @ (scale / variance[:, None])
        assert torch.allclose(probae.pullback_metric(pair, z)[i], expected, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_linear_gaussian_metric_is_the_same_everywhere(scale: float, learn_scale: bool) -> None:
    torch.manual_seed(0)
    pair = probae.PPCA((3, 4), 5, scale=scale, learn_scale=learn_scale).double()
    torch.nn.init.normal_(pair.decoder.network.output.weight)
    weight, _, sigma = (t.detach() for t in pair.decoder.affine())
    metric = probae.pullback_metric(pair, torch.randn(7, 5).double())
    assert metric.shape == (7, 5, 5)
    assert torch.allclose(metric, weight.T @ weight / sigma**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("corruptions", "left"),
    [
        ([probae.Masking(0.3, known=True)], 0.7),
        ([probae.SaltAndPepper(0.3)], 0.7),
        ([probae.Masking(0.3), probae.SaltAndPepper(0.2)], 0.7 * 0.8),
    ],
)
def test_entries_that_are_surely_replaced_tell_nothing(
    corruptions: list[probae.Corruption], left: float
) -> None:
    torch.manual_seed(3)
    decoder = normal()
    clean = probae.pullback_metric(pair_of(decoder), codes())
    for corruption in corruptions:
        decoder = corrupted(decoder, corruption)
    x_shape = (2, D) if getattr(corruptions[0], "known", False) else D
    metric = probae.pullback_metric(pair_of(decoder, x_shape), codes())
    assert torch.allclose(metric, left * clean, rtol=1e-12)


class Warped(nn.Module):
    """A decoder of other coordinates y of the same codes, z = A y + ¼ sin y."""

    def __init__(self, decoder: nn.Module, matrix: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("matrix", matrix)

    def warp(self, y: Tensor) -> Tensor:
        return y @ self.matrix.T + y.sin() / 4

    def forward(self, y: Tensor) -> torch.distributions.Distribution:
        return self.decoder(self.warp(y))


@pytest.mark.parametrize("family", ["heteroscedastic-gaussian", "bernoulli", "categorical"])
def test_metric_is_that_of_the_manifold_whatever_the_coordinates(family: str) -> None:
    pair, _ = case(family)
    warped = Warped(pair.decoder, torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64))
    y = codes()
    jacobian = warped.matrix + torch.diag_embed(y.cos() / 4)  # (N, k, k)
    there = probae.pullback_metric(pair, warped.warp(y))
    here = probae.pullback_metric(pair_of(warped), y)
    assert torch.allclose(here, jacobian.mT @ there @ jacobian, atol=1e-12)


@pytest.mark.parametrize("logit", [0.0, 1e-3, 0.29, 0.31, 4.0, 49.0])
def test_continuous_bernoulli_variance_by_quadrature(logit: float) -> None:
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    x, w = (nodes + 1) / 2, weights / 2
    for sign in (1, -1):
        law = probae.ContinuousBernoulli(torch.tensor(sign * logit, dtype=torch.float64))
        density = w * law.log_prob(x).exp()
        mean = (density * x).sum()
        expected = (density * (x - mean) ** 2).sum()
        assert float(manifold._variance(law)) == pytest.approx(float(expected), rel=1e-9)
        single = manifold._variance(probae.ContinuousBernoulli(law.logits.float()))
        assert float(single) == pytest.approx(float(expected), rel=2e-5)


def test_saturated_bits_keep_what_little_they_tell() -> None:
    pair = pair_of(bernoulli())
    with torch.no_grad():
        pair.decoder.network.output.bias.fill_(40.0)
    assert (torch.linalg.eigvalsh(probae.pullback_metric(pair.float(), codes().float())) > 0).any()
    double = probae.pullback_metric(pair.double(), codes())
    assert torch.allclose(probae.pullback_metric(pair.float(), codes()).double(), double, rtol=1e-3)


def test_levels_that_sit_in_one_bin_tell_nothing_and_break_nothing() -> None:
    pair = pair_of(probae.DiscretizedLogisticDecoder(network(2), 256))
    with torch.no_grad():
        pair.decoder.network.output.bias.fill_(-30.0)  # location and scale
    metric = probae.pullback_metric(pair, codes())
    assert metric.isfinite().all()
    assert metric.abs().max() < 1e-6


def test_a_decoder_that_ignores_its_code_has_the_metric_zero() -> None:
    pair = pair_of(bernoulli())
    with torch.no_grad():
        pair.decoder.network.output.weight.zero_()
    assert (probae.pullback_metric(pair, codes()) == 0).all()


def test_metric_is_symmetric_and_positive_semidefinite() -> None:
    pair = probae.VAE(3, 8, hidden=(16,)).double()  # rank 3 of 8
    metric = probae.pullback_metric(pair, torch.randn(20, 8).double())
    assert torch.equal(metric, metric.mT)
    values = torch.linalg.eigvalsh(metric)
    assert (values > -1e-12).all()
    assert (values[:, :5].abs() < 1e-12).all()


# ---- how it is computed -------------------------------------------------------------------------


def test_every_code_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = probae.VAE((1, 6, 6), 3, channels=(4, 3), activation="tanh").double()
    z = torch.randn(11, 3, dtype=torch.float64)
    whole = probae.pullback_metric(pair, z)
    for chunk_bytes in (1, 20_000):
        monkeypatch.setattr(memory, "CHUNK_BYTES", chunk_bytes)
        assert torch.allclose(probae.pullback_metric(pair, z), whole, atol=1e-12)
    assert torch.allclose(probae.pullback_metric(pair, z[4:5])[0], whole[4], atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_agrees_with_double(family: str) -> None:
    pair, _ = case(family)
    double = probae.pullback_metric(pair, codes())
    single = probae.pullback_metric(pair.float(), codes())
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-5 * float(double.abs().max()))


def test_codes_may_be_arrays_files_or_tensors_with_gradients(tmp_path: Any) -> None:
    pair, _ = case("bernoulli")
    z = codes()
    expected = probae.pullback_metric(pair, z)
    np.save(tmp_path / "z.npy", z.numpy())
    for form in (z.numpy(), tmp_path / "z.npy", z.clone().requires_grad_()):
        found = probae.pullback_metric(pair, form)
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_pairs_of_every_continuous_kind_have_a_metric() -> None:
    for pair in (
        probae.UndercompleteAutoencoder(6, 3),
        probae.SparseAutoencoder(6, 3, prior="spike-and-slab", posterior="noisy-gate"),
        probae.ContractiveAutoencoder(6, 3),
        probae.DenoisingVAE(6, 3, corruption=probae.GaussianNoise(0.3), likelihood="gaussian"),
    ):
        assert probae.pullback_metric(pair, torch.randn(5, 3)).shape == (5, 3, 3)


class Noisy(nn.Module):
    """A network with modes: statistics of its batch, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(K, D), nn.BatchNorm1d(D), nn.Dropout(0.5))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def test_the_pair_and_the_world_stay_as_they_were() -> None:
    pair = pair_of(probae.GaussianDecoder(Noisy()))
    pair.decoder.network.layers[2].eval()
    modes = {name: module.training for name, module in pair.named_modules()}
    before, stream = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    first = probae.pullback_metric(pair, codes())
    assert torch.equal(first, probae.pullback_metric(pair, codes()))
    assert {name: module.training for name, module in pair.named_modules()} == modes
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(pyro.get_param_store()) == 0
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())


# ---- what it refuses ----------------------------------------------------------------------------


class Fixed(nn.Module):
    """A decoder made of a function of z."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Any:
        return self.function(z)


class Sign(torch.autograd.Function):
    """A sign whose gradient is passed straight through, in reverse mode only."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def mixture(z: Tensor) -> Any:
    components = dist.Normal(torch.stack([z, -z], -2), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(*z.shape[:-1], 2)), components)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: dist.Normal(z.detach(), 1.0).to_event(1), "autograd sees no path from z"),
        (lambda z: dist.Normal((z > 0).double(), 1.0).to_event(1), "autograd sees no path from z"),
        (lambda z: dist.Normal(Sign.apply(z), 1.0).to_event(1), "forward-mode derivatives"),
        (lambda z: dist.Laplace(z, 1.0).to_event(1), "Fisher information is not known"),
        (lambda z: dist.Delta(z, event_dim=1), "got Delta: its Fisher"),
        (lambda z: dist.LogNormal(z, 1.0).to_event(1), "got LogNormal: its Fisher"),
        (mixture, "got MixtureSameFamily: its Fisher"),
        (
            lambda z: dist.ZeroInflatedPoisson(rate=z.exp(), gate=torch.tensor(0.5)).to_event(1),
            "got ZeroInflatedPoisson: its Fisher",
        ),
        (
            lambda z: dist.MultivariateNormal(z, torch.eye(K).to(z)),
            "each Normal, Bernoulli, .* got MultivariateNormal",
        ),
        (
            lambda z: dist.Normal(z, 1.0).to_event(1).mask(False),
            "decoder must have a density that is not masked",
        ),
        (
            lambda z: Replacement(dist.Normal(z, 1.0), (0.0,), z.sigmoid()).to_event(1),
            "got Replacement: its Fisher",
        ),
    ],
)
def test_decoders_that_have_no_metric_are_named(function: Any, message: str) -> None:
    pair = pair_of(Fixed(function))
    with pytest.raises(ValueError, match=message):
        probae.pullback_metric(pair, codes())


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(4, 3), r"z must have shape \(N, 2\), got \(4, 3\)"),
        (torch.zeros(2), r"z must have shape \(N, 2\), got \(2,\); add a batch .* z\[None\]"),
        (torch.zeros(2, 4, 2), r"z must have shape \(N, 2\), got \(2, 4, 2\)"),
        (torch.zeros(0, 2), "z must have shape"),
        (torch.zeros(3, 2, dtype=torch.long), "z must .*int64"),
        (torch.tensor([[0.0, math.nan]]), "z must be finite"),
        ("nowhere.npy", None),
        ([[0.0, 1.0]], "z must be a tensor, a NumPy array"),
        (None, "z must be a tensor, a NumPy array"),
    ],
)
def test_bad_codes_are_named(z: Any, message: str | None) -> None:
    pair, _ = case("bernoulli")
    error = ValueError if message else FileNotFoundError
    with pytest.raises(error, match=message):
        probae.pullback_metric(pair, z)


@pytest.mark.parametrize("posterior", ["bernoulli", "threshold"])
def test_discrete_codes_have_no_metric(posterior: str) -> None:
    pair = probae.SemanticHashing(6, 2, posterior=posterior)
    with pytest.raises(ValueError, match=r"pair must have continuous codes, got .* Bernoulli"):
        probae.pullback_metric(pair, torch.zeros(3, 2))


def test_what_is_no_pair_and_inference_mode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got Linear"):
        probae.pullback_metric(nn.Linear(2, 2), codes())
    pair, _ = case("bernoulli")
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot run inside"):
        probae.pullback_metric(pair, codes())


# ---- geodesics ----------------------------------------------------------------------------------


class Composed(nn.Module):
    """A Gaussian decoder of any mean, with scale 1/2."""

    def __init__(self, mean: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, z: Tensor) -> Any:
        return dist.Normal(self.mean(z), 0.5).to_event(1)


def mapped(mean: Callable[[Tensor], Tensor], z_dim: int, x_dim: int) -> probae.Autoencoder:
    encoder = probae.GaussianEncoder(probae.MLP(x_dim, (2, z_dim))).double()
    prior = probae.StandardNormalPrior(z_dim).double()
    return probae.Autoencoder(prior, encoder, Composed(mean))


def on_sphere(z: Tensor) -> Tensor:
    """Polar angle and azimuth to a sphere of radius 3."""
    polar, azimuth = z.unbind(-1)
    parts = (polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos())
    return 3 * torch.stack(parts, -1)


def test_geodesics_of_a_sphere_are_great_circles() -> None:
    pair = mapped(on_sphere, 2, 3)
    start = torch.tensor([[1.0, 0.0], [0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
    end = torch.tensor([[1.0, 2.0], [1.5, 1.2], [0.7, 1.4]], dtype=torch.float64)
    steps = 24
    way = probae.geodesic(pair, start, end, num_points=steps + 1, tolerance=1e-9)
    a, b = on_sphere(start) / 3, on_sphere(end) / 3
    angle = torch.acos((a * b).sum(-1))
    # radius / scale is 6; the chain has equal chords, which tend to the arc
    chords = steps * 12 * torch.sin(angle / (2 * steps))
    assert way.converged.all()
    assert torch.allclose(way.length, chords, rtol=1e-6)
    assert torch.allclose(way.length, 6 * angle, rtol=(angle.max().item() / steps) ** 2 / 20)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    circle = (((1 - share) * angle).sin() / angle.sin())[..., None] * a
    circle = circle + ((share * angle).sin() / angle.sin())[..., None] * b
    assert torch.allclose(way.x.mean / 3, circle, atol=1e-4)
    assert (way.length < way.straight_length).all()  # lines of longitude and latitude are longer
    assert torch.equal(way.z[0], start)
    assert torch.equal(way.z[-1], end)


def test_a_linear_decoder_has_straight_geodesics() -> None:
    pair = probae.PPCA(5, 3).double()
    weight, _, scale = pair.decoder.affine()
    start = torch.randn(4, 3, dtype=torch.float64)
    end = torch.randn(4, 3, dtype=torch.float64)
    way = probae.geodesic(pair, start, end, num_points=7)
    expected = ((end - start) @ weight.T).norm(dim=-1) / scale
    assert torch.allclose(way.length, expected)
    assert torch.allclose(way.straight_length, expected)
    share = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None, None]
    assert torch.allclose(way.z, (1 - share) * start + share * end, atol=1e-8)


@pytest.mark.parametrize("y", [0.05, 0.0])  # at 0 no gradient leads off the line
def test_a_geodesic_goes_round_a_hill(y: float) -> None:
    # the surface (z, 3 exp(-|z|²)): over the top it is longer than round it
    pair = mapped(lambda z: torch.cat([z, 3 * (-(z**2).sum(-1, keepdim=True)).exp()], -1), 2, 3)
    way = probae.geodesic(pair, torch.tensor([-2.0, y]), torch.tensor([2.0, y]))
    assert (way.z.shape, way.length.shape, way.x.mean.shape) == ((16, 2), (), (16, 3))
    assert way.length < 0.85 * way.straight_length
    assert way.z[:, 1].abs().max() > 0.8
    assert bool(way.converged)


@pytest.mark.parametrize("likelihood", probae.LIKELIHOODS)
def test_short_geodesics_have_the_length_of_the_metric(likelihood: str) -> None:
    made = probae.VAE(
        4,
        2,
        hidden=(6,),
        activation="tanh",
        likelihood=likelihood,
        likelihood_options={
            "categorical": {"num_classes": CLASSES},
            "discretized-logistic": {"levels": LEVELS},
        }.get(likelihood),
    ).double()
    z = torch.randn(3, 2, dtype=torch.float64)
    step = 1e-3 * torch.randn(3, 2, dtype=torch.float64)
    way = probae.geodesic(made, z - step, z + step, num_points=4)
    expected = 2 * torch.einsum("ni,nij,nj->n", step, probae.pullback_metric(made, z), step).sqrt()
    assert torch.allclose(way.length, expected, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "heteroscedastic-gaussian"])
def test_the_energy_is_the_symmetric_divergence(likelihood: str) -> None:
    made = probae.VAE(4, 2, hidden=(6,), likelihood=likelihood).double()
    z = torch.randn(5, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        found = manifold._steps(made, z)
        law = made.decoder(z)
        a, b = (base_distribution(made.decoder(part)) for part in (z[:-1], z[1:]))
        expected = (kl_divergence(a, b) + kl_divergence(b, a)).sum(-1)
    assert law.batch_shape == (5, 3)
    assert torch.allclose(found, expected, atol=1e-12)


def test_one_pair_of_codes_or_many_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = mapped(on_sphere, 2, 3)
    start, end = torch.tensor([[1.0, 0.0], [0.5, -1.0]]), torch.tensor([[1.0, 2.0], [1.5, 1.0]])
    both = probae.geodesic(pair, start, end, num_points=9, tolerance=1e-10)
    one = probae.geodesic(pair, start[0], end[0], num_points=9, tolerance=1e-10)
    assert (both.z.shape, one.z.shape) == ((9, 2, 2), (9, 2))
    assert torch.allclose(both.length[0], one.length, rtol=1e-7)
    monkeypatch.setattr(memory, "CHUNK_BYTES", 1)
    split = probae.geodesic(pair, start, end, num_points=9, tolerance=1e-10)
    assert torch.allclose(split.length, both.length, rtol=1e-7)
    same = probae.geodesic(pair, start, start)
    assert same.length.tolist() == [0, 0]
    assert torch.equal(same.z, start.double().expand(16, 2, 2))


def test_a_geodesic_leaves_no_trace() -> None:
    pair = probae.VAE((1, 3, 3), 2, hidden=(5,))
    start, end = torch.zeros(2, requires_grad=True), torch.ones(2)
    before, stream = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    way = probae.geodesic(pair, start, end, num_points=5)
    assert not way.z.requires_grad
    assert not way.x.mean.requires_grad
    assert start.grad is None
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())
    assert pair.training
    assert torch.equal(way.z, probae.geodesic(pair, start, end, num_points=5).z)


def test_too_few_iterations_are_told() -> None:
    pair = mapped(on_sphere, 2, 3)
    start, end = torch.tensor([0.2, 0.0]), torch.tensor([0.2, 2.5])
    way = probae.geodesic(pair, start, end, num_points=64, max_iterations=1, tolerance=1e-12)
    assert not bool(way.converged)
    assert way.length < way.straight_length


@pytest.mark.parametrize(
    ("z0", "z1", "options", "message"),
    [
        (torch.zeros(3), torch.zeros(2), {}, r"z0 must be one code of shape \(2,\), .* got \(3,\)"),
        (torch.zeros(2), torch.zeros(4, 3), {}, r"z1 must be one code .* pair\.encoder\(x\)\.mean"),
        (torch.zeros(2), torch.zeros(4, 2), {}, "z1 must be as many codes as z0"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2), {}, "z0 must be finite"),
        (torch.zeros(2).long(), torch.zeros(2), {}, "z0 must .*int64"),
        (torch.zeros(2), torch.ones(2), {"num_points": 2}, "num_points must be an int >= 3"),
        (torch.zeros(2), torch.ones(2), {"max_iterations": 0}, "max_iterations must be an int"),
        (torch.zeros(2), torch.ones(2), {"tolerance": 0.0}, "tolerance must be a finite number"),
    ],
)
def test_bad_ends_are_named(z0: Any, z1: Any, options: dict[str, Any], message: str) -> None:
    pair, _ = case("bernoulli")
    with pytest.raises(ValueError, match=message):
        probae.geodesic(pair, z0, z1, **options)


def test_pairs_without_geodesics_are_named() -> None:
    ends = torch.zeros(2).double(), torch.ones(2).double()
    for function, message in (
        (lambda z: dist.Normal(z.detach(), 1.0).to_event(1), "autograd sees no path from z"),
        (lambda z: dist.Laplace(z, 1.0).to_event(1), "got Laplace: its divergence is not known"),
        (lambda z: dist.Normal(z, 1.0).to_event(1).mask(False), "density that is not masked"),
    ):
        with pytest.raises(ValueError, match=message):
            probae.geodesic(pair_of(Fixed(function)), *ends)
    noisy = pair_of(corrupted(normal(), probae.Masking(0.1)))
    with pytest.raises(ValueError, match=r"pair\.decoder\.decoder"):
        probae.geodesic(noisy, *ends)
    clean = bernoulli()
    flipped = pair_of(corrupted(clean, probae.BitFlip(0.1)))  # Bernoulli still, and less distinct
    assert probae.geodesic(flipped, *ends).length < probae.geodesic(pair_of(clean), *ends).length
    with pytest.raises(ValueError, match="continuous codes"):
        probae.geodesic(probae.SemanticHashing(6, 2, posterior="bernoulli"), *ends)
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got Linear"):
        probae.geodesic(nn.Linear(2, 2), *ends)
    pair, _ = case("bernoulli")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"geodesic .*cannot run inside"):
        probae.geodesic(pair, *ends)


def test_a_way_stays_in_the_support_of_the_prior() -> None:
    prior, encoder = probae.ExponentialPrior(2), probae.LogNormalEncoder(probae.MLP(3, (2, 2)))
    # the shortest way goes round the hill at (1, 0.3), on the side where z is negative
    hill = Composed(
        lambda z: torch.cat(
            [z, 3 * (-((z - torch.tensor([1.0, 0.3])) ** 2).sum(-1, keepdim=True) * 2).exp()], -1
        )
    )
    pair = probae.Autoencoder(prior, encoder, hill)
    with pytest.raises(ValueError, match="z0 must lie in the support of the prior"):
        probae.geodesic(pair, -torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="way inside the support of the prior"):
        probae.geodesic(pair, torch.tensor([0.01, 0.01]), torch.tensor([2.0, 0.01]))
