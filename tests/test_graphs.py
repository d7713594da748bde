"""Functions as machine code: the same numbers, no constants of its own, honest refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probae
from probae import Annealing, annealing, fast_weights, graphs, likelihood
from probae.autoencoder import frozen
from probae.fast_weights import log_sigmoid_sum
from probae.graphs import CannotCompile, compiled

X = (1, 6, 6)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Run recorded graphs operation by operation, which takes no compiler; return them."""
    made: list[torch.fx.GraphModule] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph

    monkeypatch.setattr(graphs, "machine_code", as_it_is)
    fast_weights._compiled_log_weights.cache_clear()
    yield made
    fast_weights._compiled_log_weights.cache_clear()


@pytest.fixture
def machine_codes(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Return the graphs that machine code is made of."""
    made, compile = [], graphs.machine_code

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return compile(graph, inputs)

    monkeypatch.setattr(graphs, "machine_code", counted)
    return made


def binary(n: int = 70) -> Tensor:
    return (torch.rand(n, *X, generator=torch.Generator().manual_seed(0)) > 0.6).float()


def vae(**options: Any) -> probae.Autoencoder:
    torch.manual_seed(0)
    return probae.VAE(X, 3, **{"hidden": (8,), **options})


PAIRS: dict[str, Callable[[], probae.Autoencoder]] = {
    "fast": lambda: vae(activation="tanh"),
    "gaussian": lambda: vae(likelihood="gaussian"),
    "mixture prior": lambda: vae(prior=probae.GaussianMixturePrior(3, 4)),
    "convolutions": lambda: probae.Autoencoder(
        probae.StandardNormalPrior(3),
        probae.GaussianEncoder(probae.ConvNet(X, (2, 3), channels=(4,))),
        probae.BernoulliDecoder(probae.DeconvNet(3, X, channels=(4,))),
    ),
    "corruption": lambda: probae.DenoisingVAE(X, 3, corruption=probae.BitFlip(0.1)),
    "bits": lambda: probae.Autoencoder(
        probae.BernoulliPrior(22),  # too many states for a sum over all
        probae.BernoulliEncoder(probae.MLP(X, 22)),
        probae.BernoulliDecoder(probae.MLP(22, X, (6,))),
    ),
}


@pytest.mark.parametrize("method", ["iwae", "elbo"])
@pytest.mark.parametrize("name", PAIRS)
def test_evaluation_by_graphs_gives_the_same_values(
    name: str, method: str, interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 64 data and 6 in a second chunk, of which the graph is none; 25 samples, 10 at a time
    monkeypatch.setattr(likelihood, "rows_in_budget", lambda pair: 640)
    pair, x = PAIRS[name]().double(), binary().double()
    expected = probae.log_likelihood(pair, x, method, 25, compile=False)
    assert not interpreted
    found = probae.log_likelihood(pair, x, method, 25, compile=True)
    assert len(interpreted) == 1
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.std_error, expected.std_error, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["fast", "gaussian"])
def test_evaluation_in_machine_code(name: str) -> None:
    pair, x = PAIRS[name](), binary()
    fast_weights._compiled_log_weights.cache_clear()
    expected = probae.log_likelihood(pair, x, "iwae", 300, compile=False)
    found = probae.log_likelihood(pair, x, "iwae", 300, compile=True)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-4)
    other = PAIRS[name]()  # machine code that is kept serves other weights, too
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = probae.log_likelihood(other, x, "iwae", 300, compile=False)
    found = probae.log_likelihood(other, x, "iwae", 300, compile=True)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-4)


def test_auto_compiles_what_takes_long(interpreted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = vae(), binary()
    probae.log_likelihood(pair, x, "iwae", 25)
    assert not interpreted
    monkeypatch.setattr(likelihood, "WORTH", 1)
    probae.log_likelihood(pair, x, "iwae", 25)
    assert len(interpreted) == 1


class Branching(nn.Module):
    """A decoder that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = probae.BernoulliDecoder(probae.MLP(3, X))

    def forward(self, z: Tensor) -> Any:
        return self.inner(z if z.sum() > 0 else z + 0.0)


def test_what_branches_on_values_is_evaluated_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = vae(), binary()
    pair.decoder = Branching()
    with pytest.raises(CannotCompile, match=r"branches on the value .*test_graphs.py, line \d+"):
        probae.log_likelihood(pair, x, "iwae", 25, compile=True)
    expected = probae.log_likelihood(pair, x, "iwae", 25, compile=False)
    monkeypatch.setattr(likelihood, "WORTH", 1)
    with pytest.warns(UserWarning, match="log_likelihood draws eagerly, .* because it branches"):
        found = probae.log_likelihood(pair, x, "iwae", 25)
    assert torch.equal(found.values, expected.values)


# annealing

SHORT = {"num_temperatures": 4, "num_leapfrogs": 2, "num_pilot": 3}


def annealed_pair(
    prior: nn.Module, decoder: Callable[[nn.Module], nn.Module], *outputs: int
) -> probae.Autoencoder:
    encoder = probae.GaussianEncoder
    if isinstance(prior, probae.ExponentialPrior):
        encoder = probae.LogNormalEncoder
    network = probae.MLP(3, (*outputs, *X), (8,), "tanh")
    return probae.Autoencoder(prior, encoder(probae.MLP(X, (2, 3))), decoder(network))


ANNEALED: dict[str, tuple[str, Callable[[], probae.Autoencoder]]] = {
    "bernoulli": ("prior", vae),
    "gaussian": ("encoder", lambda: vae(likelihood="gaussian")),
    "laplace, categorical": (
        "prior",
        lambda: annealed_pair(probae.LaplacePrior(3), probae.CategoricalDecoder, 4),
    ),
    "student-t, discretized logistic": (
        "encoder",
        lambda: annealed_pair(probae.StudentTPrior(3), probae.DiscretizedLogisticDecoder, 2),
    ),
    "exponential, two parameters": (
        "encoder",
        lambda: annealed_pair(probae.ExponentialPrior(3), probae.HeteroscedasticGaussianDecoder, 2),
    ),
    "mixture prior": ("proposal", PAIRS["mixture prior"]),
    "flow prior": ("prior", lambda: vae(prior=probae.FlowPrior(3, transforms=1, hidden=(4,)))),
    "convolutions": ("encoder", PAIRS["convolutions"]),
    "corruption": ("encoder", PAIRS["corruption"]),
    "point code": (
        "proposal",
        lambda: probae.UndercompleteAutoencoder(X, 3, hidden=(8,), prior="normal"),
    ),
}


@pytest.mark.parametrize("name", ANNEALED)
def test_annealing_by_graphs_gives_the_same_values(
    name: str, interpreted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    # both ways two chunks of 3 data, which one graph serves, and one datum, of which it is none
    monkeypatch.setattr(annealing, "rows_in_budget", lambda pair: 6)
    torch.manual_seed(0)
    start, build = ANNEALED[name]
    pair, proposal = build().double(), None
    if start == "proposal":
        start, proposal = "prior", probae.GaussianEncoder(probae.MLP(X, (2, 3))).double()
    options = Annealing(**SHORT, start=start)
    call = partial(probae.bdmc, pair, 7, 2, annealing=options, proposal=proposal)
    expected = call(compile=False)
    assert not interpreted
    found = call(compile=True)
    assert len(interpreted) == 1
    torch.testing.assert_close(found.lower, expected.lower, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.upper, expected.upper, rtol=1e-6, atol=1e-6)


def test_annealing_in_machine_code(machine_codes: list) -> None:
    pair, x = vae().double(), binary(5).double()
    kept: list[Any] = []

    def keep(leap: annealing.Leap, inputs: list[Tensor]) -> annealing.Leap:
        kept[:] = leap, inputs
        return leap

    with frozen(pair, 0):
        annealing.anneal(pair, x, 4, Annealing(**SHORT), compiler=keep)
        leap, inputs = kept
        moves = []
        for step in (leap, compiled(leap, inputs)):
            torch.manual_seed(1)
            moves.append(annealing._move(step, inputs[0], 0.3, inputs[2], 5))
    for found, expected in zip(*moves, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    machine_codes.clear()
    call = partial(probae.log_likelihood, pair, x, "ais", 4, annealing=Annealing(**SHORT))
    found, expected = call(compile=True), call(compile=False)
    assert len(machine_codes) == 1  # for all temperatures
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.acceptance, expected.acceptance, rtol=1e-6, atol=1e-6)


def test_annealing_in_machine_code_reaches_the_exact_likelihood(
    machine_codes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annealing, "rows_in_budget", lambda pair: 16 * 8)  # two chunks
    torch.manual_seed(0)
    pair = probae.PPCA(6, 2, scale=0.7)
    x = probae.sample(pair, 16, seed=1).x
    exact = probae.log_likelihood(pair, x, "exact").values
    options = Annealing(100, num_leapfrogs=5, num_pilot=20)
    ll = probae.log_likelihood(pair, x, "ais", 16, annealing=options, compile=True)
    assert len(machine_codes) == 1
    assert ((ll.values - exact).abs() < 5 * ll.std_error + 0.05).all()
    assert (ll.std_error < 0.5).all()


def test_auto_compiles_long_annealing(interpreted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    call = partial(probae.bdmc, vae(), 5, 2, annealing=Annealing(**SHORT))
    call()
    assert not interpreted
    steps = (4 * 3 + 4) * (2 + 1)  # moves of the pilot run and of the run, with their first steps
    monkeypatch.setattr(annealing, "WORTH", steps + 1)
    call()
    assert not interpreted
    monkeypatch.setattr(annealing, "WORTH", steps)
    call()
    assert len(interpreted) == 1


def test_what_branches_on_values_is_annealed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = vae()
    pair.decoder = Branching()
    call = partial(probae.bdmc, pair, 3, 2, annealing=Annealing(**SHORT))
    with pytest.raises(CannotCompile, match=r"branches on the value .*test_graphs.py, line \d+"):
        call(compile=True)
    expected = call(compile=False)
    monkeypatch.setattr(annealing, "WORTH", 1)
    with pytest.warns(UserWarning, match="annealed eagerly, .* because it branches") as warned:
        found = call()
    assert [warning.filename for warning in warned] == [__file__]  # once for both directions
    assert torch.equal(found.lower, expected.lower)
    assert torch.equal(found.upper, expected.upper)


# what all share


@pytest.mark.parametrize("compile", ["yes", None, 1])
def test_compile_is_checked(compile: Any) -> None:
    for call in (
        partial(probae.log_likelihood, vae(), binary(), "iwae", 5),
        partial(probae.bdmc, vae(), 5),
    ):
        with pytest.raises(ValueError, match="compile must be True, False or 'auto'"):
            call(compile=compile)


def test_what_is_no_tensor_is_noticed(interpreted: list) -> None:
    calls = itertools.count()
    with pytest.raises(CannotCompile, match="gives another result 0 than the program"):
        compiled(lambda x: [x + next(calls)], [torch.ones(3)])


@pytest.mark.parametrize("made", ["interpreted", "machine code"])
def test_inputs_may_lie_otherwise_in_memory(made: str, request: pytest.FixtureRequest) -> None:
    if made == "interpreted":
        request.getfixturevalue("interpreted")
    wide = torch.rand(4, 6)
    run = compiled(lambda a, b: [a @ b + a.sum()], [torch.rand(3, 4), wide[:, 1:]])
    for a, b in (
        (torch.rand(4, 3).T, torch.rand(5, 4).T),
        (torch.rand(1, 4).expand(3, 4), torch.rand(4, 5)),
        (torch.rand(6, 4)[::2], torch.rand(4, 6)[:, 1:]),
    ):
        torch.testing.assert_close(run(a, b)[0], a @ b + a.sum())


def test_constants_are_inputs_of_machine_code(interpreted: list) -> None:
    weight = torch.randn(3, 2)
    run = compiled(lambda x: [x @ weight + x @ weight.exp()], [torch.ones(4, 3)])
    (graph,) = interpreted
    assert not list(graph.graph.find_nodes(op="get_attr"))
    x = torch.randn(4, 3)
    torch.testing.assert_close(run(x)[0], x @ weight + x @ weight.exp())


def test_noise_is_that_of_the_function(interpreted: list) -> None:
    run = compiled(lambda x: [x + torch.randn_like(x)], [torch.zeros(5)])
    torch.manual_seed(1)
    expected = torch.randn(5)
    torch.manual_seed(1)
    assert torch.equal(run(torch.zeros(5))[0], expected)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 784, 1024, 1025, 3000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_sums_of_log_sigmoids(width: int, scale: float) -> None:
    s = scale * torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    s[3:] = s[3:, :1]  # where errors do not average out
    exact = nn.functional.logsigmoid(s.double()).sum(-1)
    error = (log_sigmoid_sum(s).double() - exact).abs()
    # 2e-7 a factor, and a few roundings of the sum
    assert (error <= 2e-7 * width + 5e-7 * exact.abs()).all()
