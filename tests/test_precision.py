"""Products in bfloat16, and nothing else in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import probae
from probae import precision as module
from probae import training
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


NEWER = module.MATMUL is not None  # torch has settings of single backends
FAST = "bf16" if NEWER else "medium"
BACKENDS: dict[str, Any] = {}
if NEWER:
    BACKENDS = {
        "all": torch.backends,
        "mkldnn": module.MATMUL,
        "cuda": torch.backends.cuda.matmul,
    }


def chooses(backend: Any, value: str) -> Callable[[], None]:
    return lambda: setattr(backend, "fp32_precision", value)


CHOICES = {
    "nothing": lambda: None,
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
if NEWER:
    CHOICES |= {
        f"{name} {value}": chooses(backend, value)
        for name, backend in BACKENDS.items()
        for value in ("ieee", "tf32", "bf16")
        if (name, value) != ("cuda", "bf16")
    }
KEEPS_LOWER = ("high", "medium", "all ieee", "all tf32", "all bf16", "mkldnn tf32", "mkldnn bf16")
CPU = torch.device("cpu")


def readings() -> list[str]:
    try:
        legacy = [torch.get_float32_matmul_precision()]
    except RuntimeError:
        legacy = ["mixed"]
    return legacy + [backend.fp32_precision for backend in BACKENDS.values()]


def responses() -> list[list[str]]:
    """Read all settings under each global one: those that inherit it change with it."""
    values = [readings()]
    if NEWER:
        before = torch.backends.fp32_precision
        for value in ("ieee", "tf32", "bf16", before):
            torch.backends.fp32_precision = value
            values.append(readings())
    return values


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_onednn_keeps_float32", lambda: True)
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS.values():
        backend.fp32_precision = "none"


def test_float32_products_stay_float32() -> None:
    a = torch.randn(300, 200)
    exact = a.double() @ a.double().T
    before = readings()
    with module.float32_products(CPU):
        assert ((a @ a.T) - exact).norm() < 1e-5 * exact.norm()
    assert readings() == before


def test_float32_products_ask_onednn_where_it_is_as_exact(
    monkeypatch: pytest.MonkeyPatch, settings: None
) -> None:
    default = module.setting()
    with module.float32_products(CPU):
        assert module.setting() == FAST
    with module.float32_products(torch.device("cuda")):
        assert module.setting() == default
    monkeypatch.setattr(module, "_onednn_keeps_float32", lambda: False)
    with module.float32_products(CPU):
        assert module.setting() == default


@pytest.mark.skipif(not NEWER, reason="needs settings of single backends")
def test_the_setting_of_onednn_alone_gives_the_products_of_medium(settings: None) -> None:
    a, b = torch.randn(300, 784), torch.randn(784, 400)
    with module.float32_products(CPU):
        product = a @ b
        assert torch.backends.cuda.matmul.fp32_precision == "none"
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(product, a @ b)


@pytest.mark.parametrize("choice", CHOICES)
def test_float32_products_leave_all_settings_as_they_were(choice: str, settings: None) -> None:
    CHOICES[choice]()
    before, chosen = responses(), module.setting()
    inside = chosen if choice in KEEPS_LOWER else FAST
    with module.float32_products(CPU):
        assert module.setting() == inside
        with pytest.raises(ZeroDivisionError, match=inside), module.float32_products(CPU):
            raise ZeroDivisionError(module.setting())
        assert module.setting() == inside
    assert responses() == before


@pytest.mark.parametrize("choice", CHOICES)
def test_pairs_can_be_trained_and_evaluated_under_each_setting(
    choice: str, settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LARGE", 0)
    CHOICES[choice]()
    before, x = readings(), torch.ones(8, 6)
    pair = probae.VAE(6, 2, hidden=(5,))
    probae.fit(pair, x, epochs=1, batch_size=4, progress=False)
    with pytest.warns(probae.LikelihoodWarning):
        probae.log_likelihood(pair, x, num_samples=5)
    assert readings() == before


def test_without_settings_of_single_backends_the_older_one_is_used(
    settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MATMUL", None)
    with module.float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "medium"
        with module.float32_products(CPU):
            pass
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    with module.float32_products(CPU):
        assert torch.get_float32_matmul_precision() == "high"
