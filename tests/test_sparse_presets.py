"""Losses of the sparse, denoising and predictive presets: the textbook's plus its constant."""

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

import probae
from probae import Autoencoder

N, D, K = 7, 6, 4
RATE = 0.7
ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": lambda: RenyiELBO(alpha=0, num_particles=2),
    "ELBO": probae.ELBO,
}
GAUSSIAN = D / 2 * math.log(2 * math.pi)  # constant of ½‖x - g‖²


def data(positive: bool = False) -> Tensor:
    x = torch.randn(N, D, dtype=torch.float64)
    return x.abs() if positive else x


def sparse(prior: str, posterior: str = "point", **options: object) -> Autoencoder:
    rate = {} if prior == "subset" else {"rate": RATE}
    return probae.SparseAutoencoder(D, K, prior=prior, posterior=posterior, **rate, **options)


def laplace(z: Tensor) -> Tensor:
    return RATE * z.abs().sum(1) + K * math.log(2 / RATE)


def exponential(z: Tensor) -> Tensor:
    return RATE * z.sum(1) - K * math.log(RATE)


def student_t(z: Tensor) -> Tensor:
    nu, s = 3.0, 1 / RATE
    constant = math.log(s * math.sqrt(nu * math.pi)) + math.lgamma(nu / 2)
    constant -= math.lgamma((nu + 1) / 2)
    return ((nu + 1) / 2 * torch.log1p((z / s) ** 2 / nu) + constant).sum(1)


def jump_relu(z: Tensor) -> Tensor:
    return RATE * (z != 0).to(z).sum(1) + K * math.log1p(math.exp(-RATE))


def top_k(z: Tensor) -> Tensor:
    return z.new_full((N,), math.log(math.comb(K, 2)))


PENALTIES: dict[str, tuple[Callable[[], Autoencoder], Callable[[Tensor], Tensor]]] = {
    "laplace": (lambda: sparse("laplace"), laplace),
    "deep-laplace": (lambda: sparse("laplace", hidden=(5,)), laplace),
    "sparse-coding": (lambda: sparse("laplace", "sparse-coding"), laplace),
    "exponential": (lambda: sparse("exponential"), exponential),
    "student-t": (lambda: sparse("student-t"), student_t),
    "jump-relu": (lambda: sparse("spike-and-slab", slab_scale=None), jump_relu),
    "top-k": (lambda: sparse("subset", num_active=2, slab_scale=None), top_k),
}


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("name", PENALTIES)
def test_point_code_loss_is_the_textbooks(name: str, elbo: Callable[[], pyro.infer.ELBO]) -> None:
    build, penalty = PENALTIES[name]
    pair, x = build().double(), data()
    z = pair.encoder(x).mean
    textbook = 0.5 * ((x - pair.decoder(z).mean) ** 2).sum(1) + penalty(z)
    loss = elbo().loss(pair.model, pair.guide, x)
    assert loss == pytest.approx(float((textbook + GAUSSIAN).sum().detach()), rel=1e-10)
    assert (z == 0).any() or name in ("laplace", "deep-laplace", "student-t")


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize(
    ("corruption", "likelihood"),
    [
        (lambda: probae.GaussianNoise(0.4), "gaussian"),
        (lambda: probae.Masking(0.4), "gaussian"),
        (lambda: probae.Masking(0.4, known=True), "gaussian"),
        (lambda: probae.SaltAndPepper(0.4), "bernoulli"),
        (lambda: probae.BitFlip(0.1, 0.3), "bernoulli"),
        (lambda: probae.PoissonThinning(0.4), "poisson"),
    ],
)
def test_denoising_loss_is_the_conditional_likelihood(
    corruption: Callable[[], probae.Part], likelihood: str, elbo: Callable[[], pyro.infer.ELBO]
) -> None:
    pair = probae.DenoisingAutoencoder(
        D, K, corruption=corruption(), hidden=(5,), likelihood=likelihood
    ).double()
    x = data() if likelihood == "gaussian" else data(positive=True).round().clamp(max=1)
    objective = elbo()
    particles = objective.num_particles
    torch.manual_seed(3)
    loss = objective.loss(pair.model, pair.guide, x)
    torch.manual_seed(3)
    shape = torch.Size((particles,)) if particles > 1 else torch.Size()
    # Renyi draws one particle after the other, under one plate or in a loop
    x_tilde = pair.corruption(x).sample(shape)
    log_prob = pair.decoder(pair.encoder(x_tilde.to(x)).mean).log_prob(x)
    if particles > 1:  # per datum, the log of the mean likelihood
        alternatives = []
        torch.manual_seed(3)
        loop = torch.stack([pair.corruption(x).sample() for _ in range(particles)])
        for draws in (x_tilde, loop):
            log_prob = pair.decoder(pair.encoder(draws.to(x)).mean).log_prob(x)
            bound = log_prob.logsumexp(0) - math.log(particles)
            alternatives.append(-float(bound.sum().detach()))
        assert any(loss == pytest.approx(value, rel=1e-10) for value in alternatives)
    else:
        assert loss == pytest.approx(-float(log_prob.sum().detach()), rel=1e-10)
    assert pair.kind is probae.Kind.CONDITIONAL


@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("couple", [True, False])
def test_predictive_loss_is_the_energy(couple: bool, elbo: Callable[[], pyro.infer.ELBO]) -> None:
    gamma = 1.3
    pair = probae.PredictiveSparseDecomposition(
        D, K, rate=RATE, coupling=gamma, couple=couple, hidden=(5,)
    ).double()
    x = data()
    z, f = pair.encoder(x).mean, pair.predictor(x).mean
    energy = ((x - pair.decoder(z).mean) ** 2).sum(1) + RATE * z.abs().sum(1)
    energy = energy + gamma * ((z - f) ** 2).sum(1)
    constant = (
        D / 2 * math.log(math.pi) + K * math.log(2 / RATE) + K / 2 * math.log(math.pi / gamma)
    )
    loss = elbo().loss(pair.model, pair.guide, x)
    assert loss == pytest.approx(float((energy + constant).sum().detach()), rel=1e-10)
    assert pair.kind is probae.Kind.ENERGY
    assert (z == 0).any()


def test_one_step_of_svi_trains_dictionary_and_predictor_with_the_code_detached() -> None:
    pair = probae.PredictiveSparseDecomposition(D, K, rate=RATE, hidden=(5,)).double()
    x = data()
    z = pair.encoder(x).mean
    assert not z.requires_grad
    Trace_ELBO().differentiable_loss(pair.model, pair.guide, x).backward()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    # the coupling alone moves the predictor: its gradient is that of γ‖z - f(x)‖²
    weight = pair.predictor.network.layers[0].weight
    (expected,) = torch.autograd.grad(((z - pair.predictor(x).mean) ** 2).sum(), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_training_narrows_the_amortisation_gap() -> None:
    torch.manual_seed(0)
    codes = torch.randn(500, K) * (torch.rand(500, K) < 0.4)
    x = codes @ torch.randn(K, D) + 0.05 * torch.randn(500, D)
    pair = probae.PredictiveSparseDecomposition(D, K, rate=0.2, coupling=1.0, hidden=(32,))

    def gap() -> float:
        with torch.no_grad():
            f, z = pair.predictor(x).mean, pair.encoder(x).mean
            return float((pair.encoder.energy(x, f) - pair.encoder.energy(x, z)).mean())

    before = gap()
    probae.fit(pair, x, epochs=40, lr=3e-3, progress=False)
    assert 0 <= gap() < 0.2 * before


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_beta_is_the_variance_of_a_gaussian_decoder(beta: float) -> None:
    # loss_β = β [NLL at σ² = β, + KL] - β (d/2) log(2πβ), up to the constant at σ² = 1
    torch.manual_seed(0)
    unit = probae.VAE(D, K, likelihood="gaussian", hidden=(5,)).double()
    wide = probae.VAE(
        D, K, likelihood="gaussian", hidden=(5,), likelihood_options={"scale": math.sqrt(beta)}
    ).double()
    wide.load_state_dict(unit.state_dict())
    x, losses = data(), []
    for pair, objective in ((unit, probae.ELBO(beta=beta)), (wide, probae.ELBO())):
        torch.manual_seed(1)
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        loss.backward()
        losses.append(float(loss.detach()))
    constant = N * D / 2 * (math.log(2 * math.pi) - beta * math.log(2 * math.pi * beta))
    assert losses[0] == pytest.approx(beta * losses[1] + constant, rel=1e-10)
    for first, second in zip(unit.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(first.grad, beta * second.grad, rtol=1e-10, atol=1e-10)


def test_a_learned_rate_meets_no_point_code() -> None:
    prior = probae.LaplacePrior(K, rate=1.0, learn_rate=True)
    with pytest.raises(ValueError, match=r"prior learns its parameters .* point code"):
        probae.SparseAutoencoder(D, K, prior=prior)
    assert probae.SparseAutoencoder(D, K, prior=prior, posterior="gaussian").kind.value == "ELBO"
    prior.requires_grad_(False)
    assert probae.SparseAutoencoder(D, K, prior=prior).kind.value == "MAP_JOINT"


def test_codes_with_atoms_meet_no_prior_without() -> None:
    encoder = probae.SpikeAndSlabEncoder(probae.MLP(D, (3, K)))
    with pytest.raises(ValueError, match="encoder puts probability on codes of exactly 0"):
        Autoencoder(probae.LaplacePrior(K), encoder, probae.GaussianDecoder(probae.MLP(K, D)))


def test_point_codes_have_a_dictionary_of_unit_norm() -> None:
    for pair, unit in (
        (sparse("laplace"), True),
        (sparse("laplace", "laplace"), False),
        (sparse("laplace", "laplace", unit_norm=True), True),
        (probae.PredictiveSparseDecomposition(D, K), True),
    ):
        norms = pair.decoder.affine()[0].norm(dim=0)
        assert torch.allclose(norms, torch.ones(K)) == unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, "rate must be a finite number > 0"),
        ({"rate": float("nan")}, "rate must be a finite number > 0"),
        ({"prior": "gauss"}, "prior must be a module or one of laplace"),
        ({"posterior": "laplas"}, r"posterior must be a module or, for prior='laplace', one of"),
        ({"posterior": ["point"]}, "posterior must be a module"),
        ({"prior": "subset"}, "num_active must be given for prior='subset'"),
        ({"num_active": 2}, "num_active must be given for prior='subset'"),
        ({"prior": "subset", "num_active": 9}, "num_active must be at most z_dim"),
        ({"prior": "subset", "num_active": 2, "rate": 1.0}, "rate goes with a prior"),
        ({"prior": probae.LaplacePrior(K), "rate": 2.0}, "rate goes with a prior"),
        ({"unit_norm": "no"}, "unit_norm must be True or False"),
        ({"posterior": "laplace", "slab_scale": "wide"}, "slab_scale must be a finite number"),
        ({"bandwidth": -1.0}, "bandwidth must be a finite number > 0"),
        ({"prior": torch.zeros(3)}, "prior must be a module or one of laplace"),
        ({"posterior": "sparse-coding", "hidden": (5,)}, "decoder must be a GaussianDecoder"),
        ({"posterior": "sparse-coding", "likelihood": "bernoulli"}, "decoder must be a Gaussian"),
    ],
)
def test_bad_arguments_of_the_sparse_autoencoder(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probae.SparseAutoencoder(D, K, **arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: probae.ContractiveAutoencoder(D, K, penalty="l2"), "penalty must be 'exact'"),
        (lambda: probae.ContractiveAutoencoder(D, K, weight=-1.0), "weight must be a finite"),
        (
            lambda: probae.ContractiveAutoencoder((1, 8, 8), K, channels=(4,)),
            r"tied=True needs a perceptron \(channels=\(\)\)",
        ),
        (
            lambda: probae.ContractiveAutoencoder(D, K, likelihood="heteroscedastic-gaussian"),
            "tied=True needs .* likelihood with one parameter",
        ),
        (lambda: probae.DenoisingAutoencoder(D, K, corruption=0.3), "corruption must be a module"),
        (lambda: probae.DenoisingVAE(D, K, corruption="mask"), "corruption must be a module"),
        (
            lambda: probae.DenoisingAutoencoder(D, K, corruption=torch.nn.Linear(D, D)),
            r"corruption\(x\) must return a torch.distributions.Distribution, got Tensor",
        ),
        (
            lambda: probae.DenoisingVAE(D, K, corruption=torch.nn.Linear(3, 3)),
            "corruption does not take x of shape",
        ),
        (lambda: probae.SemanticHashing(D, K, posterior=["noise"]), "posterior must be one of"),
        (
            lambda: probae.SemanticHashing(D, K, posterior="bernoulli", noise=0),
            "noise must be a finite number > 0",
        ),
        (lambda: probae.ContractiveAutoencoder(D, K, tied="no"), "tied must be True or False"),
        (lambda: probae.ContractiveAutoencoder(D, K, noise=-5.0), "noise must be a finite"),
        (
            lambda: probae.PredictiveSparseDecomposition(D, K, couple="no"),
            "couple must be True or False",
        ),
        (lambda: probae.SemanticHashing(D, K, posterior="hard"), "posterior must be one of noise"),
        (
            lambda: probae.PredictiveSparseDecomposition(D, K, coupling=0.0),
            "coupling must be a finite number > 0",
        ),
    ],
)
def test_bad_arguments_of_the_other_presets(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
