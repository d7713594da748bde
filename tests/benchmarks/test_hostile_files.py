"""Ten thousand damaged files, none of them executed, misread, or refused without its name."""

import pytest

from . import hostile_files


@pytest.mark.slow
def test_ten_thousand_damaged_files() -> None:
    result = hostile_files.main(["--number", "10000"])
    assert result["faults"] == []
    assert result["executed"] == []
    assert result["peak_memory_grown_mib"] < 1024
