"""Greedy pretraining against stages built by hand, and what an imperfect denoiser can do."""

import copy
import importlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import probae
from probae import (
    MLP,
    Autoencoder,
    BernoulliDecoder,
    FlatPrior,
    GaussianDecoder,
    Kind,
    PointEncoder,
    TransposedMLP,
)

X, N = 8, 30
HIDDEN = (7, 6, 4)
pretrain = partial(probae.pretrain, progress=False)
fit = partial(probae.fit, progress=False)


def bits(n: int = N, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or (X,))).round()


def deep(hidden: tuple[int, ...] = HIDDEN, **keywords: Any) -> Autoencoder:
    torch.manual_seed(3)
    keywords = {"activation": "tanh", "likelihood": "bernoulli", **keywords}
    return probae.UndercompleteAutoencoder(X, 2, hidden=hidden, **keywords)


def state(pair: Autoencoder) -> dict[str, Tensor]:
    return copy.deepcopy(pair.state_dict())


@pytest.mark.parametrize("corruption", [None, probae.GaussianNoise(0.2)], ids=["none", "noise"])
def test_stages_are_the_shallow_pairs_one_would_build(corruption: nn.Module | None) -> None:
    pair, by_hand, x = deep((7, 4)), deep((7, 4)), bits()
    runs = pretrain(pair, x, corruption=corruption, epochs=3, batch_size=8, lr=0.01, seed=5)
    up, down = by_hand.encoder.network.layers, by_hand.decoder.network.layers
    rooted = math.sqrt(0.5)
    stages = [
        (PointEncoder(up[:2]), BernoulliDecoder(down[4:]), 7),
        (PointEncoder(up[2:4]), GaussianDecoder(down[2:4], scale=rooted), 4),
        (PointEncoder(up[4:]), GaussianDecoder(down[:2], scale=rooted), 2),
    ]
    h = x
    for run, (encoder, decoder, width) in zip(runs, stages, strict=True):
        shallow = Autoencoder(FlatPrior(width), encoder, decoder, corruption)
        expected = fit(shallow, h, epochs=3, batch_size=8, lr=0.01, seed=5)
        assert run.history["loss"] == expected.history["loss"]
        assert run.kind is expected.kind
        with torch.no_grad():
            h = encoder(h).mean
    after = by_hand.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in pair.state_dict().items())


def test_losses_are_cross_entropy_then_squared_error() -> None:
    pair, x = deep((5,)), bits()
    # a whole batch in one epoch: the loss is that of the starting values
    first, second = pretrain(copy.deepcopy(pair), x, epochs=1, batch_size=N, lr=1e-12)
    up, down = pair.encoder.network.layers, pair.decoder.network.layers
    with torch.no_grad():
        h = torch.tanh(up[0](x))
        entropy = binary_cross_entropy_with_logits(down[2](h), x, reduction="none").sum(-1)
        squares = ((torch.tanh(down[0](up[2](h))) - h) ** 2).sum(-1)
    assert first.history["loss"] == pytest.approx([entropy.mean().item()], rel=1e-5)
    constant = 5 / 2 * math.log(math.pi)
    assert second.history["loss"] == pytest.approx([squares.mean().item() + constant], rel=1e-5)


@pytest.mark.parametrize("corruption", [None, probae.GaussianNoise(0.2)], ids=["none", "noise"])
def test_what_it_changes_and_what_it_leaves(corruption: nn.Module | None) -> None:
    pair, x = deep(), bits()
    before, modules = state(pair), list(pair.modules())
    parameters = list(pair.parameters())
    mine = pyro.param("mine", torch.tensor(1.0))
    stream = torch.get_rng_state()
    runs = pretrain(pair, x, corruption=corruption, epochs=2)
    assert len(runs) == len(HIDDEN) + 1
    kind = Kind.RECONSTRUCTION if corruption is None else Kind.CONDITIONAL
    assert [run.kind for run in runs] == [kind] * len(runs)
    assert [len(run.history["loss"]) for run in runs] == [2] * len(runs)
    for name, parameter in pair.named_parameters():  # every layer was some stage's
        assert not torch.equal(parameter, before[name]), name
    assert all(a is b for a, b in zip(pair.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(pair.parameters(), parameters, strict=True))
    assert dict(pyro.get_param_store().items()) == {"mine": mine}
    assert torch.equal(torch.get_rng_state(), stream)
    assert pair.corruption is None
    assert pair.kind is Kind.RECONSTRUCTION
    fit(pair, x, epochs=1)  # as usual


def test_it_is_deterministic_under_a_seed() -> None:
    pairs, x = [deep() for _ in range(3)], bits()
    for pair, seed in zip(pairs, (5, 5, 6), strict=True):
        torch.rand(3)  # the global stream does not matter
        pretrain(pair, x, corruption=probae.GaussianNoise(0.2), epochs=2, batch_size=8, seed=seed)
    first, second, third = (pair.state_dict() for pair in pairs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_without_a_seed_the_global_stream_is_drawn_from() -> None:
    states = []
    for stream in (1, 1, 2):
        pair = deep()
        torch.manual_seed(stream)
        pretrain(pair, bits(), epochs=1, batch_size=8, seed=None)
        states.append(pair.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_a_deep_autoencoder_starts_lower_and_stays_ahead(activation: str) -> None:
    x = probae.load_dataset("digits").train
    torch.manual_seed(0)
    plain = probae.UndercompleteAutoencoder(
        (1, 8, 8), 8, hidden=(128, 64, 32), activation=activation, likelihood="bernoulli"
    )
    plain.initialize(x)
    pair = copy.deepcopy(plain)
    runs = pretrain(pair, x, corruption=probae.GaussianNoise(0.1), epochs=10, lr=3e-3)
    for run in runs:
        assert run.history["loss"][-1] < run.history["loss"][0]
    assert loss_of(pair, x) < 0.9 * loss_of(plain, x)
    tuned = [fit(p, x, epochs=3).history["loss"][-1] for p in (pair, plain)]
    assert tuned[0] < tuned[1]


def loss_of(pair: Autoencoder, x: Tensor) -> float:
    return probae.ELBO().loss(pair.model, pair.guide, x) / len(x)


# pairs of other kinds


def test_tied_weights_are_trained_both_ways() -> None:
    torch.manual_seed(0)
    network = MLP((2, 4), 3, (6,), "sigmoid", "sigmoid")
    decoder = BernoulliDecoder(TransposedMLP(network))
    pair, x = Autoencoder(FlatPrior(3), PointEncoder(network), decoder), bits(N, 2, 4)
    by_hand = copy.deepcopy(pair)
    runs = pretrain(pair, x, epochs=1, batch_size=N, lr=0.01)
    # the first step of Adam, by hand, at each of the two stages
    up, tied = by_hand.encoder.network.layers, by_hand.decoder.network
    optim = torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=True)
    h = torch.sigmoid(up[0](x.flatten(1)))
    logits = h @ up[0].weight + tied.biases[0]
    loss = binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum") / N
    loss.backward()
    assert runs[0].history["loss"] == pytest.approx([loss.item()], rel=1e-5)
    optim.step()
    optim = torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=True)
    optim.zero_grad()
    h = torch.sigmoid(up[0](x.flatten(1))).detach()
    z = torch.sigmoid(up[2](h))
    back = torch.sigmoid(z @ up[2].weight + tied.biases[1])
    loss = ((back - h) ** 2).sum() / N
    loss.backward()
    assert runs[1].history["loss"] == pytest.approx([loss.item() + 3 * math.log(math.pi)], rel=1e-5)
    optim.step()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_of_a_gaussian_encoder_the_mean_is_pretrained() -> None:
    torch.manual_seed(0)
    pair, x = probae.VAE((2, 4), 3, hidden=(6,), activation="tanh"), bits(N, 2, 4)
    before = state(pair)
    runs = pretrain(pair, x, epochs=2)
    assert [run.kind for run in runs] == [Kind.RECONSTRUCTION] * 2
    after = pair.encoder.network.output.weight.reshape(2, 3, 6)
    start = before["encoder.network.layers.2.weight"].reshape(2, 3, 6)
    assert (after[0] != start[0]).all()
    assert torch.equal(after[1], start[1])
    assert pair.kind is Kind.ELBO


@pytest.mark.parametrize("name", ["bernoulli", "noisy", "probit"])
def test_of_a_binary_code_the_probability_is_pretrained(name: str) -> None:
    network = MLP(X, 3, (6,), "tanh")
    if name == "noisy":
        prior, encoder = FlatPrior(3), probae.NoisySigmoidEncoder(network, noise=2.0)
    else:
        prior = probae.BernoulliPrior(3)
        kind = probae.BernoulliEncoder if name == "bernoulli" else probae.ProbitEncoder
        encoder = kind(network)
    decoder = BernoulliDecoder(MLP(3, X, (6,), "tanh"))
    pair, x = Autoencoder(prior, encoder, decoder), bits()
    start = copy.deepcopy(pair)
    runs = pretrain(pair, x, epochs=1, batch_size=N, lr=1e-2)
    for before, after in zip(start.parameters(), pair.parameters(), strict=True):
        assert not torch.equal(before, after)
    lowest = pair.encoder.network.layers[0]  # as the first stage left it
    start.encoder.network.layers[0].load_state_dict(lowest.state_dict())
    with torch.no_grad():
        h = torch.tanh(lowest(x))
        z = start.encoder(x).mean
        squares = ((torch.tanh(start.decoder.network.layers[0](z)) - h) ** 2).sum(-1).mean()
    expected = squares.item() + 3 * math.log(math.pi)
    assert runs[1].history["loss"] == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("likelihood", list(probae.LIKELIHOODS))
def test_the_first_stage_has_the_likelihood_of_the_pair(
    likelihood: str, dtype: torch.dtype
) -> None:
    from .conftest import DATA, OPTIONS

    x = DATA[likelihood](N, 2, 4).to(dtype)
    pair = probae.VAE(
        (2, 4),
        3,
        hidden=(6,),
        likelihood=likelihood,
        likelihood_options=OPTIONS.get(likelihood),
    ).to(dtype)
    pair.initialize(x)
    before = state(pair)
    runs = pretrain(pair, x, epochs=2)
    assert len(runs) == 2
    assert pair.dtype == dtype
    changed = {name for name, t in pair.state_dict().items() if not torch.equal(t, before[name])}
    # a learned scale belongs to the whole pair, whose residual is another
    assert set(before) - changed <= {"decoder.raw_scale"}


def test_options_of_the_decoder_are_kept() -> None:
    pair, x = deep((5,), likelihood="gaussian", likelihood_options={"scale": 0.1}), bits()
    first, _ = pretrain(copy.deepcopy(pair), x, epochs=1, batch_size=N, lr=1e-12)
    with torch.no_grad():
        h = torch.tanh(pair.encoder.network.layers[0](x))
        squares = ((pair.decoder.network.layers[2](h) - x) ** 2).sum(-1).mean().item()
    expected = squares / (2 * 0.1**2) + X / 2 * math.log(2 * math.pi * 0.1**2)
    assert first.history["loss"] == pytest.approx([expected], rel=1e-5)


def test_unit_norm_columns_stay_of_unit_norm() -> None:
    torch.manual_seed(0)
    pair = Autoencoder(
        FlatPrior(2),
        PointEncoder(MLP(X, 2, (6,), "tanh")),
        BernoulliDecoder(MLP(2, X, (6,), "tanh", unit_norm=True)),
    )
    pretrain(pair, bits(), epochs=2)
    assert isinstance(pair.decoder.network.layers[0], probae.UnitNormLinear)


# bad input


class Net(nn.Module):
    """A network that is no stack of layers."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.linear = nn.Linear(*widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def compose(up: nn.Module, down: nn.Module) -> Autoencoder:
    return Autoencoder(FlatPrior(2), PointEncoder(up), BernoulliDecoder(down))


UP, DOWN = partial(MLP, X, 2), partial(MLP, 2, X)
UNFIT = {
    "conv": (
        lambda: probae.VAE((1, 8, 8), 2, hidden=(5,), channels=(3,)),
        r"encoder must stand on an MLP .* got GaussianEncoder\(ConvNet\)",
    ),
    "own encoder": (
        lambda: compose(Net(X, 2), DOWN((4,))),
        r"encoder must stand on an MLP .*, got PointEncoder\(Net\)",
    ),
    "own decoder": (
        lambda: compose(UP((4,)), Net(2, X)),
        r"decoder must stand on an MLP or a TransposedMLP.*, got BernoulliDecoder\(Net\)",
    ),
    "no network": (
        lambda: probae.PPCA(X, 2),
        r"encoder must stand on an MLP .*, got LinearGaussianPosterior\(\)",
    ),
    "known mask": (
        lambda: Autoencoder(
            FlatPrior(2),
            PointEncoder(MLP((2, X), 2, (5,))),
            BernoulliDecoder(DOWN((5,))),
            probae.Masking(0.2, known=True),
        ),
        r"encoder must take x of shape \(8,\) itself, got .* inputs of shape \(2, 8\)",
    ),
    "no hidden layer": (lambda: compose(UP(), DOWN()), "encoder must have a hidden layer"),
    "other widths": (
        lambda: compose(UP((5, 4)), DOWN((5, 4))),
        r"decoder must mirror the encoder.*\(5, 4\), ReLU.*\(5, 4\), ReLU",
    ),
    "other depth": (lambda: compose(UP((5, 4)), DOWN((4,))), "decoder must mirror the encoder"),
    "linear decoder": (lambda: compose(UP((5,)), DOWN()), "decoder must mirror the encoder"),
    "other activation": (
        lambda: compose(UP((5,), "tanh"), DOWN((5,), "relu")),
        "decoder must mirror the encoder.*Tanh.*ReLU",
    ),
    "tied to another": (
        lambda: compose(UP((5,)), TransposedMLP(UP((5,)))),
        r"decoder must mirror the encoder.*BernoulliDecoder\(TransposedMLP\)",
    ),
    "no gradient": (
        lambda: Autoencoder(
            probae.BernoulliPrior(2),
            probae.ThresholdEncoder(UP((5,))),
            BernoulliDecoder(DOWN((5,))),
        ),
        "encoder must have a mean that passes a gradient.*got ThresholdEncoder",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_networks_that_are_no_stack_are_refused(name: str) -> None:
    build, message = UNFIT[name]
    pair = build()
    before = state(pair)
    with pytest.raises(ValueError, match=message):
        pretrain(pair, bits(N, *pair.x_shape))
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.rand(N, X + 1)}, r"x must have shape \(N, 8\), got \(30, 9\)"),
        ({"x": torch.full((N, X), 2.0)}, "x must lie in the support of the decoder"),
        ({"x": torch.full((N, X), math.nan)}, "x must be finite"),
        ({"x": [1, 2]}, "x must be a tensor"),
        ({"corruption": 0.3}, r"corruption must be a torch\.nn\.Module or None, got float"),
        ({"corruption": probae.BitFlip(0.1)}, r"x must be in \[0, 1\] under BitFlip"),
        ({"epochs": 0}, "epochs must be an int >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ({"lr": -1.0}, r"lr must be a finite number > 0, got -1\.0"),
        ({"seed": "0"}, "seed must be a 64-bit int"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    pair = deep()
    before = state(pair)
    with pytest.raises(ValueError, match=message):
        pretrain(pair, **{"x": bits(), **arguments})
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    with pytest.raises(ValueError, match=r"pair must be a probae\.Autoencoder, got Linear"):
        pretrain(nn.Linear(2, 2), bits())


def test_divergence_is_an_error_and_leaves_finite_parameters() -> None:
    pair = deep()
    with pytest.raises(FloatingPointError):
        pretrain(pair, bits(), lr=1e38)
    assert all(p.isfinite().all() for p in pair.parameters())


# T24: what an imperfect denoiser does to the law of the chain x -> x_tilde -> x


def chain() -> tuple[Tensor, Tensor, Tensor]:
    """Law of the data on six corners of a cube, C(x_tilde|x) on all eight, and q(x|x_tilde)."""
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    data, law = corners[:6], torch.tensor([6.0, 1, 3, 2, 5, 4], dtype=torch.float64) / 21
    corruption = probae.BitFlip(0.2)(data[:, None].expand(6, 8, 3)[:, 0])  # batch shape (6,)
    noise = corruption.log_prob(corners[:, None]).exp().T  # (6, 8)
    posterior = (law[:, None] * noise).T  # (8, 6)
    return law, noise, posterior / posterior.sum(1, keepdim=True)


def stationary(transition: Tensor) -> Tensor:
    """Law π with π T = π."""
    equations = (torch.eye(6, dtype=torch.float64) - transition).T
    equations[-1] = 1.0
    return torch.linalg.solve(equations, torch.eye(6, dtype=torch.float64)[-1])


def test_the_exact_posterior_leaves_the_law_of_the_data() -> None:
    law, noise, posterior = chain()
    transition = noise @ posterior
    torch.testing.assert_close(law @ transition, law, rtol=0, atol=1e-15)
    flow = law[:, None] * transition
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-15)


def test_a_perturbed_posterior_moves_the_law_no_further_than_its_error_allows() -> None:
    r"""π' - π = π'(T' - T) Z, hence \|π' - π\|₁ <= τ(Z) max_i \|T'_i - T_i\|₁ (Seneta, 1988).

    Z = (I - T + 1π)⁻¹ and τ(Z) = ½ max_ij \|Z_i - Z_j\|₁. As C is stochastic, the rows of T are off
    by no more than those of q(x|x_tilde).
    """
    law, noise, posterior = chain()
    transition = noise @ posterior
    fundamental = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - transition + law)  # Z
    amplification = 0.5 * torch.cdist(fundamental, fundamental, p=1).max()
    tightest = 0.0
    for size in (1e-3, 0.03, 0.3, 1.0):
        for _ in range(250):
            other = torch.distributions.Dirichlet(torch.full((8, 6), 0.3).double()).sample()
            perturbed = (1 - size) * posterior + size * other
            moved = stationary(noise @ perturbed)
            shift = moved - law
            error = noise @ (perturbed - posterior)
            torch.testing.assert_close(shift, moved @ error @ fundamental, rtol=0, atol=1e-13)
            row_error = (perturbed - posterior).abs().sum(1).max()
            assert error.abs().sum(1).max() <= row_error + 1e-15
            bound = amplification * row_error
            assert shift.abs().sum() <= bound + 1e-14
            tightest = max(tightest, float(shift.abs().sum() / bound))
    assert 0.2 < tightest <= 1  # the bound is one, and not an empty one


@pytest.mark.parametrize("what", ["pretrain", "proposal", "estimator"])
def test_an_interrupt_ends_what_calls_fit_too(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"pretrain": "pretraining", "proposal": "proposals", "estimator": "estimator"}
    module = importlib.import_module(f"probae.{modules[what]}")
    calls, fit = [], module.fit

    def interrupted(*arguments: Any, **keywords: Any) -> probae.Run:
        calls.append(1)
        return fit(*arguments, **keywords)._replace(interrupted=True)

    monkeypatch.setattr(module, "fit", interrupted)
    x, quiet = torch.randn(20, 6), {"epochs": 1, "progress": False}
    estimator = probae.AutoencoderEstimator("PPCA", 2, epochs=1)
    call: dict[str, Callable[[], object]] = {
        "pretrain": lambda: probae.pretrain(
            probae.DenoisingAutoencoder(6, 2, hidden=(5, 4)), x, **quiet
        ),
        "proposal": lambda: probae.fit_proposal(probae.PPCA(6, 2), x, **quiet),
        "estimator": lambda: estimator.fit(x.numpy()),
    }
    with pytest.raises(KeyboardInterrupt):
        call[what]()
    assert len(calls) == 1
