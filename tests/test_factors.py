"""Penalties and couplings as factors of the model, against closed forms and expansions."""

import math

import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

import probae
from probae import Autoencoder, jacobian_norm

ELBOS = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    RenyiELBO(alpha=0, num_particles=2),
    probae.ELBO(),
    probae.ELBO(num_particles=3),
]
D, Z, N = 5, 3, 7


def data(n: int = N) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64)


def sigmoid_encoder() -> probae.PointEncoder:
    return probae.PointEncoder(probae.MLP(D, Z, out_activation="sigmoid"))


def squared_jacobian(f: nn.Module, x: Tensor) -> Tensor:
    """‖J‖² by one backward pass for each entry of the output."""
    rows = []
    for datum in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v[None])[0], datum)
        rows.append(jacobian.square().sum())
    return torch.stack(rows)


def test_closed_form_of_a_sigmoid_layer_is_the_jacobian() -> None:
    encoder, x = sigmoid_encoder().double(), data()
    expected = squared_jacobian(encoder.network, x)
    torch.testing.assert_close(jacobian_norm(encoder, x), expected, rtol=1e-12, atol=1e-12)
    weight = encoder.network.layers[0].weight
    f = encoder.network(x)
    by_hand = ((f * (1 - f)) ** 2 * (weight**2).sum(1)).sum(1)
    torch.testing.assert_close(by_hand, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "silu", "sigmoid"])
def test_general_penalty_is_the_jacobian_and_has_its_gradient(activation: str) -> None:
    encoder = probae.GaussianEncoder(probae.MLP(D, (2, Z), (6,), activation)).double()
    x = data()
    mean = lambda v: encoder(v).mean  # noqa: E731
    expected = squared_jacobian(mean, x)
    torch.testing.assert_close(jacobian_norm(encoder, x), expected, rtol=1e-12, atol=1e-12)
    weight = encoder.network.layers[0].weight
    (gradient,) = torch.autograd.grad(jacobian_norm(encoder, x).sum(), weight)
    step, direction = 1e-6, torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(float(squared_jacobian(mean, x).sum()))
        with torch.no_grad():
            weight -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_penalty_of_a_linear_code_is_the_norm_of_its_weights() -> None:
    encoder = probae.PointEncoder(probae.MLP(D, Z)).double()
    weight, _ = encoder.network.affine()
    torch.testing.assert_close(
        jacobian_norm(encoder, data()), (weight**2).sum().expand(N), rtol=1e-12, atol=1e-12
    )


def test_estimate_is_unbiased() -> None:
    # z-test over 20000 probes of each of 4 data: fails by chance in about 1 of 4000 seeds
    encoder = probae.PointEncoder(probae.MLP(D, Z, (6,), "tanh")).double()
    x = data(4).repeat_interleave(20_000, 0)
    factor = probae.ContractivePenalty(encoder, 1.0, "hutchinson")
    draws = -factor(x, torch.zeros(len(x), Z)).log_factor.detach().reshape(4, -1)
    exact = jacobian_norm(encoder, x[::20_000])
    error = (draws.mean(1) - exact).abs() / (draws.std(1) / math.sqrt(draws.shape[1]))
    assert (error < 4.2).all()


def test_more_probes_of_the_estimate_make_it_less_noisy() -> None:
    encoder = sigmoid_encoder()
    x = torch.randn(1, D).expand(4000, D)
    spread = []
    for probes in (1, 16):
        factor = probae.ContractivePenalty(encoder, 1.0, "hutchinson", probes)
        spread.append(float(factor(x, x).log_factor.detach().std()))
    assert spread[1] == pytest.approx(spread[0] / 4, rel=0.15)


def contractive(weight: float = 0.3, **options: object) -> Autoencoder:
    pair = probae.ContractiveAutoencoder(D, Z, weight=weight, **options)
    return pair.double()


@pytest.mark.parametrize("elbo", ELBOS, ids=lambda e: type(e).__name__)
def test_loss_is_the_textbooks_plus_a_constant(elbo: object) -> None:
    pair, x = contractive(), data()
    z = pair.encoder(x).mean
    textbook = (
        0.5 * ((x - pair.decoder(z).mean) ** 2).sum() + 0.3 * jacobian_norm(pair.encoder, x).sum()
    )
    expected = textbook + N * D / 2 * math.log(2 * math.pi)
    assert elbo.loss(pair.model, pair.guide, x) == pytest.approx(float(expected), rel=1e-10)
    assert pair.kind is probae.Kind.ENERGY


def test_gradient_of_the_loss_is_the_textbooks() -> None:
    pair, x = contractive(), data()
    weight = pair.encoder.network.layers[0].weight
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, x)
    (gradient,) = torch.autograd.grad(loss, weight)
    error = 0.5 * ((x - pair.decoder(pair.encoder(x).mean).mean) ** 2).sum()
    textbook = error + 0.3 * squared_jacobian_sum(pair.encoder.network, x)
    (expected,) = torch.autograd.grad(textbook, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def squared_jacobian_sum(network: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacrev(lambda v: network(v)))(x).square().sum()


def test_noise_form_is_the_penalty_to_leading_order() -> None:
    # E -log N(f(x + e); f(x), s²) - const = σ²/(2s²) ‖J‖² (1 + O(σ²)), with s² = σ²/(2λ)
    encoder = probae.PointEncoder(probae.MLP(D, Z, (6,), "tanh")).double()
    x, weight, ratios = data(1), 0.7, []
    draws = torch.randn(400_000, D, dtype=torch.float64)
    for noise in (0.2, 0.1, 0.05, 0.025):
        scale = noise / math.sqrt(2 * weight)
        factor = probae.CodeCoupling(encoder, scale)
        both = torch.cat([draws, -draws])  # antithetic: odd orders cancel
        with torch.no_grad():
            z = encoder(x + noise * both).mean
            log_factor = factor(x.expand(len(both), D), z).log_factor.mean()
        constant = -Z / 2 * math.log(2 * math.pi * scale**2)
        penalty = weight * jacobian_norm(encoder, x)
        ratios.append(float((constant - log_factor) / penalty))
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[-1] < 0.01  # Monte Carlo noise of the ratio is about 0.002
    assert errors[0] > errors[-1]


def test_denoising_error_expands_with_the_laplacian() -> None:
    # E‖r(x+e)-x‖² = ‖r-x‖² + σ²(‖J‖² + (r-x)·Δr) + O(σ⁴), by Gauss-Hermite quadrature
    import numpy as np

    torch.manual_seed(0)
    d = 2
    r = probae.MLP(d, d, (6,), "tanh").double()
    x = torch.randn(d, dtype=torch.float64)
    nodes, weights = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(weights, weights).prod(1)
    jacobian = jacrev(lambda v: r(v))(x)
    laplacian = hessian(lambda v: r(v))(x).diagonal(dim1=-2, dim2=-1).sum(-1)
    residuals, without = [], []
    for sigma in (0.2, 0.1, 0.05, 0.025):
        exact = (mass * ((r(x + sigma * grid) - x) ** 2).sum(1)).sum()
        base = ((r(x) - x) ** 2).sum()
        drift = ((r(x) - x) * laplacian).sum()
        first = base + sigma**2 * jacobian.square().sum()
        without.append(float((exact - first).abs() / sigma**2))
        residuals.append(float((exact - first - sigma**2 * drift).abs() / sigma**4))
    assert max(residuals) < 3 * residuals[-1] + 1e-6  # bounded as σ falls
    assert without[-1] > 0.5 * float(drift.abs())  # the Laplacian may not be dropped here


def test_coupling_is_the_density_of_the_prediction() -> None:
    predictor = probae.PointEncoder(probae.MLP(D, Z)).double()
    x, z = data(), torch.randn(2, N, Z, dtype=torch.float64)
    expected = -2.0 * ((predictor.network(x) - z) ** 2).sum(-1) - Z / 2 * math.log(math.pi / 2)
    got = probae.CodeCoupling(predictor, scale=0.5)(x, z).log_factor
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_factor_stays_out_of_the_likelihood_of_the_generative_part() -> None:
    x = data()
    plain = probae.VAE(D, Z, likelihood="gaussian")
    penalty = probae.ContractivePenalty(plain.encoder, 5.0)
    penalised = Autoencoder(plain.prior, plain.encoder, plain.decoder, factor=penalty).double()
    assert penalised.kind is probae.Kind.ENERGY
    with pytest.raises(ValueError, match=r"ENERGY.*fit_proposal"):
        probae.log_likelihood(penalised, x)
    bounds = [
        probae.log_likelihood(pair, x, "iwae", 10, proposal=plain.encoder).values
        for pair in (plain, penalised)
    ]
    assert torch.equal(*bounds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 0.0}, "weight must be a finite number > 0"),
        ({"weight": 1.0, "method": "exakt"}, "method must be 'exact' or 'hutchinson'"),
        ({"weight": 1.0, "num_probes": 0}, "num_probes must be an int >= 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probae.ContractivePenalty(sigmoid_encoder(), **arguments)


@pytest.mark.parametrize("x", [torch.zeros(D), torch.zeros(2, D, dtype=torch.int64), [1.0]])
def test_jacobian_norm_refuses_what_is_no_batch(x: object) -> None:
    with pytest.raises(ValueError, match="x must be a floating tensor of shape"):
        jacobian_norm(sigmoid_encoder(), x)


def test_a_factor_of_the_wrong_shape_is_refused_at_construction() -> None:
    class Summed(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> object:
            import pyro.distributions as dist

            return dist.Unit(z.sum())

    with pytest.raises(ValueError, match=r"factor\(x, z\) must return a distribution of batch"):
        Autoencoder(
            probae.FlatPrior(Z),
            sigmoid_encoder(),
            probae.GaussianDecoder(probae.MLP(Z, D)),
            factor=Summed(),
        )
    with pytest.raises(ValueError, match=r"factor must be a torch.nn.Module or None, got float"):
        Autoencoder(
            probae.FlatPrior(Z),
            sigmoid_encoder(),
            probae.GaussianDecoder(probae.MLP(Z, D)),
            factor=0.5,
        )


def test_an_encoder_without_a_differentiable_mean_is_refused() -> None:
    import pyro.distributions as dist

    class Squashed(nn.Module):  # a density whose mean torch does not know
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, Z)

        def forward(self, x: Tensor) -> object:
            normal = dist.Normal(self.linear(x), 1.0)
            return dist.TransformedDistribution(normal, [dist.transforms.TanhTransform()])

    decoder = probae.GaussianDecoder(probae.MLP(Z, D, unit_norm=True))
    for encoder in (Squashed(), probae.SparseCodingEncoder(decoder, 0.5)):
        with pytest.raises(ValueError, match="encoder must have a mean in closed form"):
            jacobian_norm(encoder, data().float())
    with pytest.raises(ValueError, match="encoder must map x of shape"):
        jacobian_norm(sigmoid_encoder(), torch.zeros(2, D + 1))


def test_chunks_of_the_jacobian_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from probae import factors

    encoder, x = probae.PointEncoder(probae.MLP(D, Z, (6,), "tanh")).double(), data()
    whole = jacobian_norm(encoder, x)
    monkeypatch.setattr(factors, "MAX_ELEMENTS", 2 * D * Z)
    torch.testing.assert_close(jacobian_norm(encoder, x), whole, rtol=1e-12, atol=1e-12)


def test_a_predictor_of_another_width_is_refused() -> None:
    encoder, predictor = sigmoid_encoder(), probae.PointEncoder(probae.MLP(D, 1))
    with pytest.raises(ValueError, match="predictor must have codes of 3 dimensions"):
        Autoencoder(
            probae.FlatPrior(Z),
            encoder,
            probae.GaussianDecoder(probae.MLP(Z, D)),
            factor=probae.CodeCoupling(predictor, 0.5),
        )
