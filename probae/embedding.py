"""Dimensionality reduction, measured: what the codes of pairs and of other methods keep."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .autoencoder import Autoencoder, frozen
from .checks import check_support, chunks, require_finite, to_pair
from .corruptions import encoder_input
from .datasets import as_tensor
from .distributions import mean_of
from .part import require_count
from .training import Run

# scikit-learn is imported where it is used: it would add a half to the time of the import

Array = np.ndarray[Any, Any]


class EmbeddingScore(NamedTuple):
    """What the codes of one method keep of test data. None: the method does not have it.

    Example:
        >>> score = EmbeddingScore("PCA", 2, 0.91, 0.55, 0.02, 0.05, 0.1, 0.01)
        >>> score.trustworthiness
        0.91
    """

    name: str
    z_dim: int
    trustworthiness: float  # in [0, 1]: whether neighbours in the code are neighbours in x
    accuracy: float | None  # of k nearest neighbours in the code, training to test
    accuracy_std_error: float | None  # binomial, over test data
    reconstruction: float | None  # mean squared error, per entry of x
    fit_seconds: float | None  # of training; None: it came trained
    transform_seconds: float  # of encoding the test data


class EmbeddingComparison(NamedTuple):
    """Scores of several methods on the same data; ``print`` shows a table.

    Example:
        >>> score = EmbeddingScore("PCA", 2, 0.91, 0.55, 0.02, 0.05, None, 0.01)
        >>> print(EmbeddingComparison((score,), num_neighbours=10, num_test=500, num_ranked=500))
        method  z_dim  trustworthiness  10-NN accuracy, %  squared error  fit, s  transform, s
        PCA         2           0.9100       55.00 ± 2.00        0.05000       —          0.01
        500 test data; trustworthiness on 500 of them
    """

    rows: tuple[EmbeddingScore, ...]
    num_neighbours: int
    num_test: int
    num_ranked: int  # test data that trustworthiness was measured on

    def of(self, name: str) -> EmbeddingScore:
        """Return the score of the method of that name.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise ValueError(f"name must be one of {known}, got {name!r}")

    def __repr__(self) -> str:
        head = (
            "method",
            "z_dim",
            "trustworthiness",
            f"{self.num_neighbours}-NN accuracy, %",
            "squared error",
            "fit, s",
            "transform, s",
        )
        table = [head, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in table
        ]
        end = f"{self.num_test} test data; trustworthiness on {self.num_ranked} of them"
        return "\n".join([*lines, end])


def compare_embeddings(
    methods: Mapping[str, Any],
    train: Tensor | Any,
    test: Tensor | Any,
    train_labels: Tensor | Any | None = None,
    test_labels: Tensor | Any | None = None,
    *,
    num_neighbours: int = 10,
    num_ranked: int = 2000,
    seed: int = 0,
) -> EmbeddingComparison:
    r"""Compare pairs and scikit-learn's transformers as methods of dimensionality reduction.

    - trustworthiness: :math:`1 - \frac{2}{n k (2n - 3k - 1)} \sum_i \sum_{j \in N_i^k} \max(0,
      r(i, j) - k)`, over those j that are among the k nearest of i in the code, with r(i, j) their
      rank in x. 1: no neighbour in the code is none in x.
    - accuracy: of the k nearest training codes, which vote on the label of each test datum.
    - reconstruction: :math:`\frac1{ND} \sum_n \|x_n - g(f(x_n))\|^2` of the test data.

    Pairs are trained before; a transformer is fitted here to a copy, on the training data, or taken
    as it is where it is fitted already. A method that has only ``fit_transform``, such as t-SNE, is
    given training and test data together, without labels. Of UMAP no reconstruction is asked: its
    inverse triangulates the codes, which is out of reach from some five dimensions on.

    Args:
        methods: name to a pair; to ``(pair, run)``, with what :func:`probae.fit` returned, for the
            time of its training; or to a transformer with ``fit`` and ``transform``: ``PCA``,
            ``FactorAnalysis``, :class:`AutoencoderEstimator`, ``umap.UMAP`` (the extra
            ``probae[umap]``), ``TSNE``.
        train: training data (N, *x_shape): tensor, array, path or Dataset. Transformers are given
            them as rows.
        test: test data (M, *x_shape).
        train_labels: (N,) integers; None: no accuracy.
        test_labels: (M,) integers.
        num_neighbours: k of accuracy and of trustworthiness.
        num_ranked: number of test data, drawn without replacement, on which trustworthiness is
            measured: it takes memory of the square of it.
        seed: of that draw.

    Returns:
        EmbeddingComparison: one row for each method.

    Raises:
        ValueError: data or labels that do not fit each other or a pair, no method, one that is none
            of the above, or a number out of range.

    Reference:
        Venna & Kaski, Neighborhood preservation in nonlinear projection methods, 2001.

    Example:
        >>> import probae
        >>> from sklearn.decomposition import PCA
        >>> data = probae.load_dataset("digits")
        >>> pair = probae.VAE(data.shape, 5)
        >>> run = probae.fit(pair, data.train, epochs=1, progress=False)
        >>> methods = {"PCA": PCA(5), "VAE": (pair, run)}
        >>> labels = data.labels.train, data.labels.test
        >>> result = probae.compare_embeddings(methods, data.train, data.test, *labels)
        >>> result.of("PCA").accuracy > 0.9
        True
    """
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(
            "methods must be a dict from names to pairs or transformers, at least one, got "
            f"{methods!r}"
        )
    fitted, held_out = as_tensor(train, "train"), as_tensor(test, "test")
    if fitted.shape[1:] != held_out.shape[1:]:
        raise ValueError(
            f"test must have the shape of train, (M, {', '.join(map(str, fitted.shape[1:]))}), got "
            f"{tuple(held_out.shape)}"
        )
    k = require_count(num_neighbours, "num_neighbours")
    ranked = min(require_count(num_ranked, "num_ranked", least=3), len(held_out))
    if k > len(fitted) or 2 * k >= ranked:
        raise ValueError(
            f"num_neighbours must be at most the number of training data, {len(fitted)}, and less "
            f"than half the number of ranked test data, {ranked}, got {k}"
        )
    if (train_labels is None) != (test_labels is None):
        raise ValueError("train_labels and test_labels must be given both, or neither")
    labels = None
    if train_labels is not None:
        labels = (
            _labels(train_labels, "train_labels", len(fitted)),
            _labels(test_labels, "test_labels", len(held_out)),
        )
    for name, method in methods.items():
        _check_method(name, method, fitted, held_out)
    require_count(seed, "seed", least=0)
    chosen = np.random.default_rng(seed).permutation(len(held_out))[:ranked]
    before = np.random.get_state()  # noqa: NPY002 - what a transformer without a seed draws from
    try:
        rows = tuple(
            _score(name, method, fitted, held_out, labels, k, chosen)
            for name, method in methods.items()
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return EmbeddingComparison(rows, k, len(held_out), ranked)


def _cells(row: EmbeddingScore) -> tuple[str, ...]:
    accuracy = "—"
    if row.accuracy is not None and row.accuracy_std_error is not None:
        accuracy = f"{100 * row.accuracy:.2f} ± {100 * row.accuracy_std_error:.2f}"
    return (
        row.name,
        str(row.z_dim),
        f"{row.trustworthiness:.4f}",
        accuracy,
        "—" if row.reconstruction is None else f"{row.reconstruction:.5f}",
        "—" if row.fit_seconds is None else f"{row.fit_seconds:.1f}",
        f"{row.transform_seconds:.2f}",
    )


class _Codes(NamedTuple):
    train: Array | None  # (N, z_dim); None: not asked for
    test: Array  # (M, z_dim)
    reconstruction: Array | None  # (M, D)
    fit_seconds: float | None
    transform_seconds: float


def _score(
    name: str,
    method: Any,
    train: Tensor,
    test: Tensor,
    labels: tuple[Array, Array] | None,
    k: int,
    chosen: Array,
) -> EmbeddingScore:
    from sklearn.manifold import (  # type: ignore[import-untyped, unused-ignore]
        trustworthiness,
    )
    from sklearn.neighbors import (  # type: ignore[import-untyped, unused-ignore]
        KNeighborsClassifier,
    )

    pair, run = _pair(method)
    if pair is not None:
        codes = _of_pair(pair, run, train, test, labels is not None)
    else:
        codes = _of_transformer(method, train, test, labels is not None)
    x = test.flatten(1).numpy()
    accuracy = error = None
    if labels is not None:
        vote = KNeighborsClassifier(k).fit(codes.train, labels[0])
        accuracy = float(vote.score(codes.test, labels[1]))
        error = math.sqrt(accuracy * (1 - accuracy) / len(x))
    reconstruction = None
    if codes.reconstruction is not None:
        reconstruction = float(((x - codes.reconstruction) ** 2).mean(dtype=np.float64))
    return EmbeddingScore(
        name,
        codes.test.shape[1],
        float(trustworthiness(x[chosen], codes.test[chosen], n_neighbors=k)),
        accuracy,
        error,
        reconstruction,
        codes.fit_seconds,
        codes.transform_seconds,
    )


def _of_pair(
    pair: Autoencoder, run: Run | None, train: Tensor, test: Tensor, with_train: bool
) -> _Codes:
    def encode(x: Tensor) -> Tensor:
        parts = [
            mean_of(pair.encoder(encoder_input(pair.corruption, to_pair(pair, rows))))
            for rows, _ in chunks(x)
        ]
        return torch.cat(parts)

    with frozen(pair, seed=0):
        start = time.perf_counter()
        z = encode(test)
        seconds = time.perf_counter() - start
        means = torch.cat([mean_of(pair.decoder(rows)) for rows, _ in chunks(z)])
        known = encode(train).flatten(1).cpu().numpy() if with_train else None
    rebuilt = means.flatten(1).cpu().numpy() if means.isfinite().all() else None
    return _Codes(known, z.flatten(1).cpu().numpy(), rebuilt, run.seconds if run else None, seconds)


def _of_transformer(method: Any, train: Tensor, test: Tensor, with_train: bool) -> _Codes:
    from sklearn.base import clone  # type: ignore[import-untyped, unused-ignore]

    rows, held_out = (x.flatten(1).numpy() for x in (train, test))
    start = time.perf_counter()
    if not hasattr(method, "transform"):
        both = np.asarray(clone(method).fit_transform(np.concatenate([rows, held_out])))
        seconds = time.perf_counter() - start
        return _Codes(both[: len(rows)], both[len(rows) :], None, seconds, 0.0)
    fit_seconds = None
    if not _is_fitted(method):
        method = clone(method).fit(rows)
        fit_seconds = time.perf_counter() - start
    start = time.perf_counter()
    z = np.asarray(method.transform(held_out))
    seconds = time.perf_counter() - start
    rebuilt = None
    if hasattr(method, "inverse_transform") and not type(method).__module__.startswith("umap"):
        rebuilt = np.asarray(method.inverse_transform(z))
    known = np.asarray(method.transform(rows)) if with_train else None
    return _Codes(known, z, rebuilt, fit_seconds, seconds)


def _is_fitted(method: Any) -> bool:
    from sklearn.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        NotFittedError,
    )
    from sklearn.utils.validation import (  # type: ignore[import-untyped, unused-ignore]
        check_is_fitted,
    )

    try:
        check_is_fitted(method)
    except NotFittedError:
        return False
    return True


def _pair(method: Any) -> tuple[Autoencoder | None, Run | None]:
    """Return the pair of a method and what is known of its training, where it is one."""
    if isinstance(method, Autoencoder):
        return method, None
    if isinstance(method, tuple) and len(method) == 2 and isinstance(method[0], Autoencoder):
        return method
    return None, None


def _check_method(name: Any, method: Any, train: Tensor, test: Tensor) -> None:
    pair, run = _pair(method)
    if not isinstance(name, str):
        raise ValueError(f"methods must have names, got {name!r}")
    if pair is not None:
        if run is not None and not isinstance(run, Run):
            raise ValueError(
                f"methods[{name!r}] must be (pair, run) with the Run of probae.fit, got "
                f"{type(run).__name__}"
            )
        require_finite(pair)
        for argument, x in (("train", train), ("test", test)):
            check_support(pair, to_pair(pair, x), argument, binarize=False, strict=False)
        return
    from sklearn.base import BaseEstimator  # type: ignore[import-untyped, unused-ignore]

    both = hasattr(method, "fit") and hasattr(method, "transform")
    able = isinstance(method, BaseEstimator) and (both or hasattr(method, "fit_transform"))
    if not able:
        raise ValueError(
            f"methods[{name!r}] must be a pair, (pair, run), or an estimator of scikit-learn with "
            f"fit and transform, such as PCA(10), got {method!r}"
        )


def _labels(labels: Any, argument: str, count: int) -> Array:
    try:
        made = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{argument} must be integers of shape ({count},), got {type(labels).__name__}"
        ) from error
    if made.shape != (count,) or made.dtype.kind not in "iub":
        raise ValueError(
            f"{argument} must be integers of shape ({count},), one for each datum, got "
            f"{made.dtype} of shape {made.shape}"
        )
    return made
