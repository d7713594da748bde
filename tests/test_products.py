"""Products of matrices in machine code, of all shapes and layouts, against those in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import probae
from probae import graphs, precision, products
from probae.graphs import machine_code, record

BY_BLOCKS = pytest.mark.skipif(
    not products.has_microkernel(), reason="no float32 microkernel on this chip, or in this torch"
)

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
    (50, 20, 530),
    (40, 3, 5000),
    (5000, 3, 40),
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
    """Return the shapes of the products of which the code is ours, not Inductor's."""
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
        (wide[:, ::2], tall[:45]),  # neither rows nor columns in one piece: copied before
        (torch.randn(1, 60).expand(33, 60), tall),  # the same row again and again
        (torch.randn(60).expand(33, 60), tall.t()[:, :].t()),
        (torch.randn(33, 1).expand(33, 60), tall),
    ]
    return pairs


def compiled(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], list[Tensor]]:
    """Return machine code that multiplies the matrices of each pair."""
    inputs = [matrix for pair in pairs for matrix in pair]

    def function(*inputs: Tensor) -> list[Tensor]:
        return [torch.mm(a, b) for a, b in zip(inputs[::2], inputs[1::2], strict=True)]

    return partial(machine_code(record(function, inputs), inputs), *inputs)


def assert_float32(pairs: list[tuple[Tensor, Tensor]], results: list[Tensor]) -> None:
    assert len(results) == len(pairs) > 0
    for (a, b), result in zip(pairs, results, strict=True):
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert result.dtype is torch.float32
        assert result.shape == exact.shape
        # each of K roundings is half a unit at most, and they do not all go one way
        assert ((result - exact).abs() <= (2 + a.shape[1] ** 0.5) * 2**-24 * size).all(), a.shape


@BY_BLOCKS
@pytest.mark.parametrize("number", [1, 2, 3, 16])
def test_products_in_machine_code_are_those_of_float64(
    number: int, calls: list[tuple[int, ...]]
) -> None:
    torch.set_num_threads(number)
    pairs = matrices()
    assert_float32(pairs, compiled(pairs)())
    assert len(calls) > len(pairs) / 2  # the others are no sums, or sums of a single product


@BY_BLOCKS
def test_torch_multiplies_in_machine_code_without_onednn_alone(
    calls: list[tuple[int, ...]],
) -> None:
    pairs = matrices()[:8]
    run = compiled(pairs)
    with torch.backends.mkldnn.flags(enabled=False):
        assert all(torch.equal(c, a @ b) for c, (a, b) in zip(run(), pairs, strict=True))
        assert_float32(pairs, run())
        theirs = run()
    assert_float32(pairs, run())
    # other sums of 784 numbers are rounded otherwise
    assert not any(map(torch.equal, run()[:4], theirs[:4]))
    assert len(calls) == 8


@BY_BLOCKS
def test_products_in_machine_code_take_the_threads_of_the_moment(
    calls: list[tuple[int, ...]],
) -> None:
    pairs = matrices()[:8]
    run = compiled(pairs)
    for number in (1, 5, 2):
        torch.set_num_threads(number)
        assert_float32(pairs, run())
    assert len(calls) == 8


def _of_concatenated(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    left, right = x.exp() @ w, (x + 1) @ w
    both = torch.cat([left, right], 1)
    return [both, both @ v, left @ v[:24], torch.cat([left, right]).t() @ both[:1].expand(128, 48)]


def _of_views(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    h = (x @ w).sigmoid()
    return [h[:, 3:20] @ v[:17], h[5:].t() @ h[5:], h.t()[4:9] @ h, h[2:9, 1:].t() @ x[2:9]]


def _of_what_changes(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    first = x.t() @ (x @ w)
    w.copy_(w - 0.01 * first)
    second = x @ w
    x[3:7].copy_(second[:4, :1].expand(4, 50))
    return [second, x @ w, x[3:] @ w, x.t() @ second]


def _of_themselves(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    return [x @ x.t(), x.t() @ x, (x @ x.t()) @ (x @ x.t())]


def _of_products(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
    h = x
    for _ in range(5):
        h = ((h @ w) @ w.t()).tanh()
    return [h, h.t() @ x, h[1:], (h @ w).t()]


@pytest.mark.parametrize("in_one_block", [False, True])
@pytest.mark.parametrize(
    "program", [_of_concatenated, _of_views, _of_what_changes, _of_themselves, _of_products]
)
def test_products_in_machine_code_find_their_factors(
    program: Callable[..., list[Tensor]], in_one_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LARGE", 0 if in_one_block else 2**40)  # how memory is planned
    torch.manual_seed(0)
    inputs = [torch.randn(66, 50)[2:], torch.randn(50, 24), torch.randn(48, 33)]
    run = machine_code(record(program, [t.clone() for t in inputs]), [t.clone() for t in inputs])
    for _ in range(2):  # memory of before is there again
        ours, theirs = ([t.clone() for t in inputs] for _ in range(2))
        torch.testing.assert_close(run(*ours), program(*theirs), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_without_a_microkernel_torch_multiplies_in_machine_code(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_microkernel", lambda: False)
    a, b = torch.randn(40, 30), torch.randn(30, 20)
    torch.testing.assert_close(compiled([(a, b)])()[0], a @ b)
    assert calls == []


def test_a_lower_precision_chosen_by_the_user_is_torchs_in_machine_code(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_onednn_keeps_float32", lambda: False)  # as with AMX
    monkeypatch.setattr(precision, "setting", lambda: "bf16")
    a, b = torch.randn(40, 30), torch.randn(30, 20)
    torch.testing.assert_close(compiled([(a, b)])()[0], a @ b)
    assert calls == []


@pytest.mark.parametrize(
    ("chosen", "exact"), [("highest", True), ("none", True), ("high", False), ("bf16", False)]
)
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
    torch.testing.assert_close(compiled([(a, b)])()[0], a @ b)
    assert calls == []


def test_inductor_multiplies_as_before_after_machine_code() -> None:
    from torch._inductor.lowering import lowerings

    before = dict(lowerings)
    compiled([(torch.randn(40, 30), torch.randn(30, 20))])
    with pytest.raises(KeyError), products.by_blocks():
        raise KeyError
    assert all(lowerings[op] is before[op] for op in before)


@BY_BLOCKS
def test_a_compiled_step_multiplies_by_blocks_in_machine_code(
    calls: list[tuple[int, ...]],
) -> None:
    torch.manual_seed(0)
    pair, x = probae.VAE(12, 3, hidden=(9,)), torch.rand(64, 12).round()
    run = probae.fit(pair, x, epochs=2, batch_size=16, compile=True, progress=False)
    assert run.eager_because == ""
    # of four layers, forth, and back to weights and, but for the first, to activations
    assert {tuple(sorted(shape)) for shape in calls} == {(3, 9, 16), (6, 9, 16), (9, 12, 16)}
    assert len(calls) == 11
