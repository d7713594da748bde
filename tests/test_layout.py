"""How tensors lie in memory while a pair is trained, and what fused kernels make of them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

import probae
from probae.layout import laid_out, lay_out_state, set_gradients, weights_transposed


def layers() -> nn.Module:
    """Return linear layers, of which two share a weight and one computes its own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(5, 3))
    module[3].weight = module[2].weight
    module.append(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    return module


def test_weights_lie_transposed_inside_and_as_before_after() -> None:
    module = layers()
    x, before = torch.randn(7, 3), copy.deepcopy(module.state_dict())
    memory = module[0].weight.data_ptr()
    with weights_transposed(module):
        assert module[0].weight.stride() == (1, 5)
        assert module[2].weight is module[3].weight
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
        module[:2](x).sum().backward()
        with torch.no_grad():
            module[0].weight[1, 2] = 7.0
    assert module[0].weight.is_contiguous()
    assert module[0].weight.data_ptr() == memory
    assert module[0].weight[1, 2] == 7.0  # what was done inside stays
    assert module[0].weight.grad.is_contiguous()


def test_weights_lie_as_before_after_an_error() -> None:
    module = layers()
    with pytest.raises(KeyError), weights_transposed(module):
        raise KeyError
    assert all(p.is_contiguous() for p in module.parameters())


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


@pytest.mark.parametrize("compile", [False, True])
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


def test_training_by_pyro_goes_on_after_fit() -> None:
    # whose store trains copies of parameters that are not contiguous
    import pyro

    x = torch.rand(64, 6).round()
    pair = probae.VAE(6, 2, hidden=(5,))
    probae.fit(pair, x, epochs=2, progress=False)
    before = copy.deepcopy(pair.state_dict())
    pyro.clear_param_store()
    adam = pyro.optim.Adam({"lr": 1e-2})
    pyro.infer.SVI(pair.model, pair.guide, adam, pyro.infer.Trace_ELBO()).step(x)
    assert not any(torch.equal(p, before[name]) for name, p in pair.named_parameters())
