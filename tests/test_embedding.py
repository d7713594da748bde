"""The comparison of embeddings against scikit-learn's own numbers, and what it refuses."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.manifold import TSNE, trustworthiness
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import probae
from probae import EmbeddingComparison, EmbeddingScore, compare_embeddings


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes around three points of six dimensions."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    return 5 * torch.eye(6)[labels] + torch.randn(n, 6, generator=g), labels


TRAIN, TEST = blobs(200, 0), blobs(80, 1)
TASK: dict[str, Any] = {"num_neighbours": 5}


def compare(methods: Any, **options: Any) -> EmbeddingComparison:
    return compare_embeddings(methods, TRAIN[0], TEST[0], TRAIN[1], TEST[1], **(TASK | options))


def linear() -> probae.PPCA:
    return probae.PPCA.maximum_likelihood(TRAIN[0], z_dim=2)


# ---- numbers -------------------------------------------------------------------------------------


def test_a_transformer_scores_what_scikit_learn_says() -> None:
    row = compare({"PCA": PCA(2)}).of("PCA")
    pca = PCA(2).fit(TRAIN[0].numpy())
    x = TEST[0].numpy()
    z = pca.transform(x)
    vote = KNeighborsClassifier(5).fit(pca.transform(TRAIN[0].numpy()), TRAIN[1].numpy())
    accuracy = vote.score(z, TEST[1].numpy())
    assert row.accuracy == pytest.approx(accuracy)
    assert row.accuracy_std_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 80))
    assert row.trustworthiness == pytest.approx(trustworthiness(x, z, n_neighbors=5))
    assert row.reconstruction == pytest.approx(((x - pca.inverse_transform(z)) ** 2).mean())
    assert row.z_dim == 2
    assert row.fit_seconds is not None


def test_a_pair_scores_what_its_parts_say() -> None:
    pair = linear()
    row = compare({"PPCA": pair}).of("PPCA")
    with torch.no_grad():
        z, known = (pair.encoder(x).mean for x in (TEST[0], TRAIN[0]))
        error = ((pair.decoder(z).mean - TEST[0]) ** 2).mean()
    vote = KNeighborsClassifier(5).fit(known.numpy(), TRAIN[1].numpy())
    assert row.accuracy == pytest.approx(vote.score(z.numpy(), TEST[1].numpy()))
    assert row.trustworthiness == pytest.approx(
        trustworthiness(TEST[0].numpy(), z.numpy(), n_neighbors=5)
    )
    assert row.reconstruction == pytest.approx(float(error))
    assert row.fit_seconds is None


def test_methods_of_every_kind_stand_side_by_side() -> None:
    pair = probae.VAE(6, 2, hidden=(8,), likelihood="gaussian")
    run = probae.fit(pair, TRAIN[0], epochs=2, progress=False)
    fitted = PCA(3).fit(TRAIN[0].numpy())
    result = compare(
        {
            "trained": (pair, run),
            "fitted": fitted,
            "pipeline": make_pipeline(StandardScaler(), PCA(2)),
            "factors": FactorAnalysis(2),
            "estimator": probae.AutoencoderEstimator("PPCA", 2, epochs=2),
            "t-SNE": TSNE(2, max_iter=400, random_state=0),
        }
    )
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["trained", "fitted", "pipeline", "factors", "estimator", "t-SNE"]
    assert rows["trained"].fit_seconds == run.seconds
    assert (rows["fitted"].fit_seconds, rows["fitted"].z_dim) == (None, 3)
    without = [name for name, row in rows.items() if row.reconstruction is None]
    assert without == ["factors", "t-SNE"]
    for row in result.rows:
        assert row.accuracy is not None
        assert row.accuracy > 0.6  # a third by chance
        assert 0.5 < row.trustworthiness <= 1
    lines = repr(result).split("\n")
    assert len(lines) == 8
    assert len({len(line) for line in lines[:-1]}) == 1  # one width
    assert "5-NN accuracy, %" in lines[0]
    assert lines[-1] == "80 test data; trustworthiness on 80 of them"
    with pytest.raises(ValueError, match=r"name must be one of trained, .*, got 'umap'"):
        result.of("umap")


def test_without_labels_there_is_no_accuracy() -> None:
    result = compare_embeddings({"PCA": PCA(2), "pair": linear()}, TRAIN[0], TEST[0].numpy())
    assert [row.accuracy for row in result.rows] == [None, None]
    assert "—" in repr(result)


def test_images_are_rows_to_transformers_and_images_to_pairs() -> None:
    train, test = torch.rand(60, 1, 4, 5), torch.rand(40, 1, 4, 5)
    pair = probae.VAE((1, 4, 5), 2, channels=(3,), hidden=(5,))
    result = compare_embeddings({"PCA": PCA(2), "VAE": pair}, train, test, num_neighbours=3)
    rows = train.flatten(1).numpy(), test.flatten(1).numpy()
    again = compare_embeddings({"PCA": PCA(2)}, *rows, num_neighbours=3)
    assert result.of("PCA").trustworthiness == pytest.approx(again.of("PCA").trustworthiness)
    assert result.of("VAE").reconstruction is not None


def test_trustworthiness_is_measured_on_some_of_the_data() -> None:
    one, same, other = (
        compare({"PCA": PCA(2)}, num_ranked=30, seed=seed).of("PCA").trustworthiness
        for seed in (0, 0, 1)
    )
    assert one == same != other
    assert compare({"PCA": PCA(2)}, num_ranked=30).num_ranked == 30


def test_nothing_is_changed() -> None:
    pair, pca = probae.VAE(6, 2, hidden=(8,), likelihood="gaussian"), PCA(2)
    before, stream = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    compare({"pair": pair, "PCA": pca})
    assert not hasattr(pca, "components_")  # a copy was fitted
    assert pair.training
    assert all(torch.equal(t, before[name]) for name, t in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_classes_have_no_reconstruction_in_squares() -> None:
    options = {"likelihood": "categorical", "likelihood_options": {"num_classes": 3}}
    pair = probae.VAE(6, 2, hidden=(5,), **options)
    x = torch.randint(3, (50, 6)).float()
    assert compare_embeddings({"VAE": pair}, x, x).of("VAE").reconstruction is None


def test_a_score_is_a_row_of_the_table() -> None:
    score = EmbeddingScore("a", 2, 0.5, 0.25, 0.125, 0.1, 12.34, 0.5)
    text = repr(EmbeddingComparison((score,), 7, 100, 50)).split("\n")
    assert text[1].split() == ["a", "2", "0.5000", "25.00", "±", "12.50", "0.10000", "12.3", "0.50"]


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({}, {}, "methods must be a dict"),
        ([PCA(2)], {}, "methods must be a dict"),
        ({"a": PCA}, {}, r"methods\['a'\] must be a pair, .* such as PCA\(10\)"),
        ({"a": "PCA"}, {}, r"methods\['a'\] must be a pair"),
        ({3: PCA(2)}, {}, "methods must have names, got 3"),
        ({"a": (linear(), 1.0)}, {}, r"methods\['a'\] must be \(pair, run\) .* got float"),
        ({"a": probae.VAE(5, 2, likelihood="gaussian")}, {}, r"train must have shape \(N, 5\)"),
        ({"a": probae.VAE(6, 2)}, {}, "train must lie in the support of the decoder"),
        ({"a": PCA(2)}, {"num_neighbours": 0}, "num_neighbours must be an int >= 1"),
        ({"a": PCA(2)}, {"num_neighbours": 40}, "num_neighbours must be at most .* 200, .* 80"),
        ({"a": PCA(2)}, {"num_ranked": 2}, "num_ranked must be an int >= 3"),
        ({"a": PCA(2)}, {"num_ranked": 10}, "less than half the number of ranked .* 10, got 5"),
    ],
)
def test_bad_methods_and_numbers_are_named(
    methods: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(methods, **options)


def test_bad_data_are_named() -> None:
    methods = {"PCA": PCA(2)}
    with pytest.raises(ValueError, match=r"test must have the shape of train, \(M, 6\), got"):
        compare_embeddings(methods, TRAIN[0], TEST[0][:, :5])
    with pytest.raises(ValueError, match="train must be finite"):
        compare_embeddings(methods, torch.full((9, 6), math.nan), TEST[0])
    with pytest.raises(ValueError, match="both, or neither"):
        compare_embeddings(methods, TRAIN[0], TEST[0], TRAIN[1])
    for labels, message in (
        (TEST[1][:3], r"test_labels must be integers of shape \(80,\)"),
        (TEST[1].double(), "test_labels must be integers .* got float64"),
        ("abc", "test_labels must be integers"),
        (np.array(["a"] * 80), "test_labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_embeddings(methods, TRAIN[0], TEST[0], TRAIN[1], labels)
