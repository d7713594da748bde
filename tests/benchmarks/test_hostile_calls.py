"""Ten thousand hostile calls of the public functions, each answered or refused by name."""

import pytest

from . import hostile_calls


@pytest.mark.slow
def test_ten_thousand_hostile_calls() -> None:
    result = hostile_calls.main(["--number", "10000"])
    assert result["faults"] == {}
