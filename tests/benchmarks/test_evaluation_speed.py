"""The measurement of evaluation speed runs, and measures the same numbers on every path."""

from . import evaluation_speed


def test_the_measurement_runs_end_to_end_in_small() -> None:
    result = evaluation_speed.run(images=16, num_samples=200, rounds=1)
    assert all(rate > 0 for rate in result["gflops"].values())
    assert result["largest_difference_in_std_errors"] < 6
    assert "vectorized_importance_weights" in evaluation_speed.table(result)
