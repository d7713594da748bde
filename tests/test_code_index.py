"""The index over codes: both backends against brute force, also where codes are equally near."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import probae
from probae import CodeIndex, code_index, pack_codes

BACKENDS = ["sklearn", "faiss"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="needs the extra probae[faiss]")
    return request.param


def bits(n: int, k: int) -> Tensor:
    return torch.rand(n, k) < 0.5


def exact(queries: Tensor, codes: Tensor, metric: str) -> Tensor:
    """All distances (Q, N), by the definition."""
    a, b = queries[:, None], codes[None]
    if metric == "hamming":
        return (a != b).sum(-1).int()
    a, b = a.double(), b.double()
    if metric == "cosine":
        a, b = (v / v.norm(dim=-1, keepdim=True) for v in (a, b))
        return ((a - b) ** 2).sum(-1) / 2
    return ((a - b) ** 2).sum(-1).sqrt()


def ranked(distance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    order = distance.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 3), (8, 7), (20, 50), (64, 10), (65, 300)])
def test_nearest_bits_are_those_of_brute_force_ties_in_their_order(
    backend: str, size: int, k: int
) -> None:
    codes, queries = bits(300, size), bits(40, size)  # few bits: nearly all distances are tied
    index = CodeIndex(codes, backend=backend)
    distances, indices = index.search(queries, k)
    expected = ranked(exact(queries, codes, "hamming"), k)
    assert (distances.dtype, indices.dtype) == (torch.int32, torch.int64)
    assert torch.equal(distances, expected[0])
    assert torch.equal(indices, expected[1])
    again = CodeIndex(pack_codes(codes).numpy(), backend=backend).search(pack_codes(queries), k)
    assert torch.equal(again.indices, indices)


@pytest.mark.parametrize("radius", [0, 1, 3, 12, 10**9])
def test_the_ball_holds_all_within_the_radius(backend: str, radius: int) -> None:
    codes, queries = bits(200, 12), bits(30, 12)
    distance = exact(queries, codes, "hamming")
    ball = CodeIndex(codes, backend=backend).within(queries, radius)
    assert torch.equal(ball.counts, (distance <= radius).sum(1))
    assert (ball.distances.dtype, ball.indices.dtype) == (torch.int32, torch.int64)
    for i, (d, j) in enumerate(
        zip(
            ball.distances.split(ball.counts.tolist()),
            ball.indices.split(ball.counts.tolist()),
            strict=True,
        )
    ):
        expected = ranked(distance[i : i + 1], int(ball.counts[i]))
        assert torch.equal(d, expected[0][0])
        assert torch.equal(j, expected[1][0])


def test_a_ball_may_be_empty(backend: str) -> None:
    ball = CodeIndex(torch.ones(3, 8).bool(), backend=backend).within(torch.zeros(2, 8).bool(), 7)
    assert ball.counts.tolist() == [0, 0]
    assert ball.indices.shape == ball.distances.shape == (0,)
    ball = CodeIndex(torch.ones(3, 2), "l2", backend).within(torch.zeros(2, 2), 1.0)
    assert ball.counts.tolist() == [0, 0]
    assert ball.indices.shape == ball.distances.shape == (0,)


# ---- real codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 10, 290])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_codes_are_those_of_brute_force(
    backend: str, metric: str, k: int, dtype: torch.dtype
) -> None:
    codes, queries = torch.randn(300, 7, dtype=dtype), torch.randn(40, 7, dtype=dtype)
    distances, indices = CodeIndex(codes, metric, backend).search(queries.numpy(), k)
    expected = ranked(exact(queries, codes, metric), k)
    assert distances.dtype == torch.float64
    assert torch.equal(indices, expected[1])
    assert torch.allclose(distances, expected[0], atol=1e-12)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equal_codes_come_in_their_order(backend: str, metric: str) -> None:
    # each code 50 times, more often than the candidates beyond k: nothing but ties at the end
    codes = torch.randn(6, 3).repeat(50, 1)
    queries = torch.randn(20, 3)
    indices = CodeIndex(codes, metric, backend).search(queries, 10).indices
    for i, nearest in enumerate(ranked(exact(queries, codes, metric), 1)[1][:, 0]):
        assert indices[i].tolist() == [int(nearest) % 6 + 6 * copy for copy in range(10)]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_codes_far_from_zero_are_told_apart(backend: str, metric: str) -> None:
    # float32 would round |a|² + |b|² - 2ab to multiples of 0.06
    codes, queries = 1000 + torch.rand(500, 4).double(), 1000 + torch.rand(20, 4).double()
    indices = CodeIndex(codes, metric, backend).search(queries, 5).indices
    assert torch.equal(indices, ranked(exact(queries, codes, metric), 5)[1])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_codes_of_any_size_are_told_apart(backend: str, metric: str, scale: float) -> None:
    codes, queries = torch.randn(100, 4).double(), torch.randn(20, 4).double()
    expected = ranked(exact(queries, codes, metric), 5)[1]
    index = CodeIndex(scale * codes, metric, backend)
    assert torch.equal(index.search(scale * queries, 5).indices, expected)
    radius = scale if metric == "l2" else 0.1
    inside = exact(queries, codes, metric) <= (1.0 if metric == "l2" else 0.1)
    assert torch.equal(index.within(scale * queries, radius).counts, inside.sum(1))
    far = CodeIndex(codes, "l2", backend).search(1e30 * queries, 100)  # all as good as equally far
    assert torch.equal(far.indices.sort(1).values, torch.arange(100).expand(20, -1))
    few = CodeIndex(codes, "l2", backend).search(1e30 * queries, 3)
    assert torch.equal(few.indices, far.indices[:, :3])


@pytest.mark.parametrize(("metric", "radius"), [("l2", 1.5), ("cosine", 0.2)])
def test_the_ball_of_real_codes(backend: str, metric: str, radius: float) -> None:
    codes, queries = torch.randn(200, 3), torch.randn(30, 3)
    distance = exact(queries, codes, metric)
    ball = CodeIndex(codes, metric, backend).within(queries, radius)
    assert torch.equal(ball.counts, (distance <= radius).sum(1))
    assert (ball.distances <= radius).all()
    expected = [i for row in distance for i in row.argsort() if row[i] <= radius]
    assert ball.indices.tolist() == [int(i) for i in expected]
    # a code within a radius of 0 of itself
    itself = CodeIndex(codes, "l2", backend).within(codes, 0.0)
    assert torch.equal(itself.indices, torch.arange(200))


def test_blocks_do_not_change_what_is_found(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, queries = torch.randn(100, 5).repeat(2, 1), torch.randn(30, 5)
    index = CodeIndex(codes, "l2", backend)
    whole, ball = index.search(queries, 25), index.within(queries, 1.0)
    monkeypatch.setattr(code_index, "BLOCK", 1)
    for a, b in zip(whole, index.search(queries, 25), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ball, index.within(queries, 1.0), strict=True):
        assert torch.equal(a, b)


def test_an_index_keeps_its_codes(backend: str) -> None:
    codes = torch.randn(20, 3)
    before = codes.clone()
    index = CodeIndex(codes, "l2", backend)
    index.search(codes, 2)
    assert torch.equal(codes, before)
    codes.zero_()  # the owner's business
    assert torch.equal(index.search(before, 1).indices[:, 0], torch.arange(20))
    assert len(index) == 20
    assert repr(index) == f"CodeIndex(20 codes of 3, metric='l2', {backend})"
    assert "12 codes of 16 bits" in repr(CodeIndex(bits(12, 9), backend=backend))


def test_codes_of_a_pair_find_themselves(backend: str) -> None:
    pair, x = probae.SemanticHashing(9, 24), torch.rand(50, 9)
    codes = probae.binary_codes(pair, x)
    assert (CodeIndex(codes, backend=backend).search(codes, 1).distances == 0).all()


# ---- what it refuses -----------------------------------------------------------------------------


def test_auto_takes_faiss_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_index, "find_spec", lambda name: None)
    assert CodeIndex(bits(3, 8)).backend == "sklearn"
    with pytest.raises(ImportError, match=r"faiss: pip install 'probae\[faiss\]'"):
        CodeIndex(bits(3, 8), backend="faiss")
    monkeypatch.setattr(code_index, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "faiss", pytest.importorskip("faiss"))
    assert CodeIndex(bits(3, 8)).backend == "faiss"


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (bits(3, 8), {"metric": "l1"}, "metric must be one of hamming, cosine, l2, got 'l1'"),
        (bits(3, 8), {"backend": "annoy"}, "backend must be one of auto, faiss, sklearn"),
        (torch.rand(3, 8), {}, r"codes must be bits \(bool\) or packed codes .*got torch\.float32"),
        (bits(0, 8), {}, "codes is empty"),
        (torch.zeros(8).bool(), {}, r"codes must have shape \(N, columns\)"),
        ("codes", {}, "codes must be a tensor or array"),
        (bits(3, 8).to_sparse(), {}, r"codes must hold bits, in a dense tensor; codes\.to_dense"),
        (torch.rand(3, 2, 2), {"metric": "l2"}, r"codes must have shape \(N, z_dim\), got"),
        (torch.full((3, 2), float("nan")), {"metric": "l2"}, "codes must be finite"),
        (torch.zeros(3, 2).long(), {"metric": "l2"}, "codes must .*int64"),
        (torch.eye(3)[:, :2], {"metric": "cosine"}, "codes must have a direction .* in row 2"),
    ],
)
def test_bad_codes_are_named(codes: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeIndex(codes, **options)


def test_bad_queries_are_named(backend: str) -> None:
    index = CodeIndex(bits(5, 16), backend=backend)
    for queries, message in (
        (bits(3, 8), "queries must have 2 bytes, as the codes, got 1"),
        (torch.rand(3, 16), r"queries must be bits \(bool\)"),
        (bits(0, 16), "queries is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(queries, 1)
    for k in (0, 1.0, True):
        with pytest.raises(ValueError, match="k must be an int >= 1"):
            index.search(bits(3, 16), k)
    with pytest.raises(ValueError, match="k must be at most the number of codes, 5, got 6"):
        index.search(bits(3, 16), 6)
    for radius in (-1, 0.5, "near"):
        with pytest.raises(ValueError, match="radius must be an int >= 0"):
            index.within(bits(3, 16), radius)
    real = CodeIndex(torch.randn(5, 3), "l2", backend)
    with pytest.raises(ValueError, match="queries must have 3 columns, as the codes, got 2"):
        real.search(torch.rand(3, 2), 1)
    for radius in (-0.1, np.inf, "near", None):
        with pytest.raises(ValueError, match="radius must be a finite number >= 0"):
            real.within(torch.rand(3, 3), radius)
