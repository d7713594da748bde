"""Two processes against one on MNIST, and a killed one, as a test that takes some minutes."""

from pathlib import Path

import pytest

from . import two_processes


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_two_processes_agree_with_one_over_an_epoch_of_mnist() -> None:
    for name in two_processes.PAIRS:
        row = two_processes.compare(name, 2, rows=55_000, batch_size=500, hidden=(500, 200))
        print(row)
        # rounding grows from step to step, so single late steps agree to three digits only
        assert row["difference_of_the_epoch"] < 1e-4
        if name.endswith("float64"):
            assert row["largest_difference_of_a_step"] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(victim: int, tmp_path: Path) -> None:
    result = two_processes.kill_a_worker(tmp_path, 2, victim)
    assert result["exit_status"] != 0
    assert result["resumed_status"] == 0
