"""Memory over a long training: a short run, and the long one as a test of some ten minutes."""

import pytest

from . import long_run


def test_the_record_of_a_short_run() -> None:
    result = long_run.run(2000)
    assert result["steps"] == 2000
    assert result["epochs"] == 20
    assert result["largest_over_smallest"] < 1.2


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_steps() -> None:
    result = long_run.run(120_000)
    print(result)
    assert result["steps"] >= 100_000
    assert result["largest_over_smallest"] < 1.05
