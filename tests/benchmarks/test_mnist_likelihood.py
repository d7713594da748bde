"""The MNIST table of README, as a test that takes about half an hour on two cores."""

import pytest

from . import mnist_likelihood


@pytest.mark.slow
@pytest.mark.usefixtures("mnist")
def test_mnist_likelihoods_within_sixty_epochs() -> None:
    result = mnist_likelihood.run()
    print(mnist_likelihood.table(result))
    assert result["epochs"] <= 60
    assert result["images"] == 10_000
    assert result["num_samples"] == 5000
    assert result["models"]["VAE"]["nll"] <= 90.5
    assert result["iwae_minus_vae"] >= 1.0
    assert result["peak_memory_gib"] < 2.0


@pytest.mark.usefixtures("mnist")
def test_the_experiment_runs_end_to_end_in_small() -> None:
    result = mnist_likelihood.run(epochs=1, num_samples=20, limit=50, train_limit=5000)
    assert 90 < result["models"]["VAE"]["nll"] < 250
    assert "IWAE(5)" in mnist_likelihood.table(result)
