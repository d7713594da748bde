"""How tensors lie in memory while a pair is trained, and what fused kernels make of them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import probae
from probae.layout import laid_out, lay_out_state, set_gradients

COMPILE = pytest.mark.parametrize("compile", [False, True])


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
    """An objective that looks at the weights as one vector."""

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
