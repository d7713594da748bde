"""The planes of README, as a test that takes about half an hour on one core."""

import statistics

import pytest

from . import manifold_planes


@pytest.mark.slow
def test_noise_and_contraction_find_the_manifold() -> None:
    result = manifold_planes.run()
    print(manifold_planes.table(result))
    rows = result["rows"]
    for name in manifold_planes.MANIFOLDS:
        plain = statistics.median(one["right"] for one in rows[f"{name}, AE"])
        worse = statistics.median(one["angle"] for one in rows[f"{name}, AE"])
        for model in ("DAE", "CAE"):
            row = rows[f"{name}, {model}"]
            assert statistics.median(one["angle"] for one in row) < min(5, worse / 2)
            assert all(one["dimension"] == one["true_dimension"] for one in row)
            assert statistics.median(one["right"] for one in row) > plain + 0.5


def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = manifold_planes.run((0,), ("circle",), 0.1)
    assert list(result["rows"]) == ["circle, AE", "circle, DAE", "circle, CAE"]
    assert all(0 <= row[0]["angle"] <= 90 for row in result["rows"].values())
    assert "| circle | CAE |" in manifold_planes.table(result)
