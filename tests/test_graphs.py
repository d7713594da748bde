"""Functions as machine code: the same numbers, no constants of its own, honest refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import probae
from probae import fast_weights, graphs, likelihood
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
    fast_weights._compiled_sum.cache_clear()
    yield made
    fast_weights._compiled_sum.cache_clear()


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
    fast_weights._compiled_sum.cache_clear()
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


@pytest.mark.parametrize("compile", ["yes", None, 1])
def test_compile_is_checked(compile: Any) -> None:
    with pytest.raises(ValueError, match="compile must be True, False or 'auto'"):
        probae.log_likelihood(vae(), binary(), "iwae", 5, compile=compile)


def test_what_is_no_tensor_is_noticed(interpreted: list) -> None:
    calls = itertools.count()
    with pytest.raises(CannotCompile, match="gives another result 0 than the program"):
        compiled(lambda x: [x + next(calls)], [torch.ones(3)])


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
    exact = nn.functional.logsigmoid(s.double()).sum(-1)
    error = (log_sigmoid_sum(s).double() - exact).abs()
    # 2e-7 a factor, and a few roundings of the sum
    assert (error <= 3e-7 * width + 5e-7 * exact.abs()).all()
