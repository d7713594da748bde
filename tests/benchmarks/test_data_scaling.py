"""Time and memory over the number of data: a small measurement, and one of ten minutes."""

import pytest

from . import data_scaling

linux = pytest.mark.skipif(not data_scaling.STATUS.exists(), reason="VmHWM is Linux's")


@linux
def test_the_measurement_runs_end_to_end_in_small() -> None:
    result = data_scaling.run(1, sizes=(200, 2000), modes=("eager, binarised anew",))
    (time,), (memory,) = result["time"].values(), result["memory"].values()
    assert time["ratio"] > 0
    assert memory[1]["data"] == pytest.approx(10 * memory[0]["data"])
    assert memory[1]["more"] < 500


@linux
@pytest.mark.slow
@pytest.mark.parametrize("mode", data_scaling.MODES)
def test_ten_times_the_data_take_no_memory_but_their_own(mode: str) -> None:
    sizes = [data_scaling.Problem(num_data=size) for size in data_scaling.SIZES]
    less, more = (data_scaling.memory(problem, mode) for problem in sizes)
    added = more["data"] - less["data"]
    copied = added / 11 if "binarised" in mode else 0.0  # held-out images, binarised once
    assert more["more"] - less["more"] < copied + 0.05 * added
