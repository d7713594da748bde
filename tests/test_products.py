"""Products of matrices in machine code, of all shapes and layouts, against those in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import probae
from probae import precision
from probae.graphs import machine_code, record

products = pytest.importorskip("probae.products")

SIZES = [  # M, K, N: of layers, by one, around the sides of blocks, and of more than one block
    (128, 784, 400),
    (400, 128, 40),
    (1, 5, 7),
    (7, 5, 1),
    (5, 1, 7),
    (1, 1, 1),
    (15, 16, 17),
    (33, 31, 65),
    (37, 2050, 53),
    (600, 1030, 34),
    (3, 17, 1000),
    (0, 3, 4),
    (3, 0, 4),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Return the shapes of the products that are multiplied by blocks."""
    seen: list[tuple[int, ...]] = []

    class Counted(products.Product):
        def codegen(self, wrapper: object) -> None:
            a, b = self.inputs
            seen.append(tuple(map(int, (*a.get_size(), b.get_size()[1]))))
            super().codegen(wrapper)

    monkeypatch.setattr(products, "Product", Counted)
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield seen


def matrices() -> list[tuple[Tensor, Tensor]]:
    """Return factors that lie by rows and by columns, and otherwise."""
    torch.manual_seed(0)
    pairs = []
    for m, k, n in SIZES:
        for a_columns, b_columns in itertools.product((False, True), repeat=2):
            a = torch.randn(k, m).t() if a_columns else torch.randn(m, k)
            b = torch.randn(n, k).t() if b_columns else torch.randn(k, n)
            pairs.append((a, b))
    wide, tall = torch.randn(40, 90), torch.randn(60, 50)
    pairs += [
        (wide[3:, 7:67], tall),  # rows farther apart than they are long
        (wide[3:, 7:67], tall[:, 20:37]),
        (wide.t()[7:67, 5:], tall[10:45]),
        (wide[:, ::2], tall[:45]),  # neither rows nor columns in one piece
        (torch.randn(1, 60).expand(33, 60), tall),  # the same row again and again
        (torch.randn(60).expand(33, 60), tall.t()[:, :].t()),
        (torch.randn(33, 1).expand(33, 60), tall),
    ]
    return pairs


def multiplied(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    inputs = [matrix for pair in pairs for matrix in pair]

    def function(*inputs: Tensor) -> list[Tensor]:
        return [torch.mm(a, b) for a, b in zip(inputs[::2], inputs[1::2], strict=True)]

    run = machine_code(record(function, inputs), inputs)
    return [result.clone() for result in run(*inputs)]


def assert_float32(pairs: list[tuple[Tensor, Tensor]], results: list[Tensor]) -> None:
    assert len(results) == len(pairs) > 0
    for (a, b), result in zip(pairs, results, strict=True):
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert result.dtype is torch.float32
        assert result.shape == exact.shape
        # a sum of K products loses less than K units in the last place of its terms
        error = (result - exact).abs()
        assert (error <= max(1, a.shape[1]) * 2**-24 * size).all(), (a.shape, b.shape)


@pytest.mark.parametrize("number", [1, 2, 3, 16])
def test_products_in_machine_code_are_those_of_float64(
    number: int, calls: list[tuple[int, ...]]
) -> None:
    torch.set_num_threads(number)
    pairs = matrices()
    assert_float32(pairs, multiplied(pairs))
    assert len(calls) > len(pairs) / 2  # others are sums of a single product


def test_products_without_onednn_in_machine_code(calls: list[tuple[int, ...]]) -> None:
    pairs = matrices()[:8]
    inputs = [matrix for pair in pairs for matrix in pair]

    def function(*inputs: Tensor) -> list[Tensor]:
        return [torch.mm(a, b) for a, b in zip(inputs[::2], inputs[1::2], strict=True)]

    run = machine_code(record(function, inputs), inputs)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_float32(pairs, run(*inputs))
        torch_products = [a @ b for a, b in pairs]
        assert all(map(torch.equal, run(*inputs), torch_products))  # it is torch that multiplies
    assert len(calls) == len(pairs)
    assert_float32(pairs, run(*inputs))


def test_a_lower_precision_chosen_by_the_user_is_torchs_in_machine_code(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(40, 30), torch.randn(30, 20)
    monkeypatch.setattr(products, "products_are_float32", lambda: False)
    assert_float32([(a, b)], multiplied([(a, b)]))  # by torch, on a chip without AMX
    assert calls == []


@pytest.mark.parametrize(("chosen", "exact"), [("highest", True), ("high", False)])
def test_whether_products_are_float32_is_asked_of_the_chip_where_less_is_chosen(
    chosen: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "setting", lambda: chosen)
    for keeps in (True, False):
        monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda keeps=keeps: keeps)
        assert precision.products_are_float32() == (exact or keeps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_of_other_numbers_are_torchs_in_machine_code(
    dtype: torch.dtype, calls: list[tuple[int, ...]]
) -> None:
    a, b = torch.randn(40, 30, dtype=dtype), torch.randn(30, 20, dtype=dtype)
    torch.testing.assert_close(multiplied([(a, b)])[0], a @ b)
    assert calls == []


def test_a_compiled_step_multiplies_by_blocks_in_machine_code(
    calls: list[tuple[int, ...]],
) -> None:
    torch.manual_seed(0)
    pair, x = probae.VAE(12, 3, hidden=(9,)), torch.rand(64, 12).round()
    run = probae.fit(pair, x, epochs=2, batch_size=16, compile=True, progress=False)
    assert run.eager_because == ""
    # of four layers, forth, and back to weights and, but for the first, to activations
    assert sorted({tuple(sorted(shape)) for shape in calls}) == [
        (3, 9, 16),
        (6, 9, 16),
        (9, 12, 16),
    ]
    assert len(calls) == 11
