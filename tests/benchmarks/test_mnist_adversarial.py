"""Likelihoods of adversarial pairs, as a test that takes about half an hour on one core."""

from pathlib import Path

import pytest

import probae

from . import mnist_adversarial


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_annealing_tells_apart_what_parzen_windows_draw_together() -> None:
    result, _ = mnist_adversarial.run(mnist_adversarial.EPOCHS)
    print(mnist_adversarial.table(result))
    rows, real = result["rows"], result["training images"]["parzen"]
    assert [row["kind"] for row in rows.values()] == ["ELBO", "ADVERSARIAL", "ADVERSARIAL"]
    assert all(0 < row["gap"] < 5 for row in rows.values())
    # the scale that was not trained is chosen inside the search, not at its start
    assert rows["GAN"]["scale"] != rows["GAN"]["scale_of_training"]
    for better, worse in (("VAE", "AAE"), ("VAE", "GAN"), ("AAE", "GAN")):
        mean, std_error = mnist_adversarial.loss_against(result, better, worse)
        # both are lower bounds: what the worse may be too low by counts against the difference;
        # it is measured on simulated images, which stand in for those of the test set
        assert mean > 3 * std_error + rows[worse]["gap"]
        if worse == "GAN":  # of that, Parzen windows see but a part on the very images
            seen = rows[better]["parzen_same_images"] - rows[worse]["parzen_same_images"]
            assert seen < 0.8 * mean
    # they misorder the other two
    assert rows["AAE"]["parzen"] > rows["VAE"]["parzen"] + 5 * rows["AAE"]["parzen_std_error"]
    # they put a decoder above the data themselves
    assert rows["AAE"]["parzen"] > real + 5 * rows["AAE"]["parzen_std_error"]
    assert 235 < real < 250


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small(tmp_path: Path) -> None:
    result, figure = mnist_adversarial.run(
        dict.fromkeys(mnist_adversarial.EPOCHS, 1),
        images=3,
        simulated=2,
        chains=2,
        temperatures=5,
        samples=100,
        tuning=2,
        short=probae.Annealing(5, num_pilot=2, num_leapfrogs=2),
        limit=300,
        keep=tmp_path,
    )
    rows = result["rows"]
    assert [row["kind"] for row in rows.values()] == ["ELBO", "ADVERSARIAL", "ADVERSARIAL"]
    assert all(len(row["values"]) == 3 for row in rows.values())
    for row in rows.values():  # the scale taken is the best of those tried
        assert f"{row['scale']:.4g}" == f"{float(max(row['search'], key=row['search'].get)):.4g}"
    assert "| GAN | " in mnist_adversarial.table(result)
    assert {path.name for path in tmp_path.iterdir()} == set(rows)
    figure.savefig(tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 10_000
