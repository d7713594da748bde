"""How well codes rank a database: precision, recall and mean average precision of retrieval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .code_index import METRICS, _as_codes
from .part import require_count
from .retrieval import hamming_distance

BLOCK = 2**21  # distances that are held at once


class RetrievalScore(NamedTuple):
    """A score of retrieval, for each query and on average.

    Example:
        >>> import torch, probae
        >>> codes, labels = torch.eye(3).bool(), torch.tensor([0, 0, 1])
        >>> probae.precision_at_k(codes, codes, labels, labels, k=1)
        RetrievalScore(precision at 1: 1.0000 ± 0.0000, 3 queries)
    """

    values: Tensor  # (Q,) float64, in [0, 1]
    name: str  # what they are, such as "precision at 10"

    @property
    def mean(self) -> float:
        """Mean over the queries."""
        return float(self.values.mean())

    @property
    def std_error(self) -> float:
        """Standard error of the mean, over queries."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.std() / math.sqrt(len(self.values)))

    def __repr__(self) -> str:
        return (
            f"RetrievalScore({self.name}: {self.mean:.4f} ± {self.std_error:.4f}, "
            f"{len(self.values)} queries)"
        )


def precision_at_k(
    queries: Tensor | Any,
    database: Tensor | Any,
    query_labels: Tensor | Any,
    database_labels: Tensor | Any,
    k: int = 10,
    *,
    metric: str = "hamming",
) -> RetrievalScore:
    r"""Share of the k nearest codes that have the label of the query.

    .. math:: P@k = E\,\frac1k \sum_{i=1}^{k} rel_i

    with rel_i = 1 where the code of rank i has the label of the query, else 0. Equally near codes
    are ranked at random, and E is the expectation over that, in closed form.

    Args:
        queries: codes (Q, ...): bits (bool) or packed codes (uint8) for ``metric="hamming"``, else
            real codes (Q, z_dim).
        database: codes (N, ...) of the same form; queries should not be among them.
        query_labels: (Q,) int64.
        database_labels: (N,) int64.
        k: number of neighbours, at most N.
        metric: ``"hamming"``, ``"cosine"`` or ``"l2"``, see :class:`CodeIndex`.

    Returns:
        RetrievalScore: of each query.

    Raises:
        ValueError: codes or labels that do not fit each other, or ``k`` out of range.

    Reference:
        McSherry & Najork, Computing information retrieval performance measures efficiently in the
        presence of tied scores, 2008.

    Example:
        >>> import torch, probae
        >>> codes = torch.tensor([[0.0], [1.0], [3.0]])
        >>> labels = torch.tensor([0, 1, 0])
        >>> query, label = torch.tensor([[0.1]]), torch.tensor([0])
        >>> probae.precision_at_k(query, codes, label, labels, k=2, metric="l2").mean
        0.5
    """
    return _at_k(queries, database, query_labels, database_labels, k, metric, recall=False)


def recall_at_k(
    queries: Tensor | Any,
    database: Tensor | Any,
    query_labels: Tensor | Any,
    database_labels: Tensor | Any,
    k: int = 10,
    *,
    metric: str = "hamming",
) -> RetrievalScore:
    r"""Share of all codes with the label of the query that are among its k nearest.

    .. math:: R@k = E\,\frac1R \sum_{i=1}^{k} rel_i

    with R the number of codes of that label; rel_i and E as in :func:`precision_at_k`.

    Args:
        queries: codes (Q, ...), as in :func:`precision_at_k`.
        database: codes (N, ...) of the same form; queries should not be among them.
        query_labels: (Q,) int64, each of which occurs in the database.
        database_labels: (N,) int64.
        k: number of neighbours, at most N.
        metric: ``"hamming"``, ``"cosine"`` or ``"l2"``, see :class:`CodeIndex`.

    Returns:
        RetrievalScore: of each query.

    Raises:
        ValueError: codes or labels that do not fit each other, or ``k`` out of range.

    Reference:
        McSherry & Najork, Computing information retrieval performance measures efficiently in the
        presence of tied scores, 2008.

    Example:
        >>> import torch, probae
        >>> codes = torch.tensor([[0.0], [1.0], [3.0]])
        >>> labels = torch.tensor([0, 1, 0])
        >>> query, label = torch.tensor([[0.1]]), torch.tensor([0])
        >>> probae.recall_at_k(query, codes, label, labels, k=1, metric="l2").mean
        0.5
    """
    return _at_k(queries, database, query_labels, database_labels, k, metric, recall=True)


def mean_average_precision(
    queries: Tensor | Any,
    database: Tensor | Any,
    query_labels: Tensor | Any,
    database_labels: Tensor | Any,
    *,
    metric: str = "hamming",
) -> RetrievalScore:
    r"""Average precision of the ranking of the whole database.

    .. math:: AP = E\,\frac1R \sum_{i=1}^{N} rel_i\, P@i

    the mean of the precision at the rank of each of the R codes that have the label of the query.
    Equally near codes, of which there are many among short binary ones, are ranked at random, and E
    is the expectation over that, in closed form: with n codes at one distance, r of them relevant,
    and R₀ of N₀ before them, these add

    .. math:: \frac{r}{n} \sum_{i=1}^{n} \frac{R_0 + 1 + (i - 1)\frac{r - 1}{n - 1}}{N_0 + i}.

    (``sklearn.metrics.average_precision_score`` lets all n share the precision after the last,
    which is the same where there are no ties.) The mean over queries is the usual mAP.

    Args:
        queries: codes (Q, ...), as in :func:`precision_at_k`.
        database: codes (N, ...) of the same form; queries should not be among them.
        query_labels: (Q,) int64, each of which occurs in the database.
        database_labels: (N,) int64.
        metric: ``"hamming"``, ``"cosine"`` or ``"l2"``, see :class:`CodeIndex`.

    Returns:
        RetrievalScore: of each query.

    Raises:
        ValueError: codes or labels that do not fit each other.

    Reference:
        McSherry & Najork, Computing information retrieval performance measures efficiently in the
        presence of tied scores, 2008.

    Example:
        >>> import torch, probae
        >>> codes = torch.tensor([[0.0], [1.0], [3.0]])
        >>> labels = torch.tensor([0, 1, 0])
        >>> query, label = torch.tensor([[0.1]]), torch.tensor([0])
        >>> score = probae.mean_average_precision(query, codes, label, labels, metric="l2")
        >>> round(score.mean, 4)  # (1/1 + 2/3) / 2
        0.8333
    """
    task = _Task(queries, database, query_labels, database_labels, metric)
    task.require_relevant()
    ranks = torch.arange(1, task.size + 1, dtype=torch.float64, device=task.device)
    harmonic = torch.cat([ranks.new_zeros(1), (1 / ranks).cumsum(0)])  # H(0), …, H(N)
    values = []
    for distance, relevant in task.blocks():
        level, count = _levels(distance)  # which distance, counted from the least
        shape = (len(distance), count)
        flat = level + count * torch.arange(len(level), device=level.device)[:, None]
        # one pass counts both: relevant codes in the second half
        tally = torch.bincount(
            (flat + relevant * (shape[0] * count)).flatten(), minlength=2 * shape[0] * count
        )
        others, r = tally.reshape(2, *shape).double()
        n = others + r
        before, found = n.cumsum(1) - n, r.cumsum(1) - r
        slope = (r - 1) / (n - 1).clamp(min=1)
        after = harmonic[(before + n).long()] - harmonic[before.long()]  # Σ 1 / (N₀ + i)
        gain = n * slope + (found + 1 - slope * (before + 1)) * after
        gain = torch.where(r > 0, gain * r / n.clamp(min=1), 0.0)
        values.append(gain.sum(1) / r.sum(1))
    return RetrievalScore(torch.cat(values), "average precision")


def _at_k(
    queries: Any,
    database: Any,
    query_labels: Any,
    database_labels: Any,
    k: int,
    metric: str,
    recall: bool,
) -> RetrievalScore:
    task = _Task(queries, database, query_labels, database_labels, metric)
    k = require_count(k, "k")
    if k > task.size:
        raise ValueError(f"k must be at most the number of codes, {task.size}, got {k}")
    if recall:
        task.require_relevant()
    values = []
    for distance, relevant in task.blocks():
        last = distance.kthvalue(k, 1, keepdim=True).values
        nearer, level = distance < last, distance == last
        share = (k - nearer.sum(1)) / level.sum(1).double()  # of that level that is among the k
        found = (relevant & nearer).sum(1) + share * (relevant & level).sum(1)
        values.append(found / (relevant.sum(1) if recall else k))
    return RetrievalScore(torch.cat(values), f"{'recall' if recall else 'precision'} at {k}")


def _levels(distance: Tensor) -> tuple[Tensor, int]:
    """Return the place of each distance among the different ones of its row, and how many."""
    if not distance.is_floating_point():  # of a few bits
        return distance.long(), int(distance.max()) + 1
    ordered, order = distance.sort(1)
    new = ordered[:, 1:] > ordered[:, :-1]
    rank = torch.cat([new.new_zeros(len(new), 1), new], 1).long().cumsum(1)
    return torch.empty_like(rank).scatter_(1, order, rank), int(rank.max()) + 1


class _Task:
    """Queries and a database with labels, checked against each other."""

    def __init__(
        self, queries: Any, database: Any, query_labels: Any, database_labels: Any, metric: str
    ) -> None:
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.metric = metric
        self.database = self._codes(database, "database")
        self.queries = self._codes(queries, "queries")
        if self.queries.shape[1] != self.database.shape[1]:
            raise ValueError(
                f"queries must have {self.database.shape[1]} columns, as the database, got "
                f"{self.queries.shape[1]}; rank with codes of the same pair"
            )
        self.size, self.device = len(self.database), self.database.device
        self.query_labels = _labels(query_labels, "query_labels", len(self.queries))
        self.labels = _labels(database_labels, "database_labels", self.size)

    def _codes(self, codes: Any, argument: str) -> Tensor:
        made = torch.from_numpy(_as_codes(codes, self.metric, argument))
        if self.metric == "hamming":
            return made
        made = made.double()
        if self.metric == "cosine":  # rounded, so that codes of one direction are equally near
            made = made / made.abs().amax(1, keepdim=True)  # of any size
            return (made / made.norm(dim=1, keepdim=True)).round(decimals=12)
        return made

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield distances and relevance, (rows, N) both, for some queries at a time."""
        rows = max(1, BLOCK // self.size)
        for codes, labels in zip(
            self.queries.split(rows), self.query_labels.split(rows), strict=True
        ):
            if self.metric == "hamming":
                distance = hamming_distance(codes, self.database)
            else:  # one by one, so that equal codes are equally far
                distance = torch.cdist(
                    codes, self.database, compute_mode="donot_use_mm_for_euclid_dist"
                )
            yield distance, labels[:, None] == self.labels

    def require_relevant(self) -> None:
        """Raise a ValueError where no code of the database has the label of a query."""
        missing = ~torch.isin(self.query_labels, self.labels)
        if missing.any():
            first = int(missing.nonzero()[0])
            raise ValueError(
                "query_labels must occur in database_labels, got "
                f"{int(missing.sum())} that do not, the first {int(self.query_labels[first])} of "
                f"query {first}: without a relevant code there is nothing to find; leave them out"
            )


def _labels(labels: Any, argument: str, count: int) -> Tensor:
    try:
        made = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument} must be integers of shape ({count},), got {type(labels).__name__}"
        ) from error
    hidden = made.is_meta or made.layout != torch.strided
    if hidden or made.is_floating_point() or made.is_complex() or made.shape != (count,):
        raise ValueError(
            f"{argument} must be integers of shape ({count},), one for each code, got "
            f"{made.dtype} of shape {tuple(made.shape)}"
        )
    return made.cpu().long()
