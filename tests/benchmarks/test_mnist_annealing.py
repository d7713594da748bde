"""The table of annealed likelihoods in README, as a test of about half an hour on two cores."""

import pytest

import probae

from . import mnist_annealing


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_annealing_is_tighter_than_importance_samples_and_its_gap_below_a_nat() -> None:
    result = mnist_annealing.run(mnist_annealing.trained(60, 0, 60_000))
    print(mnist_annealing.table(result))
    assert (result["images"], result["num_samples"]) == (100, 5000)
    for row in result["rows"][1:]:
        assert row["gain"] >= -0.1
    for bounds in result["gaps"].values():
        assert -3 * bounds["gap_std_error"] < bounds["gap"] < 1


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    settings = {"encoder": probae.Annealing(30, num_leapfrogs=3, num_pilot=10, start="encoder")}
    pair = mnist_annealing.trained(1, 0, 5000)
    result = mnist_annealing.run(pair, 4, 4, 100, 4, settings)
    assert -0.5 < result["rows"][1]["gain"] < 20
    assert result["gaps"]["encoder"]["gap"] > -0.5
    assert "AIS from the encoder, 30 temperatures" in mnist_annealing.table(result)
