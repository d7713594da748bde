"""The comparison of ``fit`` with a bare loop runs, and trains the same pair in both."""

from . import fit_overhead
from .training_speed import Problem


def test_the_measurement_runs_end_to_end_in_small() -> None:
    result = fit_overhead.run(Problem(batch_size=50, num_data=200), num_val=100, rounds=1)
    assert all(value > 0 for value in result["medians"].values())
    assert "| 50 |" in fit_overhead.table([result])
