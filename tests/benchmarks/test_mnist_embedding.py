"""The embeddings of README, as a test that takes about half an hour on one core."""

import pytest

from . import mnist_embedding


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_codes_of_a_pair_classify_better_than_pca_and_as_well_as_umap() -> None:
    pytest.importorskip("umap", reason="needs the extra probae[umap]")
    result = mnist_embedding.run()
    print(mnist_embedding.table(result))
    accuracy = {name: row["accuracy"] for name, row in result["rows"].items()}
    assert result["images"] == 10_000
    assert accuracy[result["best"]] > accuracy["PCA"]
    assert accuracy[result["best"]] > accuracy["UMAP"] - 0.01


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = mnist_embedding.run(1, (20,), ("VAE", "DAE"), with_umap=False, limit=300)
    assert list(result["rows"]) == ["VAE", "DAE", "PCA", "factor analysis"]
    assert result["best"] in ("VAE", "DAE")
    assert all(0.1 < row["accuracy"] < 1 for row in result["rows"].values())
    assert "best on validation |" in mnist_embedding.table(result)
