"""Likelihood after training in bfloat16, as a test that takes about ten minutes on two cores."""

import pytest

from . import bf16_likelihood


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_bfloat16_costs_no_likelihood() -> None:
    result = bf16_likelihood.run()
    print(bf16_likelihood.table(result))
    assert (result["images"], result["num_samples"], len(result["rows"])) == (10_000, 500, 3)
    assert abs(result["mean_difference"]) <= 0.2


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = bf16_likelihood.run((0, 1), epochs=1, num_samples=20, limit=50, train_limit=3000)
    assert all(-400 < row["bf16"] < -90 for row in result["rows"])
    assert all(row["difference"] != 0 for row in result["rows"])  # two precisions indeed
    assert "bf16 − float32" in bf16_likelihood.table(result)
