"""Products in bfloat16, and nothing else in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import probae
from probae import precision as module
from probae.precision import products_in, require_precision

SHAPES = [
    (lambda: nn.Linear(6, 5), (4, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    (lambda: nn.Conv1d(2, 3, 3), (4, 2, 7)),
    (lambda: nn.Conv2d(2, 3, 3, stride=2), (4, 2, 7, 7)),
    (lambda: nn.ConvTranspose2d(2, 3, 3), (4, 2, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), SHAPES)
def test_a_layer_multiplies_in_bfloat16_and_returns_float32(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    with products_in("bf16"):
        y = layer(x)
    y.square().sum().backward()
    products = make().bfloat16()
    products.load_state_dict({k: v.bfloat16() for k, v in layer.state_dict().items()})
    products.bias = None
    expected = products(x.bfloat16()).float()
    if layer.bias is not None:
        expected = expected + layer.bias.unflatten(0, (-1, *[1] * (layer.weight.dim() - 2)))
    assert y.dtype is torch.float32
    assert torch.equal(y, expected)
    assert not torch.equal(y, layer(x))
    assert torch.allclose(y, layer(x), atol=0.05)
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}


def test_float32_changes_nothing() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    with products_in("float32"):
        assert torch.equal(layer(x), x @ layer.weight.T + layer.bias)


def test_arguments_may_be_named() -> None:
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    with products_in("bf16"):
        y = nn.functional.linear(input=x, weight=weight)
        assert torch.equal(y, nn.functional.linear(x, weight))
    assert not torch.equal(y, nn.functional.linear(x, weight))


def test_training_keeps_parameters_in_float32() -> None:
    x = torch.rand(40, 6).round()
    losses = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        pair = probae.VAE(6, 2, hidden=(5,))
        run = probae.fit(pair, x, epochs=3, batch_size=8, precision=precision, progress=False)
        losses.append(run.history["loss"])
        assert {p.dtype for p in pair.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_densities_stay_in_float32() -> None:
    torch.manual_seed(0)
    pair, x = probae.VAE(784, 5), torch.rand(7, 784).round()
    with products_in("bf16"), torch.no_grad():
        decoder = pair.decoder(torch.randn(7, 5))
        values = decoder.log_prob(x)
        logits = decoder.base_dist.logits
        loss = probae.ELBO().differentiable_loss(pair.model, pair.guide, x)
    assert values.dtype is torch.float32
    assert loss.dtype is torch.float32
    exact = torch.distributions.Bernoulli(logits=logits.double()).log_prob(x.double()).sum(-1)
    assert torch.allclose(values.double(), exact, rtol=1e-6)  # in bfloat16: 4e-3


def test_what_a_float64_layer_multiplies_is_left_alone() -> None:
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    with products_in("bf16"):
        y = layer(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("precision", ["half", 16, None, torch.bfloat16, True])
def test_an_unknown_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match="precision must be 'float32' or 'bf16', got"):
        require_precision(precision, torch.float32)


def test_a_pair_of_other_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 parameters, got torch.float64; call pair.float"):
        require_precision("bf16", torch.float64)
    require_precision("float32", torch.float64)


def test_float32_products_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    a = torch.randn(300, 200)
    exact = a.double() @ a.double().T
    with module.float32_products(cpu):
        assert ((a @ a.T) - exact).norm() < 1e-5 * exact.norm()
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(module, "_onednn_keeps_float32", lambda: False)
    with module.float32_products(cpu):
        assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(module, "_onednn_keeps_float32", lambda: True)
    with module.float32_products(cpu):
        assert torch.get_float32_matmul_precision() == "medium"
    with module.float32_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
    try:
        torch.set_float32_matmul_precision("high")
        with module.float32_products(cpu):
            assert torch.get_float32_matmul_precision() == "high"  # the user's choice
    finally:
        torch.set_float32_matmul_precision("highest")
