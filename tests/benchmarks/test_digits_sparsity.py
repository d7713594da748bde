"""The table on sparsity and likelihood of README, as a test of about ten minutes on one core."""

import math

import pytest

from . import digits_sparsity


@pytest.mark.slow
def test_point_codes_cost_likelihood_that_posteriors_keep() -> None:
    result = digits_sparsity.run()
    print(digits_sparsity.table(result))
    for row in result["rows"]:
        assert math.isfinite(row["log_likelihood"])
        if row["posterior"] != "point":
            assert row["minus_point"] > 2 * row["minus_point_std_error"], row


def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = digits_sparsity.run(rates=(1.0,), epochs=2, num_samples=20, temperatures=5, limit=20)
    assert [row["posterior"] for row in result["rows"]] == list(digits_sparsity.POSTERIORS)
    assert all(-60 < row["log_likelihood"] < -15 for row in result["rows"])
    assert "| 1 | laplace | ELBO |" in digits_sparsity.table(result)
