"""The chains of README, as a test that takes about a quarter of an hour on one core."""

from pathlib import Path

import pytest

from . import mnist_gsn


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_walkback_makes_better_chains() -> None:
    result, _ = mnist_gsn.run()
    print(mnist_gsn.table(result))
    rows = result["rows"]
    assert result["images"] == 10_000
    for start in mnist_gsn.STARTS:
        score, std_error = rows["walkback"][start]["score"], rows["walkback"][start]["std_error"]
        for name in ("plain", "plain, longer"):
            other = rows[name][start]
            assert score > other["score"] + 2 * (std_error + other["std_error"])
        assert score < result["training images"]["score"]
    assert 235 < result["training images"]["score"] < 250  # of these and others, about 243
    # what walkback pays for it: a worse loss at the data, and blur
    assert rows["walkback"]["denoising_loss"] > rows["plain"]["denoising_loss"]
    assert rows["walkback"]["images"]["entropy"] > rows["plain"]["images"]["entropy"]


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small(tmp_path: Path) -> None:
    result, figure = mnist_gsn.run(
        epochs=1, units=20, steps=2, samples=200, burn_in=2, thin=1, limit=1200
    )
    assert list(result["rows"]) == ["plain", "plain, longer", "walkback"]
    assert all(row["kind"] == "CONDITIONAL" for row in result["rows"].values())
    assert all(row[s]["score"] < 300 for row in result["rows"].values() for s in mnist_gsn.STARTS)
    assert "| walkback, 2 steps, 1 epoch |" in mnist_gsn.table(result)
    figure.savefig(tmp_path / "chains.png")
    assert (tmp_path / "chains.png").stat().st_size > 10_000
