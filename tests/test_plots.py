"""Tests of probae.plots: what the figures hold, what they refuse, and what they leave alone."""

import doctest
import io
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import probae
from probae import plots
from probae.plots import loss_curve, reconstructions, samples

IMAGE_SHAPES = [(1, 6, 5), (6, 5), (3, 6, 5)]


def sheet(figure: Figure) -> np.ndarray:
    """Pixels of the mosaic that a figure shows."""
    (axes,) = figure.axes
    (image,) = axes.images
    return np.asarray(image.get_array())


def rendered(figure: Figure) -> np.ndarray:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("L"))


def fitted(**options: Any) -> probae.Run:
    x = torch.rand(64, 8).round()
    return probae.fit(probae.VAE(8, 2, hidden=(8,)), x, progress=False, **options)


def lines(figure: Figure) -> dict[str, list[float]]:
    return {
        str(line.get_label()): np.asarray(line.get_ydata()).tolist()
        for axes in figure.axes
        for line in axes.get_lines()
    }


def test_loss_curve_shows_the_history_in_nats() -> None:
    run = fitted(epochs=4, val=torch.rand(32, 8).round())
    figure = loss_curve(run, title="VAE on bits")
    drawn = lines(figure)
    assert drawn["training"] == run.history["loss"]
    assert drawn["validation"] == run.history["val_loss"]
    assert drawn["rate, KL(q(z|x) ‖ p(z))"] == run.history["kl"]
    distortion = drawn["distortion, $-E_q$ log p(x|z)"]
    assert [-value for value in distortion] == run.history["reconstruction"]
    assert f"parameters kept: epoch {run.best_epoch}" in drawn
    losses, terms, units = figure.axes
    assert "nats per datum" in losses.get_ylabel()
    assert "nats per datum" in terms.get_ylabel()
    assert np.asarray(units.get_lines()[0].get_ydata()).tolist() == run.history["active_units"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert figure.get_suptitle() == "VAE on bits"
    assert losses.get_title() == "loss: the negative ELBO"


def test_loss_curve_of_a_history_alone_marks_no_epoch() -> None:
    run = fitted(epochs=2)
    figure = loss_curve(run.history)
    assert not any("parameters kept" in label for label in lines(figure))
    assert "validation" not in lines(figure)
    assert "training data" in figure.axes[1].get_title()


def test_loss_curve_says_what_the_loss_is() -> None:
    warmup: Any = probae.LinearWarmup(2, end=0.5)
    warm = fitted(epochs=2, objective=probae.ELBO(warmup))
    figure = loss_curve(warm)
    assert figure.axes[0].get_title() == "loss: the negative ELBO, KL weight 0.5"
    assert "training, KL weight 0.25 to 0.5" in lines(figure)
    point = probae.UndercompleteAutoencoder(8, 2, hidden=(8,))
    figure = loss_curve(probae.fit(point, torch.randn(64, 8), epochs=1, progress=False))
    assert figure.axes[0].get_title() == "loss, which bounds nothing (RECONSTRUCTION)"
    assert len(figure.axes[1].get_lines()) == 2, "a flat prior has no rate to draw"


@pytest.mark.parametrize("history", [{}, {"epoch": [1.0], "loss": [2.0]}])
def test_loss_curve_refuses_what_is_no_history(history: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"run_or_history must have .* active_units"):
        loss_curve(history)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_reconstructions_put_the_data_above_the_decoder_means(shape: tuple[int, ...]) -> None:
    pair, x = probae.VAE(shape, 2, hidden=(8,)), torch.rand(20, *shape)
    figure = reconstructions(pair, x, columns=11)
    shown = sheet(figure)
    assert shown.shape[:2] == (6 + 1 + 6, 11 * 5 + 10)
    mean = probae.reconstruct(pair, x).mean
    for row, images in enumerate((x, mean)):
        expected = as_image(images[10])
        np.testing.assert_allclose(shown[row * 7 : row * 7 + 6, 60:65], expected, atol=1e-6)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["data", "reconstruction\n(decoder mean)"]


def test_reconstructions_show_no_more_than_there_is() -> None:
    pair = probae.VAE((1, 6, 5), 2, hidden=(8,))
    assert sheet(reconstructions(pair, torch.rand(3, 1, 6, 5))).shape == (13, 17)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
@pytest.mark.parametrize("mean", [True, False])
def test_samples_are_those_of_the_seed(shape: tuple[int, ...], mean: bool) -> None:
    pair = probae.VAE(shape, 2, hidden=(8,))
    shown = sheet(samples(pair, 7, mean=mean, seed=5))
    assert shown.shape[:2] == (3 * 7 - 1, 3 * 6 - 1)
    x, z = probae.sample(pair, 7, seed=5)
    expected = pair.decoder(z).mean.detach() if mean else x
    np.testing.assert_allclose(shown[:6, 12:17], as_image(expected[2]), atol=1e-6)
    np.testing.assert_array_equal(shown[14:, 6:], 1.0, "no eighth and ninth image: white")
    np.testing.assert_array_equal(shown, sheet(samples(pair, 7, mean=mean, seed=5)))


def test_limits_are_black_and_white() -> None:
    pair = probae.UndercompleteAutoencoder((6, 5), 2, hidden=(8,))
    x = torch.full((1, 6, 5), -2.0)
    x[0, 0, 0], x[0, 0, 1] = 2.0, 9.0
    shown = sheet(reconstructions(pair, x, limits=(-2.0, 2.0)))
    assert shown[0, :3].tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="limits must be two increasing numbers"):
        reconstructions(pair, x, limits=(1.0, 1.0))


@pytest.mark.parametrize("shape", [9, (2, 6, 5), (1, 1, 6, 5)])
def test_what_is_no_image_is_refused(shape: int | tuple[int, ...]) -> None:
    pair = probae.VAE(shape, 2, hidden=(8,))
    with pytest.raises(ValueError, match=r"pair must be on images .* x_dim=\(1, height, width\)"):
        samples(pair)
    with pytest.raises(ValueError, match="pair must be on images"):
        reconstructions(pair, torch.rand(3, *pair.x_shape))


def test_bad_counts_and_data_are_refused() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    with pytest.raises(ValueError, match="columns must be an int >= 1, got 0"):
        reconstructions(pair, torch.rand(3, 6, 5), columns=0)
    with pytest.raises(ValueError, match="num_samples must be an int >= 1"):
        samples(pair, 0)
    with pytest.raises(ValueError, match="x must have shape"):
        reconstructions(pair, torch.rand(3, 5, 6))


def test_pairs_without_a_prior_or_a_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="flat prior"):
        samples(probae.UndercompleteAutoencoder((6, 5), 2, hidden=(8,)))
    classes = probae.VAE((6, 5), 2, likelihood="categorical")
    with pytest.raises(ValueError, match="mean is undefined"):
        samples(classes)
    assert sheet(samples(classes, 4, mean=False)).max() == 1


def test_pictures_render_with_titles_of_any_length_inside() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    title = r"a $name that is no $\formula, " + "and goes on and on " * 5
    for figure in (
        samples(pair, 1, title=title),
        samples(pair, 64, title=title),
        reconstructions(pair, torch.rand(2, 6, 5), title=title),
        loss_curve(fitted(epochs=1), title=title[:60]),
    ):
        pixels = rendered(figure)
        assert 300 < pixels.shape[1] < 2000
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), "nothing is cut off at an edge"


def test_drawing_changes_neither_pair_nor_random_stream() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,))
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    samples(pair)
    samples(pair, mean=False)
    reconstructions(pair, torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training
    assert all(torch.equal(before[name], tensor) for name, tensor in pair.state_dict().items())


def test_pyplot_knows_of_no_figure() -> None:
    from matplotlib import pyplot

    before, backend = pyplot.get_fignums(), matplotlib.get_backend()
    samples(probae.VAE((6, 5), 2, hidden=(8,)))
    loss_curve(fitted(epochs=1))
    assert pyplot.get_fignums() == before
    assert matplotlib.get_backend() == backend
    assert not hasattr(plots, "pyplot")


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(plots)
    assert result.attempted > 0
    assert result.failed == 0


def as_image(x: Tensor) -> np.ndarray:
    """One datum as rows and columns of pixels."""
    if x.dim() == 3:
        x = x[0] if x.shape[0] == 1 else x.permute(1, 2, 0)
    return x.detach().numpy()
