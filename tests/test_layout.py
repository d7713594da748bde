"""How tensors lie in memory while a pair is trained, and what fused kernels make of them."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import probae
from probae.layout import PackTheSmaller, laid_out, lay_out_state, set_gradients, weights_transposed

COMPILE = pytest.mark.parametrize("compile", [False, True])


def layers() -> nn.Module:
    """Return perceptrons: two share a layer, one computes its weight, two share memory."""
    torch.manual_seed(0)
    first, second, third, fourth = (probae.MLP(3, 3, hidden=(5,)) for _ in range(4))
    second.layers[2] = first.layers[2]
    third.layers[0] = nn.utils.parametrizations.weight_norm(third.layers[0])
    fourth.layers[2].weight = nn.Parameter(fourth.layers[0].weight.detach().t())
    return nn.Sequential(first, second, third, fourth, nn.Linear(3, 2))


def test_weights_lie_transposed_inside_and_as_before_after() -> None:
    module = layers()
    x, before = torch.randn(7, 3), copy.deepcopy(module.state_dict())
    weight = module[0].layers[0].weight
    memory = weight.data_ptr()
    with weights_transposed(module):
        assert weight.stride() == (1, 5)
        assert module[0].layers[2].weight is module[1].layers[2].weight
        assert module[0].layers[2].weight.stride() == (1, 3)
        assert module[3].layers[0].weight.is_contiguous()  # memory that two have stays
        assert module[4].weight.is_contiguous()  # a network of a user's own, too
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        module(x).sum().backward()
        with torch.no_grad():
            weight[1, 2] = 7.0
    assert weight.is_contiguous()
    assert weight.data_ptr() == memory
    assert weight[1, 2] == 7.0  # what was done inside stays
    assert weight.grad is not None
    assert weight.grad.is_contiguous()
    tied = module[3].layers
    assert tied[0].weight.data_ptr() == tied[2].weight.data_ptr()


def test_weights_lie_as_before_after_an_error() -> None:
    module = layers()
    before = [p.stride() for p in module.parameters()]
    with pytest.raises(KeyError), weights_transposed(module):
        raise KeyError
    assert [p.stride() for p in module.parameters()] == before


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_meet_gradients_and_state_as_parameters_lie(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    gradient = torch.randn(4, 6)
    ends = []
    for fused in (True, False):
        p = nn.Parameter(torch.ones(4, 6))
        p.data = laid_out(p.data, (1, 4))
        optim = optimizer([p], lr=0.1, fused=fused)
        for _ in range(3):
            set_gradients([p], [gradient])
            assert p.grad is not None
            assert p.grad.stride() == p.stride()
            optim.step()
            state = {k: t.contiguous() for k, t in optim.state[p].items() if t is not None}
            optim.state[p].update(state)  # as from a checkpoint
            lay_out_state(optim)
        ends.append(p.detach())
    torch.testing.assert_close(ends[0], ends[1])
    set_gradients([p], [None])
    assert p.grad is None


@COMPILE
@pytest.mark.parametrize("fused", [False, True])
def test_fit_trains_the_same_by_fused_optimizers_and_others(compile: bool, fused: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 12).double()
    pair = probae.UndercompleteAutoencoder(12, 3, hidden=(8,)).double()
    before = copy.deepcopy(pair)
    for trained, how in ((pair, fused), (before, False)):
        make = partial(torch.optim.SGD, momentum=0.9, fused=how)
        torch.manual_seed(1)
        probae.fit(
            trained, x, epochs=3, batch_size=16, lr=1e-2, optimizer=make, progress=False,
            compile=compile and trained is pair,
        )  # fmt: skip
    for p, q in zip(pair.parameters(), before.parameters(), strict=True):
        assert p.is_contiguous()
        torch.testing.assert_close(p, q)


@COMPILE
def test_weights_that_share_memory_stay_tied(compile: bool) -> None:
    x = torch.rand(64, 6).round()
    pair = probae.UndercompleteAutoencoder(6, 2, hidden=(5,))
    encoder, decoder = pair.encoder.network.layers[0], pair.decoder.network.layers[2]
    decoder.weight = nn.Parameter(encoder.weight.detach().t())
    run = probae.fit(pair, x, epochs=3, batch_size=16, progress=False, compile=compile)
    assert torch.equal(decoder.weight, encoder.weight.t())
    ends = probae.monitoring.measure(pair, x)  # of what is returned
    assert ends["elbo"] == pytest.approx(run.history["elbo"][-1], rel=1e-5)


@COMPILE
def test_the_state_of_an_optimizer_of_a_users_own_lies_as_its_parameters(compile: bool) -> None:
    x = torch.rand(64, 6).double().round()
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        pair = probae.VAE(6, 2, hidden=(5,)).double()
        optim = torch.optim.Adam(pair.parameters(), lr=0.01, fused=fused)

        def steps(pair: Any = pair, optim: Any = optim) -> None:
            for _ in range(3):
                optim.zero_grad()
                probae.ELBO().differentiable_loss(pair.model, pair.guide, x).backward()
                optim.step()

        steps()
        probae.fit(
            pair, x, epochs=2, batch_size=16, seed=1, optimizer=lambda p, lr, o=optim: o,
            progress=False, compile=compile and fused,
        )  # fmt: skip
        assert {float(state["step"]) for state in optim.state.values()} == {11.0}
        steps()
        ends.append([p.detach() for p in pair.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)


class Decayed(probae.ELBO):
    """An objective that looks at the weights as one vector, which transposed ones are not."""

    pair: Any = None

    def differentiable_loss(self, *args: Any, **keywords: Any) -> torch.Tensor:
        weights = nn.utils.parameters_to_vector(self.pair.parameters())
        return super().differentiable_loss(*args, **keywords) + weights.square().sum()


@COMPILE
def test_an_objective_may_flatten_weights(compile: bool) -> None:
    objective = Decayed()
    objective.pair = pair = probae.VAE(6, 2, hidden=(5,))
    keywords: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
    probae.fit(pair, torch.rand(64, 6).round(), objective=objective, compile=compile, **keywords)


@COMPILE
def test_training_by_pyro_goes_on_after_fit(compile: bool) -> None:
    # whose store trains copies of parameters that are not contiguous
    import pyro

    x = torch.rand(64, 6).round()
    pair = probae.VAE(6, 2, hidden=(5,))
    probae.fit(pair, x, epochs=2, batch_size=16, progress=False, compile=compile)
    before = copy.deepcopy(pair.state_dict())
    pyro.clear_param_store()
    adam = pyro.optim.Adam({"lr": 1e-2})
    pyro.infer.SVI(pair.model, pair.guide, adam, pyro.infer.Trace_ELBO()).step(x)
    assert not any(torch.equal(p, before[name]) for name, p in pair.named_parameters())


def test_weights_lie_as_usual_in_eager_steps_and_where_compiling_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, seen = probae.VAE(6, 2, hidden=(5,)), []
    step = torch.optim.Adam.step

    def noted(optim: torch.optim.Adam, *args: Any, **keywords: Any) -> Any:
        seen.append(pair.encoder.network.layers[0].weight.is_contiguous())
        return step(optim, *args, **keywords)

    def fails(*args: Any) -> None:
        raise probae.graphs.CannotCompile("there is no compiler")

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    monkeypatch.setattr(probae.compiling, "machine_code", fails)
    monkeypatch.setattr(probae.compiling, "WORTH", 0.0)
    x = torch.rand(64, 6).round()
    for compile in (False, "auto"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            run = probae.fit(pair, x, epochs=1, batch_size=16, progress=False, compile=compile)
        assert run.eager_because
    assert seen == [True] * 8


def test_products_of_which_the_larger_factor_would_be_packed_are_swapped() -> None:
    torch.manual_seed(0)
    swapped = 0
    for a in (torch.randn(4, 5), torch.randn(5, 4).t()):
        for b in (
            torch.randn(5, 9),
            torch.randn(9, 5).t(),
            torch.randn(5, 3),
            torch.randn(3, 5).t(),
        ):
            with PackTheSmaller():
                product = a @ b
            torch.testing.assert_close(product, a @ b)
            swapped += not product.is_contiguous()
    assert swapped == 1  # rows times columns, the larger on the right
