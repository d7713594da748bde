"""The retrieval table of README, as a test that takes about a quarter of an hour on one core."""

import pytest

from . import mnist_retrieval


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_semantic_hashing_ranks_better_than_classical_hashes() -> None:
    pytest.importorskip("faiss", reason="needs the extra probae[faiss]")
    result = mnist_retrieval.run()
    print(mnist_retrieval.table(result))
    rows = result["rows"]
    assert result["images"] == 10_000
    for bits in mnist_retrieval.BITS:
        learned = rows[f"SemanticHashing, {bits} bits"]
        for name in ("LSH", "PCA hashing"):
            other = rows[f"{name}, {bits} bits"]
            assert learned["map"] > other["map"] + 5 * other["map_std_error"]
    assert result["seconds"]["index on faiss"] < 2 * result["seconds"]["faiss"]


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = mnist_retrieval.run(1, 20, (16,), limit=400, timed=False)
    assert list(result["rows"]) == [f"{name}, 16 bits" for name in mnist_retrieval.NAMES]
    assert all(0.1 < row["map"] < 0.9 for row in result["rows"].values())
    assert "| SemanticHashing, 16 bits |" in mnist_retrieval.table(result)
