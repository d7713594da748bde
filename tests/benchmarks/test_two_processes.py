"""Two processes against one on MNIST: a small run, and the whole as a test of some minutes."""

import pytest

from . import two_processes


@pytest.mark.usefixtures("mnist")
def test_torchrun_gives_the_loss_curve_of_one_process() -> None:
    row = two_processes.compare("undercomplete", 2, rows=600, batch_size=100, hidden=(20,))
    assert row["steps"] == 6
    assert row["largest_difference_of_a_step"] < 1e-5
    assert row["difference_of_the_epoch"] < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_two_processes_agree_with_one_over_an_epoch_of_mnist() -> None:
    for name in two_processes.PAIRS:
        row = two_processes.compare(name, 2, rows=55_000, batch_size=500, hidden=(500, 200))
        print(row)
        assert row["difference_of_the_epoch"] < 1e-3  # a VAE's noise is another
        if name != "vae":
            assert row["difference_of_the_epoch"] < 1e-4
            assert row["largest_difference_of_a_step"] < 1e-4
