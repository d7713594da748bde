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
from scipy import stats
from torch import Tensor

import probae
from probae import plots
from probae.plots import (
    calibration_ranks,
    coverage,
    loss_curve,
    reconstructions,
    samples,
    traversals,
)

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


# ---- walks, ranks and coverage -------------------------------------------------------------------


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_traversals_are_decoder_means_a_row_a_coordinate(shape: tuple[int, ...]) -> None:
    pair = probae.VAE(shape, 3, hidden=(8,))
    figure = traversals(pair, dimensions=[2, 0], num_steps=5)
    shown = sheet(figure)
    assert shown.shape[:2] == (2 * 7 - 1, 5 * 6 - 1)
    walk = probae.traverse(pair, dimensions=[2, 0], num_steps=5)
    for row in range(2):
        for column in range(5):
            expected = as_image(walk.x.mean[row, column])
            pixels = shown[row * 7 : row * 7 + 6, column * 6 : column * 6 + 5]
            np.testing.assert_allclose(pixels, expected, atol=1e-6)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z[2]", "z[0]"]
    values = [f"{value:.3g}" for value in walk.values[0].tolist()]
    assert [label.get_text() for label in axes.get_xticklabels()] == values
    assert axes.get_xlabel() == "value of the coordinate"
    assert "around the mean of the prior" in figure.get_suptitle().replace("\n", " ")


def test_traversals_say_what_they_leave_out_and_where_they_start() -> None:
    pair = probae.VAE((6, 5), 12, hidden=(8,))
    figure = traversals(pair, num_steps=2)
    assert len(figure.axes[0].get_yticklabels()) == 10
    assert "(the first 10 of 12 coordinates)" in figure.get_suptitle().replace("\n", " ")
    figure = traversals(pair, torch.rand(6, 5).round(), [11], [0.0, 1.0], space="x")
    assert "around the mean code of a datum" in figure.get_suptitle().replace("\n", " ")
    assert "first" not in figure.get_suptitle()
    assert "around a code" in traversals(pair, torch.zeros(12), [11]).get_suptitle().replace(
        "\n", " "
    )


def test_columns_of_different_values_are_not_labelled_as_one() -> None:
    pair = probae.VAE((6, 5), 2, hidden=(8,), prior="mixture")
    (axes,) = traversals(pair).axes
    assert axes.get_xticklabels() == []
    assert axes.get_xlabel() == "value of the coordinate: low to high quantiles of its prior"
    (axes,) = traversals(pair, values=[[0.0], [1.0]]).axes
    assert axes.get_xlabel() == "value of the coordinate: as given for each row"


def test_traversals_refuse_what_they_cannot_draw() -> None:
    with pytest.raises(ValueError, match="pair must be on images"):
        traversals(probae.VAE(9, 2, hidden=(8,)))
    with pytest.raises(ValueError, match="mean is undefined"):
        traversals(probae.VAE((6, 5), 2, likelihood="categorical"))
    with pytest.raises(ValueError, match="limits must be two increasing numbers"):
        traversals(probae.VAE((6, 5), 2), limits=(1.0, 0.0))


def ranks_of(
    z_dim: int, num_simulations: int = 400, num_draws: int = 19
) -> probae.CalibrationRanks:
    return probae.simulation_based_calibration(
        probae.PPCA(z_dim + 1, z_dim), num_simulations, num_draws, seed=1
    )


@pytest.mark.parametrize("bins", [None, 7])
def test_rank_histograms_show_the_counts_and_the_band(bins: int | None) -> None:
    ranks = ranks_of(4)
    figure = calibration_ranks(ranks, bins)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 5
    expected = ranks.expected(bins).numpy()
    low, high = stats.binom.interval(0.99, 400, expected / 400)
    for axes, name, counts, p in zip(
        panels, ranks.names, ranks.histogram(bins), ranks.p_values, strict=True
    ):
        bars, band, mean = (patch.get_data() for patch in axes.patches)
        assert bars.values.tolist() == counts.tolist()
        assert band.values.tolist() == high.tolist()
        assert np.asarray(band.baseline).tolist() == low.tolist()
        np.testing.assert_allclose(mean.values, expected)
        # each bin reaches half a rank beyond its first and last
        size = len(expected)
        of_rank = np.arange(20) * size // 20
        first = [int(np.argmax(of_rank == b)) for b in range(size)]
        assert bars.edges.tolist() == [*(np.array(first) - 0.5).tolist(), 19.5]
        assert axes.get_title() == f"{name}: p = {p:.2g}"
    bottoms = [axes.get_xlabel() for axes in panels if axes.get_xlabel()]
    assert bottoms == ["rank among 19 draws"] * 3
    assert f"p = {ranks.p_value:.2g} for 5 quantities" in figure.get_suptitle().replace("\n", " ")
    assert "99 % of bins" in figure.legends[0].get_texts()[1].get_text()


def test_ranks_of_many_quantities_are_lines_and_uneven_ones_have_names() -> None:
    ranks = ranks_of(11)  # one seed in a hundred has a name here, too
    (axes,) = calibration_ranks(ranks).axes
    drawn = axes.get_lines()
    assert len(drawn) == 13, "12 quantities and zero"
    assert drawn[0].get_label() == "12 quantities"
    table = ranks.table.double()
    for line, column in zip(drawn, table.unbind(1), strict=False):
        share = np.asarray(line.get_xdata())
        below = [(column < (value * 20).round()).double().mean().item() - value for value in share]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), below, atol=1e-12)
    crowded = ranks.table.clone()
    crowded[:, 3] = crowded[:, 3] // 2
    uneven = ranks._replace(ranks=crowded[:, :11], statistic_ranks=crowded[:, 11:])
    (axes,) = calibration_ranks(uneven, title="t").axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels.count("z[3]") == 1
    assert "the other 11 quantities" in labels
    assert axes.figure.get_suptitle() == "t"


def test_the_band_of_lines_holds_ninety_nine_of_a_hundred() -> None:
    # 1000 uniform tables of ranks; five standard errors of the share outside are 0.016
    table = torch.randint(0, 20, (200, 1000))
    ranks = probae.CalibrationRanks(table, table[:, :0], tuple(map(str, range(1000))), 19)
    (axes,) = calibration_ranks(ranks).axes
    path = axes.collections[0].get_paths()[0].vertices
    band = np.array([path[path[:, 0] == x, 1].max() for x in np.arange(21) / 20])
    counts = np.stack([np.bincount(column, minlength=20) for column in table.T.numpy()])
    lines_ = np.pad(counts.cumsum(1) / 200, ((0, 0), (1, 0))) - np.arange(21) / 20
    outside = (np.abs(lines_) > band + 1e-9).any(1).mean()
    assert abs(outside - 0.01) < 0.016


def test_coverage_is_drawn_against_its_level() -> None:
    measured = probae.expected_coverage(
        probae.PPCA(4, 2), 400, 19, levels=torch.tensor([0.9, 0.1, 0.5])
    )
    figure = coverage(measured)
    (axes,) = figure.axes
    diagonal, curve = axes.get_lines()
    assert np.asarray(diagonal.get_ydata()).tolist() == [0, 1]
    assert np.asarray(curve.get_xdata()).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert np.asarray(curve.get_ydata()).tolist() == measured.coverage[[1, 2, 0]].tolist()
    edge = axes.collections[0].get_paths()[0].vertices
    top = edge[np.isclose(edge[:, 0], 0.5), 1].max()
    assert top == pytest.approx((measured.coverage + 2 * measured.std_error)[2].item())
    assert f"p = {measured.p_value:.2g}" in figure.get_suptitle()
    assert "400 simulations" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert "nominal level" in axes.get_xlabel()


def test_ranks_and_coverage_of_something_else_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ranks must be what probae\.simulation_based_calibration"
    ):
        calibration_ranks(torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"coverage must be what probae\.expected_coverage"):
        coverage(ranks_of(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bins must be at most the 20 ranks"):
        calibration_ranks(ranks_of(11), 21)


def test_figures_of_calibration_and_walks_render_inside() -> None:
    pair = probae.VAE((6, 5), 12, hidden=(8,))
    title = r"a $name that is no $\formula, " + "and goes on and on " * 5
    for figure in (
        traversals(pair),
        traversals(pair, dimensions=[0]),
        traversals(pair, num_steps=3, dimensions=[1]),
        traversals(pair, title=title),
        traversals(pair, dimensions=[0], num_steps=1, title=title),
        calibration_ranks(ranks_of(1), title=title),
        calibration_ranks(ranks_of(8), title=title),
        calibration_ranks(ranks_of(9), title=title),
        coverage(probae.expected_coverage(probae.PPCA(4, 2), 20), title=title),
    ):
        pixels = rendered(figure)
        assert 300 < pixels.shape[1] < 2000
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), "nothing is cut off at an edge"


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(plots)
    assert result.attempted > 0
    assert result.failed == 0


def as_image(x: Tensor) -> np.ndarray:
    """One datum as rows and columns of pixels."""
    if x.dim() == 3:
        x = x[0] if x.shape[0] == 1 else x.permute(1, 2, 0)
    return x.detach().numpy()
