"""Scores of retrieval against scikit-learn, and against every order of equally near codes."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

import probae
from probae import mean_average_precision, precision_at_k, ranking, recall_at_k

SCORES = [mean_average_precision, precision_at_k, recall_at_k]


def labelled(n: int, classes: int = 3) -> Tensor:
    return torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,))])


def real(n: int, metric: str) -> Tensor:
    return torch.rand(n, 12) < 0.5 if metric == "hamming" else torch.randn(n, 3)


def distances(queries: Tensor, codes: Tensor, metric: str) -> Tensor:
    if metric == "hamming":
        return (queries[:, None] != codes).sum(-1)
    a, b = queries.double(), codes.double()
    if metric == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    return (a[:, None] - b).norm(dim=-1)


# ---- without ties --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_average_precision_is_that_of_scikit_learn(metric: str) -> None:
    queries, codes = real(20, metric), real(200, metric)
    wanted, labels = labelled(20), labelled(200)
    score = mean_average_precision(queries, codes, wanted, labels, metric=metric)
    distance = distances(queries, codes, metric)
    expected = [
        average_precision_score((labels == wanted[i]).numpy(), -distance[i].numpy())
        for i in range(20)
    ]
    assert np.allclose(score.values.numpy(), expected, atol=1e-12)
    assert score.mean == pytest.approx(np.mean(expected))
    assert score.std_error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(20))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_precision_and_recall_count_the_nearest(metric: str, k: int) -> None:
    queries, codes = real(20, metric), real(50, metric)
    wanted, labels = labelled(20), labelled(50)
    nearest = distances(queries, codes, metric).argsort(1)[:, :k]
    hits = (labels[nearest] == wanted[:, None]).double().sum(1)
    task = (queries, codes, wanted, labels, k)
    assert torch.allclose(precision_at_k(*task, metric=metric).values, hits / k)
    total = (labels == wanted[:, None]).sum(1)
    assert torch.allclose(recall_at_k(*task, metric=metric).values, hits / total)


def test_a_perfect_and_a_worst_ranking() -> None:
    codes = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    labels = torch.tensor([0, 0, 1, 1])
    query = torch.tensor([[-1.0], [-1.0]])
    score = mean_average_precision(query, codes, torch.tensor([0, 1]), labels, metric="l2")
    assert score.values.tolist() == pytest.approx([1.0, (1 / 3 + 2 / 4) / 2])


# ---- with ties -----------------------------------------------------------------------------------


def every_order(distance: Any, relevant: Any, k: int) -> tuple[float, float, float]:
    """Mean over all orders of equally near codes, of AP, precision and recall."""
    scores = []
    for order in itertools.permutations(range(len(distance))):
        chosen = np.array(order)
        ranked = chosen[np.argsort(distance[chosen], kind="stable")]
        hits = relevant[ranked]
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        scores.append(
            [(precision * hits).sum() / hits.sum(), hits[:k].mean(), hits[:k].sum() / hits.sum()]
        )
    average, precision, recall = np.mean(scores, 0)
    return average, precision, recall


@pytest.mark.parametrize("metric", ["hamming", "l2", "cosine"])
def test_ties_are_averaged_over_every_order(metric: str) -> None:
    codes = torch.randint(0, 2, (7, 2)).float()
    codes[(codes == 0).all(1)] = torch.tensor([1.0, 1.0])  # those have no direction
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    if metric == "hamming":
        codes, queries = codes.bool(), queries.bool()
    wanted, labels = torch.tensor([0, 1, 1]), labelled(7, 2)
    task = (queries, codes, wanted, labels)
    found = torch.stack(
        [
            mean_average_precision(*task, metric=metric).values,
            precision_at_k(*task, 3, metric=metric).values,
            recall_at_k(*task, 3, metric=metric).values,
        ],
        1,
    )
    distance = distances(queries, codes, metric).numpy().round(9)
    for i in range(3):
        expected = every_order(distance[i], (labels == wanted[i]).numpy(), 3)
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_equal_real_codes_are_tied_exactly() -> None:
    # the same codes as bits and as numbers: the ranking has the same ties
    bits, queries = torch.rand(300, 6) < 0.5, torch.rand(20, 6) < 0.5
    labels = (labelled(20), labelled(300))
    a = mean_average_precision(queries, bits, *labels)
    b = mean_average_precision(queries.double(), bits.double(), *labels, metric="l2")
    assert torch.allclose(a.values, b.values, atol=1e-12)


def test_codes_that_say_nothing_score_by_chance() -> None:
    # all tied: the expectation over random orders, so P@k is the share of the label
    codes, labels = torch.zeros(100, 8).bool(), (torch.arange(100) < 30).long()
    query, wanted = torch.zeros(1, 8).bool(), torch.tensor([1])
    assert precision_at_k(query, codes, wanted, labels, 10).mean == pytest.approx(0.3)
    assert recall_at_k(query, codes, wanted, labels, 10).mean == pytest.approx(0.1)
    drawn = np.random.default_rng(0)
    hits = drawn.permuted(np.tile(labels.numpy(), (20_000, 1)), axis=1)
    scores = (hits * hits.cumsum(1) / np.arange(1, 101)).sum(1) / 30
    average = mean_average_precision(query, codes, wanted, labels).mean
    # within 4 standard errors: fails by chance once in 16 000 seeds; this seed is fixed
    assert abs(average - np.mean(scores)) < 4 * np.std(scores) / math.sqrt(len(scores))


# ---- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("metric", ["hamming", "l2"])
def test_blocks_do_not_change_scores(
    score: Any, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = (real(10, metric), real(40, metric), labelled(10), labelled(40))
    whole = score(*task, metric=metric)
    monkeypatch.setattr(ranking, "BLOCK", 1)
    assert torch.equal(whole.values, score(*task, metric=metric).values)


@pytest.mark.parametrize("score", SCORES)
def test_packed_codes_and_arrays_do_as_well(score: Any) -> None:
    queries, codes = real(10, "hamming"), real(40, "hamming")
    wanted, labels = labelled(10), labelled(40)
    first = score(queries, codes, wanted, labels)
    second = score(
        probae.pack_codes(queries).numpy(), probae.pack_codes(codes), wanted.numpy(), labels.int()
    )
    assert torch.equal(first.values, second.values)
    assert first.values.dtype == torch.float64
    assert (first.values >= 0).all()
    assert (first.values <= 1 + 1e-12).all()


def test_a_score_says_what_it_is() -> None:
    task = (real(3, "l2"), real(9, "l2"), labelled(3), labelled(9))
    assert repr(precision_at_k(*task, 2, metric="l2")).startswith("RetrievalScore(precision at 2: ")
    assert repr(recall_at_k(*task, 2, metric="l2")).endswith(", 3 queries)")
    assert mean_average_precision(*task, metric="l2").name == "average precision"
    one = precision_at_k(task[0][:1], task[1], task[2][:1], task[3], 2, metric="l2")
    assert math.isnan(one.std_error)


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_bad_input_is_named(score: Any) -> None:
    queries, codes = real(3, "hamming"), real(9, "hamming")
    wanted, labels = labelled(3), labelled(9)
    for task, options, message in (
        ((queries, codes, wanted, labels), {"metric": "dot"}, "metric must be one of"),
        ((queries[:, :8], codes, wanted, labels), {}, "queries must have 2 columns"),
        (
            (queries, codes, wanted[:2], labels),
            {},
            r"query_labels must be integers of shape \(3,\)",
        ),
        ((queries, codes, wanted, labels.float()), {}, r"database_labels .* got torch\.float32"),
        ((queries, codes, "abc", labels), {}, "query_labels must be integers .* got str"),
        ((queries, codes[:0], wanted, labels), {}, "database is empty"),
        ((queries.float(), codes, wanted, labels), {}, r"queries must be bits \(bool\)"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*task, **options)


def test_numbers_out_of_range_and_labels_without_a_code_are_named() -> None:
    queries, codes = real(3, "hamming"), real(9, "hamming")
    wanted, labels = labelled(3), labelled(9)
    for score in (precision_at_k, recall_at_k):
        with pytest.raises(ValueError, match="k must be at most the number of codes, 9, got 10"):
            score(queries, codes, wanted, labels, 10)
        with pytest.raises(ValueError, match="k must be an int >= 1"):
            score(queries, codes, wanted, labels, 0)
    strange = torch.tensor([0, 7, 1])
    for score, options in ((mean_average_precision, {}), (recall_at_k, {"k": 3})):
        with pytest.raises(ValueError, match=r"query_labels must occur .* first 7 of query 1"):
            score(queries, codes, strange, labels, **options)
    assert precision_at_k(queries, codes, strange, labels, 3).values[1] == 0
