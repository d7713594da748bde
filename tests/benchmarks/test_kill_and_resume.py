"""Trainings that are killed again and again, as a test that takes about a minute."""

import pytest

from . import kill_and_resume


@pytest.mark.slow
def test_fifty_kills_leave_the_training_as_it_would_have_been() -> None:
    result = kill_and_resume.run(50)
    print(kill_and_resume.table(result))
    assert result["kills"] == 50
    assert result["failed_resumes"] == 0
    assert result["identical"]
    assert sum(row["before_the_first_checkpoint"] for row in result["rows"]) < 25
