"""An index over codes: which are nearest to a query, and which lie within a radius."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .datasets import as_tensor
from .part import as_number, require_count
from .retrieval import _matrix, pack_codes

# scikit-learn and faiss are imported where they are used: both are slow to import

METRICS = ("hamming", "cosine", "l2")
BACKENDS = ("auto", "faiss", "sklearn")
MARGIN = 16  # neighbours beyond k that are looked at, as libraries round distances
BLOCK = 2**22  # numbers of one block of exact distances

Array = np.ndarray[Any, Any]


class Neighbours(NamedTuple):
    """The nearest codes to each query, nearest first; of equally near ones the first in the index.

    Example:
        >>> import torch, probae
        >>> index = probae.CodeIndex(torch.eye(4).bool())
        >>> index.search(torch.eye(4).bool()[:1], 3)
        Neighbours(distances=tensor([[0, 2, 2]], dtype=torch.int32), indices=tensor([[0, 1, 2]]))
    """

    distances: Tensor  # (Q, k): int32 bits of hamming, float64 of cosine and l2
    indices: Tensor  # (Q, k) int64: places in the index


class Ball(NamedTuple):
    """All codes within a radius of each query; those of one query after those of the one before.

    ``ball.indices.split(ball.counts.tolist())`` has one tensor for each query.

    Example:
        >>> import torch, probae
        >>> index = probae.CodeIndex(torch.eye(4).bool())
        >>> ball = index.within(torch.zeros(2, 4).bool(), 1)
        >>> ball.counts, ball.indices
        (tensor([4, 4]), tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    """

    counts: Tensor  # (Q,) int64: codes within the radius of each query
    distances: Tensor  # (sum of counts,), nearest first within a query
    indices: Tensor  # (sum of counts,) int64


class CodeIndex:
    r"""An index over codes, searched by brute force: every answer is exact.

    .. math::
        hamming:&\quad d(a, b) = \sum_l |a_l - b_l|\\
        cosine:&\quad d(a, b) = 1 - \frac{a \cdot b}{\|a\| \|b\|}\\
        l2:&\quad d(a, b) = \|a - b\|

    The work is that of faiss (the extra ``probae[faiss]``) or, without it, of scikit-learn. Both
    give the same neighbours in the same order: of equally near codes, the first in the index comes
    first. To that end distances between real codes are computed again in float64 for a few more
    candidates than were asked for.

    Args:
        codes: (N, z_dim) bits (bool) or (N, bytes) packed codes (uint8) for ``"hamming"``; else
            (N, z_dim) real codes: a tensor or array.
        metric: ``"hamming"``, ``"cosine"`` or ``"l2"``.
        backend: ``"faiss"``, ``"sklearn"``, or ``"auto"``: faiss where it is installed.

    Raises:
        ValueError: codes of another shape or dtype, empty, or not finite; a zero vector under
            ``"cosine"``; an unknown metric or backend.
        ImportError: ``backend="faiss"``, and it is not installed.

    Reference:
        Douze et al., The faiss library, 2024.

    Example:
        >>> import torch, probae
        >>> codes = torch.randn(100, 8)
        >>> index = probae.CodeIndex(codes, "cosine")
        >>> distances, indices = index.search(3 * codes[:5], k=2)  # a code finds itself
        >>> indices[:, 0], bool(distances[:, 0].abs().max() < 1e-6)
        (tensor([0, 1, 2, 3, 4]), True)
    """

    def __init__(self, codes: Tensor | Any, metric: str = "hamming", backend: str = "auto") -> None:
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.metric = metric
        self.backend = _available(backend)
        # a copy, uint8 (N, bytes) or float (N, z_dim)
        self._codes = _as_codes(codes, metric, "codes").copy()
        self._columns = self._codes.shape[1]
        self._index: _BitIndex | _RealIndex
        self._double: _RealIndex | None = None  # where float32 cannot tell
        if metric == "hamming":
            self._index = _BitIndex(self._codes, self.backend)
        else:
            self._index = _RealIndex(self._flat(self._codes), self.backend)

    def __len__(self) -> int:
        """Return the number of codes."""
        return len(self._codes)

    def __repr__(self) -> str:
        size = f"{8 * self._columns} bits" if self.metric == "hamming" else f"{self._columns}"
        return f"CodeIndex({len(self)} codes of {size}, metric={self.metric!r}, {self.backend})"

    def search(self, queries: Tensor | Any, k: int = 10) -> Neighbours:
        """Return the k nearest codes to each query.

        Args:
            queries: codes (Q, ...) of the form that the index was built from.
            k: number of neighbours, at most the number of codes.

        Returns:
            Neighbours: distances and indices, both (Q, k), on the CPU.

        Raises:
            ValueError: queries that do not fit the codes, or ``k`` out of range.
        """
        asked = self._queries(queries)
        k = require_count(k, "k")
        if k > len(self):
            raise ValueError(f"k must be at most the number of codes, {len(self)}, got {k}")
        if isinstance(self._index, _BitIndex):
            distances, indices = self._index.nearest(asked, k)
        else:
            rows = max(1, BLOCK // (self._columns * (k + MARGIN)))
            blocks = [self._nearest(asked[i : i + rows], k) for i in range(0, len(asked), rows)]
            distances, indices = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return Neighbours(torch.from_numpy(distances), torch.from_numpy(indices))

    def within(self, queries: Tensor | Any, radius: float) -> Ball:
        """Return all codes at a distance of at most ``radius`` from each query.

        Args:
            queries: codes (Q, ...) of the form that the index was built from.
            radius: at least 0: a whole number of bits under ``"hamming"``.

        Returns:
            Ball: how many codes each query has, and these, on the CPU.

        Raises:
            ValueError: queries that do not fit the codes, or ``radius`` out of range.
        """
        asked = self._queries(queries)
        if isinstance(self._index, _BitIndex):
            counts, distances, indices = self._index.ball(asked, _bits(radius))
        else:
            if not 0 <= as_number(radius) < math.inf:
                raise ValueError(f"radius must be a finite number >= 0, got {radius!r}")
            counts, distances, indices = self._ball(asked, float(radius))
        query = np.repeat(np.arange(len(asked)), counts)
        order = np.lexsort((indices, distances, query))
        results = (counts, distances[order], indices[order])
        return Ball(*(torch.from_numpy(result) for result in results))

    def _queries(self, queries: Any) -> Array:
        asked = _as_codes(queries, self.metric, "queries")
        if asked.shape[1] != self._columns:
            unit = "bytes" if self.metric == "hamming" else "columns"
            raise ValueError(
                f"queries must have {self._columns} {unit}, as the codes, got {asked.shape[1]}; "
                "search with codes of the same pair"
            )
        return asked

    def _flat(self, codes: Array) -> Array:
        """Return codes (..., z_dim) in float64, between which L2 orders as the metric does."""
        codes = codes.astype(np.float64)
        if self.metric == "cosine":
            # of any size; rounded, so that codes of one direction are equally near
            codes = codes / np.abs(codes).max(-1, keepdims=True)
            return np.round(codes / np.linalg.norm(codes, axis=-1, keepdims=True), 12)
        return codes

    def _exact(self, asked: Array, found: Array) -> Array:
        """Return squared L2 in float64 between codes (..., z_dim); its ties are those of d."""
        return ((self._flat(asked) - self._flat(found)) ** 2).sum(-1)

    def _distance(self, square: Array) -> Array:
        return square / 2 if self.metric == "cosine" else np.sqrt(square)

    def _nearest(
        self, asked: Array, k: int, index: _RealIndex | None = None
    ) -> tuple[Array, Array]:
        """Rank a few more candidates than k; where these cannot be enough, rank all codes."""
        if index is None:
            assert isinstance(self._index, _RealIndex)
            index = self._index
        count = min(len(self), k + MARGIN)
        rounded, found, slack = index.nearest(self._flat(asked), count)
        square = self._exact(asked[:, None], self._codes[found])  # (Q, count)
        order = np.lexsort((found, square))[:, :k]
        square, found = (np.take_along_axis(part, order, 1) for part in (square, found))
        sure = (found >= 0).all(1)  # faiss finds nothing beyond the range of float32
        if count < len(self):  # what was left out is no nearer than the last, as far as rounded
            sure &= square[:, -1] < rounded.max(1) - slack
        if index.faiss and not sure.all():  # float64 tells most of the others apart
            if self._double is None:
                self._double = _RealIndex(self._flat(self._codes), "sklearn")
            distances = self._distance(square)
            distances[~sure], found[~sure] = self._nearest(asked[~sure], k, self._double)
            return distances, found
        for row in np.flatnonzero(~sure):
            blocks = np.array_split(self._codes, -(-self._codes.size // BLOCK))
            every = np.concatenate([self._exact(asked[row], block) for block in blocks])
            found[row] = every.argsort(kind="stable")[:k]
            square[row] = every[found[row]]
        return self._distance(square), found

    def _ball(self, asked: Array, radius: float) -> tuple[Array, Array, Array]:
        """Return counts, distances and indices of the codes within a radius."""
        assert isinstance(self._index, _RealIndex)
        bound = 2 * radius if self.metric == "cosine" else radius**2
        counts, found = self._index.ball(self._flat(asked), bound)
        query = np.repeat(np.arange(len(asked)), counts)
        rows = max(1, BLOCK // self._columns)
        squares = [
            self._exact(asked[query[i : i + rows]], self._codes[found[i : i + rows]])
            for i in range(0, len(found), rows)
        ]
        distances = self._distance(np.concatenate([np.empty(0), *squares]))
        near = distances <= radius
        return np.bincount(query[near], minlength=len(asked)), distances[near], found[near]


class _BitIndex:
    """Hamming distances between packed codes; equally near codes come in their order."""

    def __init__(self, packed: Array, backend: str) -> None:
        self.faiss = backend == "faiss"
        self.index: Any
        if self.faiss:
            import faiss

            self.index = faiss.IndexBinaryFlat(8 * packed.shape[1])
            self.index.add(packed)
        else:
            # the squared distance of bits is that of Hamming; one more column adds to it, for code
            # i of N, i / 2N, which puts equally near codes into their order
            place = np.sqrt(np.arange(len(packed)) / (2 * len(packed)))
            self.index = _brute_force(np.column_stack([np.unpackbits(packed, axis=1), place]))

    def nearest(self, asked: Array, k: int) -> tuple[Array, Array]:
        """Return distances and indices, (Q, k)."""
        if self.faiss:
            distances, indices = self.index.search(asked, k)
            return distances, indices
        square, indices = self.index.kneighbors(self._unpacked(asked), k)
        return self._rounded(square), indices

    def ball(self, asked: Array, radius: int) -> tuple[Array, Array, Array]:
        """Return counts (Q,), and distances and indices of all queries, one after another."""
        radius = min(radius, 8 * asked.shape[1])
        if self.faiss:
            limits, distances, indices = self.index.range_search(asked, radius + 1)  # below that
            return np.diff(limits.astype(np.int64)), distances.astype(np.int32), indices
        square, indices = self.index.radius_neighbors(self._unpacked(asked), radius + 0.75)
        counts = np.array([len(found) for found in indices], dtype=np.int64)
        return counts, self._rounded(np.concatenate(square)), np.concatenate(indices)

    def _unpacked(self, asked: Array) -> Array:
        return np.column_stack([np.unpackbits(asked, axis=1), np.zeros(len(asked))])

    def _rounded(self, square: Array) -> Array:
        return np.rint(square - 0.25).astype(np.int32)


class _RealIndex:
    """Squared L2 between real codes, as good as a library rounds it."""

    def __init__(self, codes: Array, backend: str) -> None:
        self.faiss = backend == "faiss"
        # float32 rounds the less the nearer to 0, and knows no squares of 1e20
        self.centre, self.unit = codes.mean(0), 1.0
        self.unit = float(np.linalg.norm(codes - self.centre, axis=1).max()) or 1.0
        codes = self._moved(codes)
        self.index: Any
        if self.faiss:
            import faiss

            self.index = faiss.IndexFlatL2(codes.shape[1])
            self.index.add(codes.astype(np.float32))
        else:
            self.index = _brute_force(codes)

    def nearest(self, asked: Array, k: int) -> tuple[Array, Array, Array]:
        """Return squares and indices (Q, k), and how far off a square may be, (Q,)."""
        asked = self._moved(asked)
        if self.faiss:
            square, indices = self.index.search(asked.astype(np.float32), k)
        else:
            square, indices = self.index.kneighbors(asked, k)
        return square.astype(np.float64) * self.unit**2, indices, self._slack(asked) * self.unit**2

    def ball(self, asked: Array, bound: float) -> tuple[Array, Array]:
        """Return counts (Q,) and indices of all codes whose square may be within a bound."""
        asked = self._moved(asked)
        bound = bound / self.unit**2
        # no code is beyond 1, so that a query from far away has none in its ball
        close = np.linalg.norm(asked, axis=1) <= (1 + math.sqrt(bound)) * (1 + 1e-6)
        counts = np.zeros(len(asked), dtype=np.int64)
        if not close.any():
            return counts, np.empty(0, dtype=np.int64)
        asked = asked[close]
        bound += float(self._slack(asked).max())
        if self.faiss:
            limits, _, indices = self.index.range_search(asked.astype(np.float32), bound)
            counts[close] = np.diff(limits.astype(np.int64))
            return counts, indices
        _, indices = self.index.radius_neighbors(asked, bound)
        counts[close] = [len(found) for found in indices]
        return counts, np.concatenate(indices)

    def _moved(self, codes: Array) -> Array:
        return (codes - self.centre) / self.unit

    def _slack(self, asked: Array) -> Array:
        """Return a bound on the error of squares that are computed in float32, (Q,)."""
        kind = np.float32 if self.faiss else np.float64
        units = 4 * (asked.shape[1] + 2) * float(np.finfo(kind).eps)
        return units * (np.linalg.norm(asked, axis=1) + 1) ** 2  # no code is beyond 1


def _bits(radius: Any) -> int:
    return require_count(radius, "radius", least=0)


def _brute_force(codes: Array) -> Any:
    from sklearn.neighbors import (  # type: ignore[import-untyped, unused-ignore]
        NearestNeighbors,
    )

    return NearestNeighbors(algorithm="brute", metric="sqeuclidean").fit(codes)


def _available(backend: str) -> str:
    """Return the name of a backend that is installed."""
    if backend == "sklearn":
        return backend
    if find_spec("faiss") is not None:
        return "faiss"
    if backend == "faiss":
        raise ImportError("backend='faiss' needs faiss: pip install 'probae[faiss]'")
    return "sklearn"


def _as_codes(codes: Any, metric: str, argument: str) -> Array:
    """Return packed codes, or real ones, as an array of two dimensions."""
    if metric == "hamming":
        matrix = _matrix(codes, argument)
        if matrix.is_meta or matrix.layout != torch.strided:
            raise ValueError(
                f"{argument} must hold bits, in a dense tensor; {argument}.to_dense() makes it one"
            )
        if matrix.dtype == torch.bool:
            matrix = pack_codes(matrix)
        elif matrix.dtype != torch.uint8:
            raise ValueError(
                f"{argument} must be bits (bool) or packed codes (uint8) for metric='hamming', got "
                f"{matrix.dtype}; take probae.binary_codes(pair, x), or metric='l2'"
            )
        array = matrix.cpu().numpy()
    else:
        real = as_tensor(codes, argument)
        if real.dim() != 2:
            raise ValueError(
                f"{argument} must have shape (N, z_dim), got {tuple(real.shape)}; flatten codes "
                "with z.flatten(1)"
            )
        array = real.detach().cpu().numpy()
        if metric == "l2" and array.size and float(np.abs(array).max()) > 1e150:
            raise ValueError(
                f"{argument} must be below 1e150 in size for metric='l2', which squares distances, "
                f"got {np.abs(array).max():g}; scale the codes"
            )
        lost = ~array.any(1)
        if metric == "cosine" and lost.any():
            raise ValueError(
                f"{argument} must have a direction for metric='cosine', got {int(lost.sum())} "
                f"zero vectors, the first in row {int(lost.argmax())}; use metric='l2'"
            )
    if len(array) == 0:
        raise ValueError(f"{argument} is empty: expected at least one code")
    return np.ascontiguousarray(array)
