"""The table of MNIST features of README, as a test that takes about half an hour on one core."""

import pytest

from . import mnist_features


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_noise_and_contraction_make_better_features() -> None:
    result = mnist_features.run()
    print(mnist_features.table(result))
    error = {name: row["error"] for name, row in result["rows"].items()}
    norm = {name: row["jacobian"] for name, row in result["rows"].items() if "jacobian" in row}
    assert result["images"] == 10_000
    for name in ("DAE", "CAE"):
        row = result["rows"][name]
        assert error[name] < error["AE"]
        assert row["minus_ae"] < -2 * row["minus_ae_std_error"]
    assert norm["CAE"] < norm["DAE"] < norm["AE"]


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = mnist_features.run(epochs=1, labelled=300, limit=500)
    assert all(5 < row["error"] < 90 for row in result["rows"].values())
    assert "| CAE |" in mnist_features.table(result)
